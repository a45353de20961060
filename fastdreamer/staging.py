"""Staging: a background thread assembles batches while the trainer does other work.

The thread changes time, never results: windows are drawn by `request` in the caller's order, and
the rows they need stay as they are until they have been copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdreamer.columns import Batch, check_batch
from fastdreamer.replay import Replay


@dataclass
class _Slot:
    """One staging buffer and, on a GPU, its device copy with the events that guard them."""

    host: Batch
    device: Batch
    copied: torch.cuda.Event | None = None
    """The copy to the device is done: the batch is ready, the host buffer free."""
    released: torch.cuda.Event | None = None
    """The caller's stream is past its last use of the device buffers."""


class Prefetcher:
    """Batches of one shape, drawn by `request`, received in the same order by `get`.

    All methods belong to the thread that adds to the replay. While a batch is assembled, `add`
    waits only before it replaces one of its rows, `write` and `load` wait until it is done; so a
    batch holds what the replay held at its `request`.

    Args:
        replay: read under reservation.
        batch_size: B.
        length: T.
        device: where batches go. On a GPU they are copied from pinned memory on a side stream,
            and `get` makes the current stream wait for the copy, without blocking the host.
        threaded: False assembles inside `request`, with the same results.
        depth: how many batches may be requested ahead; depth + 1 buffers are allocated.
    """

    def __init__(
        self,
        replay: Replay,
        batch_size: int,
        length: int,
        device: torch.device | str = "cpu",
        *,
        threaded: bool = True,
        depth: int = 1,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._replay = replay
        self._shape = (batch_size, length)
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._depth = depth
        self._slots = [self._new_slot() for _ in range(depth + 1)]
        self._stream = _side_stream(self._device) if self._cuda else None
        self._closed = False
        self._pool = ThreadPoolExecutor(1, "fastdreamer-replay") if threaded else None
        self._pending: deque[tuple[_Slot, Future[None]]] = deque()
        self._held: _Slot | None = None
        self._requests = 0

    @property
    def pending(self) -> int:
        """Batches requested and not received yet."""
        return len(self._pending)

    def request(self) -> None:
        """Draw the next batch now and start to assemble it.

        Raises:
            ValueError: if the replay holds no such window.
            RuntimeError: if `depth` batches are pending already, or after `close`.
        """
        if self._closed:
            raise RuntimeError("request() after close()")
        if len(self._pending) >= self._depth:
            raise RuntimeError(f"{len(self._pending)} batches are pending: call get() first")
        batch_size, length = self._shape
        index = self._replay.draw(batch_size, length)
        token = self._replay.reserve(index, length)
        self._submit(partial(self._gather, index, token))

    def get(self) -> Batch:
        """Wait for the oldest requested batch.

        Returns:
            Every column as (B, T, *shape) on the device; `step_id`, int64 (B, T), stays on the
            host, where `Replay.write` wants it. The next `get` takes the memory back.

        Raises:
            RuntimeError: if nothing was requested.
        """
        if not self._pending:
            raise RuntimeError("get() needs a request() before it")
        slot, future = self._pending.popleft()
        future.result()
        if self._cuda:
            current = torch.cuda.current_stream(self._device)
            if self._held is not None:
                self._held.released = current.record_event()
            assert slot.copied is not None
            current.wait_event(slot.copied)
        self._held = slot
        return dict(slot.device)

    def wait(self) -> None:
        """Block until pending batches are assembled: call it before a CUDA graph is captured."""
        for slot, future in self._pending:
            future.result()
            if slot.copied is not None:
                slot.copied.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Pending batches, to be saved with the replay, whose generator is already past them."""
        self.wait()
        batches = [{n: t.clone() for n, t in slot.host.items()} for slot, _ in self._pending]
        return {"pending": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what is pending and take over the batches of `state_dict`.

        Raises:
            ValueError: if there are more of them than `depth`, or their shapes do not fit.
        """
        batches = state["pending"]
        if len(batches) > self._depth:
            raise ValueError(f"{len(batches)} pending batches do not fit depth {self._depth}")
        for batch in batches:
            check_batch(self._replay.columns, batch, self._shape)
        while self._pending:
            self.get()
        for batch in batches:
            self._submit(partial(self._restore, batch))

    def close(self) -> None:
        """Finish pending work and end the thread; pending batches can still be received."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_slot(self) -> _Slot:
        host = self._replay.allocate(*self._shape, pin_memory=self._cuda)
        device: Batch = host
        if self._cuda:
            device = {n: torch.empty_like(t, device=self._device) for n, t in host.items()}
            device["step_id"] = host["step_id"]
        return _Slot(host, device)

    def _submit(self, fill: Callable[[_Slot], None]) -> None:
        """Run `fill` on the next buffer, which no pending or held batch uses, then copy it."""
        slot = self._slots[self._requests % len(self._slots)]
        self._requests += 1
        if self._pool is not None:
            future = self._pool.submit(self._fill, slot, fill)
        else:
            future = Future()
            self._fill(slot, fill)
            future.set_result(None)
        self._pending.append((slot, future))

    def _fill(self, slot: _Slot, fill: Callable[[_Slot], None]) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()
        fill(slot)
        if self._stream is None:
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if slot.released is not None:
                self._stream.wait_event(slot.released)
            for name, tensor in slot.host.items():
                if name != "step_id":
                    slot.device[name].copy_(tensor, non_blocking=True)
            slot.copied = self._stream.record_event()

    def _gather(self, index: NDArray[np.int64], token: int, slot: _Slot) -> None:
        try:
            self._replay.gather(index, self._shape[1], out=slot.host)
        finally:
            self._replay.release(token)

    @staticmethod
    def _restore(batch: Batch, slot: _Slot) -> None:
        for name, tensor in batch.items():
            slot.host[name].copy_(tensor)


class WriteBack:
    """Latents on their way from an update into the replay, beside the next update.

    `start` only enqueues a copy to pinned memory behind the work that computes them; `finish`
    waits for it and writes. A batch that was gathered in between is put right by `amend`, on its
    device: so batches hold what they would if each update were written at once.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._host: list[Batch] = [{}, {}]  # of the last two on a GPU, in turn
        self._pending: deque[_Written] = deque()

    def start(self, step_ids: torch.Tensor, values: Batch) -> None:
        """Begin to write `values`, {column: (*step_ids.shape, *shape)}; at most one is unfinished.

        Their memory may be taken by work behind the next `amend`, that of the ids at once.
        """
        assert len(self._pending) < 2, "finish first"
        copied = None
        if on_gpu := [v.device for v in values.values() if v.is_cuda]:
            self._host.reverse()
            host = self._host[0]
            for name, value in values.items():
                if name not in host:
                    host[name] = torch.empty_like(value, device="cpu", pin_memory=True)
                host[name].copy_(value, non_blocking=True)
            copied = torch.cuda.current_stream(on_gpu[0]).record_event()
        else:
            host = {name: value.clone() for name, value in values.items()}
        self._pending.append(_Written(step_ids.clone(), values, host, copied))

    def finish(self, keep: int = 0) -> None:
        """Write what was started, but for the last `keep`."""
        while len(self._pending) > keep:
            written = self._pending[0]
            if written.copied is not None:
                written.copied.synchronize()
            for name, value in written.host.items():
                self._replay.write(name, written.step_ids, value)
            self._pending.popleft()

    def amend(self, batch: Batch) -> None:
        """Give the first step of each row, which is all that an update reads, its unwritten values.

        In place. Of two values for one id the last counts, as in `Replay.write`.
        """
        assert len(self._pending) < 2, "gathered before the last but one was written"
        for written in self._pending:
            same = written.step_ids.flatten() == batch["step_id"][:, :1]  # (B, ids)
            last = torch.where(same, torch.arange(same.shape[1]), -1).amax(1)
            for name, value in written.values.items():
                index = _moved(last, value.device)
                found = (index >= 0).view(-1, *[1] * (value.ndim - 2))
                new = value.flatten(0, 1)[index.clamp(min=0)]
                batch[name][:, 0] = torch.where(found, new, batch[name][:, 0])


@dataclass(frozen=True)
class _Written:
    """Values of one update, where it left them and on the host."""

    step_ids: torch.Tensor
    values: Batch
    host: Batch
    copied: torch.cuda.Event | None


def _moved(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for it."""
    if device.type == "cuda":
        index = index.pin_memory()
    return index.to(device, non_blocking=True)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that runs after what the current one may still do in recycled memory."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
