"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the progress bar."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastdreamer.config import LogConfig
from fastdreamer.errors import UsageError, UserError
from fastdreamer.video import gif_bytes

VIDEO_FPS = 8


class Logger:
    """Writes metrics of a run; every line has ``step``, ``updates`` and ``time`` (seconds).

    Args:
        logdir: run directory, which exists.
        total: environment steps of the whole run.
        step: steps already done (a resumed run).
        elapsed: seconds already spent (a resumed run).
        keep_bytes: what of an existing metrics.jsonl belongs to the run; None: all of it.
        log: which outputs are wanted.
        config: shown by Weights & Biases.

    Raises:
        UsageError: wandb is asked for but not installed, or without TensorBoard.
        UserError: the disk refuses, also later.
    """

    def __init__(
        self,
        logdir: Path,
        total: int,
        step: int = 0,
        elapsed: float = 0.0,
        keep_bytes: int | None = 0,
        log: LogConfig | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        log = log or LogConfig()
        self._logdir = logdir
        self._wandb = _sync_wandb(log, logdir, config or {}) if log.wandb else None
        with self._writing():
            self._file = (logdir / "metrics.jsonl").open("ab", buffering=0)
            if keep_bytes is not None:
                self._file.truncate(min(keep_bytes, self._file.tell()))
            self._file.seek(0, os.SEEK_END)
        self._writer = None
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_later_name(logdir)
            # Hides the events after the checkpoint, or all of a run that was cut before its first.
            with self._writing():
                self._writer = SummaryWriter(str(logdir), purge_step=step + 1 if step else 0)
        self._bar = tqdm(
            total=total, initial=step, unit="step", disable=not log.progress, smoothing=0.05
        )
        self._scores: deque[float] = deque(maxlen=20)
        self._start = time.monotonic() - elapsed
        self._postfix: dict[str, str] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the run started, over all its resumptions."""
        return time.monotonic() - self._start

    def sync(self) -> int:
        """Bring all lines and events to the disk; the size of metrics.jsonl, where a resumed run
        continues."""
        with self._writing():
            if self._writer is not None:
                self._writer.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    @property
    def mean_score(self) -> float | None:
        """Mean score of up to 20 last episodes."""
        return sum(self._scores) / len(self._scores) if self._scores else None

    def advance(self, steps: int) -> None:
        """Move the progress bar."""
        self._bar.update(steps)

    def episode(
        self,
        step: int,
        updates: int,
        score: float,
        length: int,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Log a finished episode: its return in raw reward units, its length in steps, and more."""
        self._scores.append(score)
        self._postfix |= {"score": f"{score:g}", "mean": f"{self.mean_score:.4g}"}
        self._bar.set_postfix(self._postfix, refresh=False)
        told = {"score": score, "length": length, **(more or {})}
        self.write(step, updates, {f"episode/{name}": value for name, value in told.items()})

    def write(self, step: int, updates: int, metrics: Mapping[str, float]) -> None:
        """Log scalars at an environment step and update count."""
        if "updates_per_second" in metrics:
            self._postfix["upd/s"] = f"{metrics['updates_per_second']:.3g}"
            self._bar.set_postfix(self._postfix, refresh=False)
        line = {"step": step, "updates": updates, "time": round(self.elapsed, 3), **metrics}
        rest = memoryview(json.dumps(line).encode() + b"\n")
        with self._writing():
            while rest:  # a disk that fills up takes a part
                rest = rest[self._file.write(rest) :]
            if self._writer is not None:
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, frames: np.ndarray) -> None:
        """Show frames (T, H, W, 3) uint8 in TensorBoard, as an animated GIF among its images."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = frames.shape[1:3]
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=gif_bytes(frames, VIDEO_FPS),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        with self._writing():
            self._writer._get_file_writer().add_summary(summary, step)

    def close(self) -> None:
        """Close all outputs; what :meth:`sync` has not brought to a full disk may be lost."""
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what a full disk raises into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the log to {self._logdir}: {error.strerror}; with room there, the"
                " same command goes on from the last checkpoint"
            ) from error

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wait_for_later_name(logdir: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second in
    which they were made: a run resumed within that second waits for the next."""
    made = [int(path.name.split(".")[3]) for path in logdir.glob("events.out.tfevents.*")]
    time.sleep(min(1.0, max(0.0, max(made, default=0) + 1 - time.time())))


def _sync_wandb(log: LogConfig, logdir: Path, config: Mapping[str, Any]) -> Any:
    """A Weights & Biases run that mirrors the TensorBoard events; a resumed run continues it."""
    try:
        import wandb
    except ImportError:
        raise UsageError("--log.wandb needs the wandb package: pip install wandb") from None
    if not log.tensorboard:
        raise UsageError("--log.wandb mirrors TensorBoard: leave out --log.no-tensorboard")
    return wandb.init(
        project=log.wandb,
        name=logdir.name,
        id=f"{zlib.crc32(str(logdir.resolve()).encode()):08x}",
        resume="allow",
        config=dict(config),
        sync_tensorboard=True,
    )
