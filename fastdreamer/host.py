"""The process and its run directory: memory, threads, determinism, lock."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from fastdreamer.errors import UsageError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let glibc keep freed activations instead of returning their pages at once.

    An update allocates and frees gigabytes in large blocks; by default each is mapped and zeroed
    by the kernel anew. Returns whether it was done (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    limit = 2**31 - 1
    settings = ((_M_MMAP_THRESHOLD, limit), (_M_TRIM_THRESHOLD, limit), (_M_TOP_PAD, 2**26))
    return all([libc.mallopt(name, value) for name, value in settings])


def set_up_process(threads: int = 0, deterministic: bool = False) -> None:
    """Memory, threads (0: PyTorch's default) and determinism of this process.

    Determinism covers cuBLAS, whose setting must stand before its first call; an operation that
    has no deterministic form raises RuntimeError when it runs.
    """
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run directory and hold it alone; the lock ends with the process.

    Raises:
        UsageError: it cannot be made, or another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UsageError(f"--logdir {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"--logdir {folder}: another run writes there; wait, or give another one"
            ) from None
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == ["lock"]:  # nothing came of it
                (folder / "lock").unlink()
                folder.rmdir()
            raise


@contextmanager
def first_signal(ask_to_stop: Callable[[int], None]) -> Iterator[None]:
    """SIGINT or SIGTERM calls ``ask_to_stop`` with its number; a second one acts as ever.

    Only in the main thread: elsewhere Python allows no handlers, and nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _: FrameType | None) -> None:
        restore()
        ask_to_stop(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
