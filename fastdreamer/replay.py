"""Replay: one ring buffer per stream, exact windows, files that a crash cannot damage.

B batch, T time. A stream is one environment; every `add` appends one row to each of them.
Row `t` of stream `s` has the step id `t * num_streams + s`, unique for the life of the replay.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdreamer.columns import (
    Array,
    Batch,
    Column,
    allocate_batch,
    allocate_storage,
    check_batch,
    check_columns,
    tensor_bytes,
    value_bytes,
)
from fastdreamer.segments import (
    ReplayError,
    Segment,
    check_coverage,
    prune,
    read_segment,
    sync_directory,
    write_segment,
)

__all__ = ["Batch", "Column", "Replay", "ReplayError", "prune"]

FORMAT = 1


class Replay:
    """Rings of rows for `num_streams` parallel environments.

    All methods belong to one thread, except that a `Prefetcher` gathers reserved windows in
    another. The storage is allocated once; its pages are touched only as rows arrive.

    Args:
        columns: name to `Column`; the name `step_id` is taken.
        capacity: steps over all streams; each stream keeps `capacity // num_streams`.
        num_streams: parallel environments, all of the same length.
        seed: of the generator that draws the windows.
        pin_memory: page-lock the storage; without a CUDA device this does nothing.
        window: longest window that will be drawn, to fail early if the rings are too short.
        online: serve each stream's newest non-overlapping windows of `window` rows once, in the
            order they filled up, before uniform draws (recipe 2025).

    Raises:
        ValueError: for a bad column or a capacity too small for the window.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        capacity: int,
        num_streams: int,
        seed: int,
        pin_memory: bool = False,
        *,
        window: int = 1,
        online: bool = False,
    ) -> None:
        if num_streams < 1:
            raise ValueError(f"num_streams must be at least 1, got {num_streams}")
        check_columns(columns)
        self.columns = dict(columns)
        self.num_streams = num_streams
        self.stream_capacity = capacity // num_streams
        self._check_window(max(window, 1))
        self._head = 0  # rows ever added to each stream
        self._first = 0  # rows before this one were not loaded
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._online = window if online else 0
        self._fresh: deque[tuple[int, int]] = deque()  # windows not served yet: stream, start
        rows = num_streams * self.stream_capacity
        pinned = pin_memory and torch.cuda.is_available()
        self._rows = {
            n: allocate_storage(rows, c.row_bytes, pinned) for n, c in self.columns.items()
        }
        self._rings = {
            n: r.reshape(num_streams, self.stream_capacity, -1) for n, r in self._rows.items()
        }
        self._reserved: dict[int, int] = {}  # token -> first time that a gather still reads
        self._tokens = 0
        self._idle = threading.Condition()
        self._segments: list[Segment] = []
        self._directory: Path | None = None

    def __len__(self) -> int:
        """Stored rows over all streams."""
        return (self._head - self._oldest) * self.num_streams

    @property
    def steps(self) -> int:
        """Rows ever added over all streams."""
        return self._head * self.num_streams

    @property
    def _oldest(self) -> int:
        return max(self._first, self._head - self.stream_capacity)

    def add(self, rows: Mapping[str, Array | Tensor]) -> NDArray[np.int64]:
        """Append one row to every stream; waits for a gather that reads the rows it replaces.

        Args:
            rows: every column, (num_streams, *shape) of the column's dtype.

        Returns:
            Step ids, int64 (num_streams,).

        Raises:
            ValueError: for a missing or unknown column, a wrong shape or dtype; nothing is added.
        """
        if rows.keys() != self.columns.keys():
            raise ValueError(f"add expects columns {sorted(self.columns)}, got {sorted(rows)}")
        lead = (self.num_streams,)
        data = {n: value_bytes(n, self.columns[n], v, lead) for n, v in rows.items()}
        with self._idle:
            dropped = self._head - self.stream_capacity
            self._idle.wait_for(lambda: all(t > dropped for t in self._reserved.values()))
        slot = self._head % self.stream_capacity
        for name, value in data.items():
            self._rings[name][:, slot] = value
        self._head += 1
        if self._online and self._head % self._online == 0:
            start = self._head - self._online
            self._fresh.extend((stream, start) for stream in range(self.num_streams))
        return (self._head - 1) * self.num_streams + np.arange(self.num_streams, dtype=np.int64)

    def can_sample(self, length: int) -> bool:
        """Whether a window of `length` rows is stored; ValueError if none could ever be."""
        self._check_window(length)
        return self._head >= length

    def draw(self, batch_size: int, length: int) -> NDArray[np.int64]:
        """Draw windows: fresh ones if `online`, then uniformly over all stored, with replacement.

        Returns:
            int64 (B, 2): the stream and the time of the first row, counted from the first add.

        Raises:
            ValueError: if no window of this length is stored.
        """
        if not self.can_sample(length):
            raise ValueError(
                f"no window of {length} steps yet: each stream holds {self._head} rows"
            )
        fresh = self._take_fresh(batch_size) if length == self._online else []
        drawn = self.choose(self._rng, batch_size - len(fresh), length)
        return np.concatenate([np.array(fresh, np.int64).reshape(-1, 2), drawn])

    def choose(self, rng: np.random.Generator, count: int, length: int) -> NDArray[np.int64]:
        """Windows as of :meth:`draw`, uniformly by another generator: nothing here changes."""
        starts = self._head - self._oldest - length + 1
        pick = rng.integers(0, starts * self.num_streams, count, dtype=np.int64)
        return np.stack([pick // starts, self._oldest + pick % starts], axis=1)

    def _take_fresh(self, limit: int) -> list[tuple[int, int]]:
        """Up to `limit` windows of the online queue that are still stored."""
        taken: list[tuple[int, int]] = []
        while self._fresh and len(taken) < limit:
            window = self._fresh.popleft()
            if window[1] >= self._oldest:
                taken.append(window)
        return taken

    def gather(self, index: NDArray[np.int64], length: int, out: Batch | None = None) -> Batch:
        """Copy windows out of the rings.

        Args:
            index: int64 (B, 2) from `draw`.
            length: T.
            out: a batch from `allocate` to fill and return; new memory if None.

        Returns:
            Every column as (B, T, *shape), and `step_id`, int64 (B, T).

        Raises:
            ValueError: for a window that is not wholly stored, or an unfit `out`.
        """
        index = np.asarray(index)
        self._check_index(index, length)
        batch = self.allocate(len(index), length) if out is None else out
        if out is not None:
            check_batch(self.columns, out, (len(index), length))
        times = index[:, 1:] + np.arange(length)  # (B, T)
        rows = (index[:, :1] * self.stream_capacity + times % self.stream_capacity).reshape(-1)
        for name, source in self._rows.items():
            target = tensor_bytes(self.columns[name], batch[name])
            # clip (the indices are in range) lets NumPy write to `out` without a buffer. As fast
            # as index_select on one core, without a second OpenMP pool beside the trainer's.
            np.take(source, rows, axis=0, out=target, mode="clip")
        batch["step_id"].numpy()[:] = times * self.num_streams + index[:, :1]
        return batch

    def sample(self, batch_size: int, length: int) -> Batch:
        """`gather` what `draw` gives."""
        return self.gather(self.draw(batch_size, length), length)

    def allocate(self, batch_size: int, length: int, pin_memory: bool = False) -> Batch:
        """An uninitialised batch in host memory, shaped as `gather` returns it."""
        return allocate_batch(self.columns, (batch_size, length), pin_memory)

    def write(self, name: str, step_ids: Array | Tensor, values: Array | Tensor) -> None:
        """Rewrite rows of a mutable column; waits for gathers under way.

        Rows that the ring has dropped meanwhile are skipped; of two values for one id the last
        counts. Values on a GPU are copied to the host first, which synchronises.

        Args:
            name: a mutable column.
            step_ids: int64, any shape, such as (B, T).
            values: step_ids.shape + the column's shape, of the column's dtype.

        Raises:
            ValueError: for an immutable or unknown column, a wrong shape or dtype, an id that no
                add has returned.
        """
        if name not in self.columns or not self.columns[name].mutable:
            mutable = sorted(n for n, c in self.columns.items() if c.mutable)
            raise ValueError(f"column {name!r} is not mutable; mutable columns: {mutable}")
        ids = step_ids.cpu().numpy() if isinstance(step_ids, Tensor) else np.asarray(step_ids)
        if ids.dtype != np.int64:
            raise ValueError(f"step_ids must be int64, got {ids.dtype}")
        data = value_bytes(name, self.columns[name], values, ids.shape)
        ids = ids.reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.steps:
            raise ValueError(f"step ids must be in [0, {self.steps}): [{ids.min()}, {ids.max()}]")
        kept = ids >= self._oldest * self.num_streams
        times, streams = np.divmod(ids[kept], self.num_streams)
        rows = streams * self.stream_capacity + times % self.stream_capacity
        self._wait_idle()
        self._rows[name][rows] = data if kept.all() else data[kept]

    def reserve(self, index: NDArray[np.int64], length: int) -> int:
        """Keep windows as they are until `release`, for a gather in another thread."""
        self._check_index(index, length)
        with self._idle:
            self._tokens += 1
            self._reserved[self._tokens] = int(index[:, 1].min()) if len(index) else self._head
            return self._tokens

    def release(self, token: int) -> None:
        """End a reservation; callable from any thread."""
        with self._idle:
            self._reserved.pop(token)
            self._idle.notify_all()

    def save(self, directory: Path | str) -> dict[str, Any]:
        """Write what is new since the last save and describe the whole replay.

        Files appear complete or not at all and are never changed, so a crash leaves older
        manifests loadable. Mutable columns are written whole.

        Returns:
            The manifest, ready for JSON, for `load` and `prune`. Batches drawn but not used yet
            are not in it: see `Prefetcher.state_dict`.
        """
        directory = Path(directory).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        known = self._segments if directory == self._directory else []
        if not all((directory / s["file"]).exists() for s in known):
            known = []
        segments = [s for s in known if s["first"] + s["rows"] > self._oldest]
        first = segments[-1]["first"] + segments[-1]["rows"] if segments else self._oldest
        if first < self._head:
            segments.append(self._write_rows(directory, first, mutable=False))
        snapshot = None
        if self._names(mutable=True):
            snapshot = self._write_rows(directory, self._oldest, mutable=True)
        sync_directory(directory)
        self._segments, self._directory = segments, directory
        return self._layout() | {
            "stream_capacity": self.stream_capacity,
            "oldest": self._oldest,
            "head": self._head,
            "rng": self._rng.bit_generator.state,
            "fresh": [list(window) for window in self._fresh],
            "segments": [dict(s) for s in segments],
            "mutable": snapshot,
        }

    def load(self, directory: Path | str, manifest: Mapping[str, Any]) -> None:
        """Restore the rows, the counters and the generator, bit for bit, from `save`.

        A replay of another capacity takes the newest rows that it can hold.

        Raises:
            ReplayError: if the manifest does not fit (nothing is changed), or a file is missing,
                truncated or corrupted (the replay is left empty).
        """
        directory = Path(directory).resolve()
        oldest, segments, snapshots = self._check_manifest(manifest)
        self._wait_idle()
        self._head = self._first = 0
        self._segments, self._directory = [], None
        for segment in segments:
            read_segment(directory, segment, self._load_spans(segment, oldest, mutable=False))
        for segment in snapshots:
            read_segment(directory, segment, self._load_spans(segment, oldest, mutable=True))
        self._rng.bit_generator.state = manifest["rng"]
        self._fresh = deque((stream, start) for stream, start in manifest["fresh"])
        self._head, self._first = manifest["head"], oldest
        self._segments, self._directory = [dict(s) for s in segments], directory

    def _check_manifest(
        self, manifest: Mapping[str, Any]
    ) -> tuple[int, list[Segment], list[Segment]]:
        """The oldest row, the segments and the snapshot (none or one) of a fitting manifest."""
        layout = self._layout()
        fields = {"stream_capacity", "oldest", "head", "rng", "fresh", "segments", "mutable"}
        missing = (layout.keys() | fields) - manifest.keys()
        if missing:
            raise ReplayError(f"the replay manifest lacks {sorted(missing)}")
        for key, value in layout.items():
            if manifest[key] != value:
                raise ReplayError(f"saved {key} is {manifest[key]}, this replay has {value}")
        if (manifest["mutable"] is not None) != bool(self._names(mutable=True)):
            raise ReplayError("the replay manifest lacks the mutable columns, or has some too many")
        snapshots = [manifest["mutable"]] if manifest["mutable"] is not None else []
        oldest = max(manifest["oldest"], manifest["head"] - self.stream_capacity)
        capacity = manifest["stream_capacity"]
        for segments in [manifest["segments"]] + ([snapshots] if snapshots else []):
            check_coverage(segments, oldest, manifest["head"], capacity)
        return oldest, manifest["segments"], snapshots

    def _names(self, mutable: bool) -> list[str]:
        return sorted(n for n, c in self.columns.items() if c.mutable == mutable)

    def _layout(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "num_streams": self.num_streams,
            "columns": {n: c.describe() for n, c in sorted(self.columns.items())},
        }

    def _write_rows(self, directory: Path, first: int, mutable: bool) -> Segment:
        """Write the rows from `first` to the head."""
        rings = [ring for name in self._names(mutable) for ring in self._rings[name]]
        spans = (span for ring in rings for span in self._spans(ring, first, self._head))
        return write_segment(directory, first, self._head - first, spans)

    def _load_spans(self, segment: Segment, oldest: int, mutable: bool) -> list[Array]:
        """Where the rows of a file belong; those before `oldest` go to scratch memory."""
        start, end = segment["first"], segment["first"] + segment["rows"]
        kept = min(max(start, oldest), end)
        spans: list[Array] = []
        for ring in (ring for name in self._names(mutable) for ring in self._rings[name]):
            spans.append(np.empty((kept - start, ring.shape[1]), np.uint8))
            spans.extend(self._spans(ring, kept, end))
        return spans

    def _spans(self, ring: Array, first: int, end: int) -> Iterator[Array]:
        """Storage of rows [first, end) of one stream: one contiguous span, or two if wrapped."""
        slot, rows = first % self.stream_capacity, end - first
        yield ring[slot : slot + rows]
        yield ring[: max(0, slot + rows - self.stream_capacity)]

    def _wait_idle(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._reserved)

    def _check_window(self, length: int) -> None:
        if not 1 <= length <= self.stream_capacity:
            raise ValueError(
                f"a window of {length} steps does not fit: the capacity is"
                f" {self.stream_capacity} steps for each of {self.num_streams} streams"
            )

    def _check_index(self, index: Array, length: int) -> None:
        """ValueError unless all windows of the (B, 2) index are wholly stored."""
        if index.ndim != 2 or index.shape[1] != 2 or index.dtype != np.int64:
            raise ValueError(f"index must be int64 (B, 2), got {index.dtype} {index.shape}")
        self._check_window(length)
        stream, start = index.T
        stored = (start >= self._oldest) & (start + length <= self._head)
        bad = ~(stored & (stream >= 0) & (stream < self.num_streams))
        if bad.any():
            stream, start = index[bad][0]
            raise ValueError(f"stream {stream} does not hold the window at {start} of {length}")
