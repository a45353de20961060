"""Loads the compiled C libraries that lie in this folder and calls their functions by ctypes.

FASTDREAMER_LIBRARY names another file to load as the CPU library, such as one built with
sanitizers; FASTDREAMER_ISA is the instruction set that it starts with, one of `ISAS`.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

ABI_VERSION = 9
UNSUPPORTED = 6  # FD_ERROR_UNSUPPORTED
CPU_LIBRARY = Path(
    os.environ.get("FASTDREAMER_LIBRARY") or Path(__file__).with_name("libfastdreamer_cpu.so")
)
CUDA_LIBRARY = Path(__file__).with_name("libfastdreamer_cuda.so")
DTYPES = {torch.float32: 0, torch.float64: 1}
COMPUTE_DTYPES = {torch.float32: 0, torch.bfloat16: 2}

MATRIX = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))  # an input: data, strides
OUTPUT = (ctypes.c_void_p,)  # also a contiguous input
SIZE = (ctypes.c_int64,)
INT = (ctypes.c_int32,)
FLOAT = (ctypes.c_float,)
DTYPE_AND_STREAM = (ctypes.c_int32, ctypes.c_void_p)


class UnsupportedError(RuntimeError):
    """The device takes no model of this size; others may, and the reference does."""


def unavailable_reason(device_type: str = "cpu") -> str | None:
    """Why the library for a type of device cannot be used, or None if it can."""
    try:
        _load(device_type)
    except RuntimeError as error:
        return str(error)
    return None


@cache
def function(
    name: str, signature: tuple[Any, ...], device_type: str = "cpu"
) -> Callable[..., None]:
    """The C function ``name`` with these argument types, of the library for a type of device.

    Raises RuntimeError with the reason if the library cannot be used; the function itself raises
    RuntimeError with the library's message where it returns an error code.
    """
    library = _load(device_type)

    def check(error: int, *_: object) -> None:
        if error:
            kind = UnsupportedError if error == UNSUPPORTED else RuntimeError
            raise kind(f"{name}: {library.fd_error_string(error).decode()}")

    try:
        c_function = library[name]
    except AttributeError:
        file = _path(device_type).name
        raise RuntimeError(f"{file} lacks {name}: install fastdreamer again") from None
    c_function.argtypes = signature
    c_function.restype = ctypes.c_int32
    c_function.errcheck = check  # type: ignore[assignment]

    def call(*arguments: Any) -> None:
        if device_type == "cpu":
            _lend_threads(torch.get_num_threads())
        c_function(*arguments)

    return call


def matrix(x: Tensor) -> tuple[int, ctypes.Array[ctypes.c_int64]]:
    """The two arguments that pass a tensor as an input, with its strides as they are."""
    return x.data_ptr(), (ctypes.c_int64 * x.ndim)(*x.stride())


class Arguments(ctypes.Structure):
    """A C structure of sizes and tensors, filled from keywords."""

    @classmethod
    def of(cls, **values: Any) -> Any:
        """Tensors become their addresses; they must be contiguous and outlive the call."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous(), name
                values[name] = value.data_ptr()
        return cls(**values)


class Launch(Arguments):
    """``fd_launch``."""

    _fields_: ClassVar = [
        ("compute", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    ]


def serves(x: Tensor) -> str:
    """The type of device whose library serves a tensor."""
    return x.device.type


def launch(name: str, on: Tensor, compute: torch.dtype, *structures: ctypes.Structure) -> None:
    """Call ``name`` by the library of the device that ``on`` is on, in its current stream.

    Args:
        compute: float32 or bfloat16, what products multiply in; a CPU without products in bfloat16
            takes float32 for both.

    Raises UnsupportedError where the device takes no model of this size.
    """
    kind = serves(on)
    if kind == "cpu":
        _scan(name, kind, structures)(Launch(compute=COMPUTE_DTYPES[compute]))
        return
    with torch.cuda.device_of(on):
        stream = torch.cuda.current_stream().cuda_stream if on.is_cuda else None
        launching = Launch(compute=COMPUTE_DTYPES[compute], stream=stream)
        call = _scan(name, kind, structures)
        call(launching)
        workspace = on.new_empty(launching.workspace_bytes, dtype=torch.uint8)
        launching.workspace = workspace.data_ptr()
        call(launching)


def takes(name: str, device: torch.device, compute: torch.dtype, *structures: Any) -> bool:
    """Whether a GPU takes a call of ``name`` with such sizes; no pointer is followed."""
    with torch.cuda.device(-1 if device.index is None else device.index):
        try:
            _scan(name, "cuda", structures)(Launch(compute=COMPUTE_DTYPES[compute]))
        except UnsupportedError:
            return False
    return True


def _scan(name: str, kind: str, structures: tuple[Any, ...]) -> Callable[[Launch], None]:
    signature = (*(ctypes.POINTER(type(x)) for x in structures), ctypes.POINTER(Launch))
    call, pointers = function(name, signature, kind), [ctypes.byref(x) for x in structures]
    return lambda launching: call(*pointers, ctypes.byref(launching))


ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # as in csrc/fastdreamer.h
BFLOAT16_SETS = ISAS[3:]  # with products in bfloat16


def isa() -> str:
    """The instruction set that the CPU library uses. Raises RuntimeError if there is none."""
    return ISAS[_load().fd_isa()]


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether the CPU library is there and uses AMX."""
    try:
        return isa() == "amx"
    except RuntimeError:
        return False


def set_isa(name: str) -> None:
    """Use one of ``ISAS``; the fastest that the processor has is the default.

    Raises ValueError for an unknown one, RuntimeError where the processor lacks it.
    """
    if name not in ISAS:
        raise ValueError(f"unknown instruction set {name!r}: {', '.join(ISAS)} are valid")
    function("fd_set_isa", (ctypes.c_int32,))(ISAS.index(name))


@lru_cache(1)
def _lend_threads(threads: int) -> None:
    """PyTorch's own pool of threads, so that no second one spins against it."""
    _load().fd_set_threads(_gomp_parallel(), ctypes.c_int64(threads))


@cache
def _gomp_parallel() -> ctypes.c_void_p:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch loaded; null if not found."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if re.search(r"lib(gomp|iomp5|omp)\b", line)}
    ours = [path for path in sorted(paths) if "torch" in path]
    for path in ours or sorted(paths):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return ctypes.c_void_p()


def _path(device_type: str) -> Path:
    return CPU_LIBRARY if device_type == "cpu" else CUDA_LIBRARY


@cache
def _load(device_type: str = "cpu") -> ctypes.CDLL:
    path = _path(device_type)
    language, compiler = ("C++", "a C++17 compiler") if device_type == "cpu" else ("CUDA", "nvcc")
    if not path.exists():
        raise RuntimeError(
            f"the {language} library of fastdreamer is not built "
            f"({path.name} is missing in {path.parent}): "
            f"install {compiler}, then install fastdreamer again"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.fd_abi_version()
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path.name} cannot be loaded: {error}") from error
    if version != ABI_VERSION:
        raise RuntimeError(
            f"{path.name} has interface version {version}, this fastdreamer needs "
            f"{ABI_VERSION}: install fastdreamer again"
        )
    library.fd_error_string.restype = ctypes.c_char_p
    wanted = os.environ.get("FASTDREAMER_ISA")
    if device_type == "cpu" and wanted:
        if wanted not in ISAS:
            raise RuntimeError(f"FASTDREAMER_ISA={wanted}: {', '.join(ISAS)} are valid")
        if library.fd_set_isa(ctypes.c_int32(ISAS.index(wanted))):
            raise RuntimeError(f"FASTDREAMER_ISA={wanted}: the processor lacks it")
    return library
