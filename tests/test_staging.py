"""Order of copies between host and GPU, on stand-ins for streams, events and memory.

A stand-in stream runs nothing: vector clocks tell which accesses to a buffer have an order that no
stream's speed can change. Two accesses of which one writes must have one.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from fastdreamer.staging import Prefetcher, WriteBack

Clock = dict[str, int]


class Race(AssertionError):
    """Two accesses to one buffer, of which one writes, without an order."""


class Actor:
    """The host or a stream: what it does is in order, and behind what its clock has seen."""

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name
        self.clock: Clock = {name: 0}

    def see(self, clock: Clock) -> None:
        for name, time in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def access(self, buffer: Buffer, write: bool) -> None:
        self.clock[self.name] += 1
        for name, time, wrote in buffer.accesses:
            if (write or wrote) and self.clock.get(name, 0) < time:
                raise Race(f"{self.name} and {name} on {buffer.name}")
        buffer.accesses.append((self.name, self.clock[self.name], write))

    # As torch.cuda.Stream

    def wait_event(self, event: Event) -> None:
        if self.machine.waits:
            self.see(event.clock)

    def wait_stream(self, stream: Actor) -> None:
        self.see(stream.clock)

    def record_event(self) -> Event:
        return Event(self.machine, dict(self.clock))

    def synchronize(self) -> None:
        self.machine.host.see(self.clock)


class Event:
    def __init__(self, machine: Machine, clock: Clock):
        self.machine, self.clock = machine, clock

    def synchronize(self) -> None:
        if self.machine.synchronizes:
            self.machine.host.see(self.clock)


class Buffer:
    """Memory that knows who was there."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name
        self.accesses: list[tuple[str, int, bool]] = []

    def copy_(self, other: Buffer, non_blocking: bool = False) -> None:
        assert non_blocking
        self.machine.enqueue(reads=[other], writes=[self])


class Machine:
    """A host with a GPU, and a replay as far as staging knows it."""

    columns = ("image", "deter")

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.waits = self.synchronizes = True
        self.host, self.main = Actor(self, "host"), Actor(self, "main stream")
        self.current = self.main
        self.written: list[Buffer] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Actor(self, "side stream"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch, "empty_like", self.empty_like)

    @contextmanager
    def stream(self, stream: Actor):
        before, self.current = self.current, stream
        yield
        self.current = before

    def enqueue(self, reads: list[Buffer], writes: list[Buffer]) -> None:
        """Work on the current stream, which starts behind what the host has done so far."""
        self.current.see(self.host.clock)
        for buffer in reads:
            self.current.access(buffer, write=False)
        for buffer in writes:
            self.current.access(buffer, write=True)

    def empty_like(self, buffer: Buffer, device, pin_memory: bool = False) -> Buffer:
        return Buffer(self, f"{buffer.name} on {device}")

    # As the replay

    def allocate(self, rows: int, length: int, pin_memory: bool) -> dict[str, Buffer]:
        assert pin_memory
        names = (*self.columns, "step_id")
        return {k: Buffer(self, f"staged {k}") for k in names}

    def draw(self, rows: int, length: int) -> np.ndarray:
        return np.zeros((rows, 2), np.int64)

    def reserve(self, index: np.ndarray, length: int) -> int:
        return 0

    def release(self, token: int) -> None:
        pass

    def gather(self, index: np.ndarray, length: int, out: dict[str, Buffer]) -> None:
        for buffer in out.values():
            self.host.access(buffer, write=True)

    def write(self, name: str, step_ids: torch.Tensor, values: Buffer) -> None:
        self.host.access(values, write=False)
        self.written.append(values)


def amend(self: WriteBack, batch: dict[str, Buffer]) -> None:
    """The accesses of `WriteBack.amend`, whose arithmetic stand-ins do not have."""
    for written in self._pending:
        reads = list(written.values.values())
        reads[0].machine.enqueue(reads=reads, writes=[batch["deter"]])


def train_2025(machine: Machine, steps: int = 8) -> None:
    """Updates in a row, each beside the write-back of the one before."""
    results = {k: Buffer(machine, f"result {k}") for k in ("deter", "stoch")}
    back = WriteBack(machine)
    with Prefetcher(machine, 2, 3, "cuda", threaded=False) as prefetcher:
        prefetcher.request()
        for left in reversed(range(steps)):
            batch = prefetcher.get()
            amend(back, batch)
            machine.enqueue([batch[k] for k in machine.columns], list(results.values()))
            back.start(torch.arange(3), results)
            if left:
                back.finish(keep=1)
                update = machine.main.clock["main stream"] - len(results)
                assert machine.host.clock.get("main stream", 0) < update  # it need not be done
                prefetcher.request()
        back.finish()
    assert len(machine.written) == 2 * steps


def train(machine: Machine, depth: int, steps: int = 8) -> None:
    """Updates on the main stream that read a batch and write static results, as a graph does."""
    results = {k: Buffer(machine, f"result {k}") for k in ("deter", "stoch")}
    back = WriteBack(machine)
    with Prefetcher(machine, 2, 3, "cuda", threaded=False, depth=depth) as prefetcher:
        for _ in range(depth):
            prefetcher.request()
        for _ in range(steps):
            back.finish()
            batch = prefetcher.get()
            prefetcher.request()
            inputs = [batch[k] for k in machine.columns]
            machine.enqueue(reads=inputs, writes=list(results.values()))
            back.start(torch.arange(3), results)
        back.finish()
    assert len(machine.written) == 2 * steps


@pytest.mark.parametrize("depth", [1, 2])
def test_no_buffer_is_overwritten_while_the_other_side_reads_it(monkeypatch, depth):
    train(Machine(monkeypatch), depth)


def test_a_write_back_beside_the_next_update_overwrites_nothing(monkeypatch):
    train_2025(Machine(monkeypatch))


@pytest.mark.parametrize("missing", ["waits", "synchronizes"])
@pytest.mark.parametrize("train", [train_2025, lambda machine: train(machine, 1)])
def test_without_the_events_it_would_be(monkeypatch, missing, train):
    machine = Machine(monkeypatch)
    setattr(machine, missing, False)
    with pytest.raises(Race):
        train(machine)


def test_copies_overlap_the_update_before(monkeypatch):
    """The copy of the next batch is not behind the update that is under way."""
    machine = Machine(monkeypatch)
    with Prefetcher(machine, 2, 3, "cuda", threaded=False) as prefetcher:
        prefetcher.request()
        first = prefetcher.get()
        prefetcher.request()
        machine.enqueue(reads=[first["image"]], writes=[])
        update = machine.main.clock["main stream"]
        side = prefetcher._stream
        assert side is not None and side.clock.get("main stream", 0) < update
        second = prefetcher.get()
        assert second["image"] is not first["image"]


class Written(list):
    """A replay that only lists what is written."""

    def write(self, name, step_ids, values):
        self.append((name, step_ids.tolist(), values.tolist()))


def test_values_are_written_where_finish_stands():
    replay, ids = Written(), torch.arange(2)
    back = WriteBack(replay)
    back.finish()
    back.start(ids, {"deter": torch.ones(2)})
    ids.zero_()  # the staging buffer they lie in is taken by the next batch
    back.start(ids, {"deter": torch.zeros(2)})
    assert not replay
    with pytest.raises(AssertionError, match="finish first"):
        back.start(ids, {})
    back.finish(keep=1)
    assert replay == [("deter", [0, 1], [1.0, 1.0])]
    back.finish()
    back.finish()
    assert replay[1:] == [("deter", [0, 0], [0.0, 0.0])]


def test_amended_batches_hold_the_last_unwritten_values():
    back = WriteBack(Written())
    ids = torch.tensor([[4, 5, 6], [6, 7, 8]])
    values = {"deter": torch.arange(12.0).view(2, 3, 2), "stoch": torch.arange(6).view(2, 3)}
    back.start(ids, values)
    batch = {
        "step_id": torch.tensor([[6, 7], [9, 4], [5, 6]]),
        "deter": torch.full((3, 2, 2), -1.0),
        "stoch": torch.full((3, 2), -1),
        "image": torch.zeros(3, 2),
    }
    back.amend(batch)
    assert batch["deter"][:, 0].tolist() == [[6.0, 7.0], [-1.0, -1.0], [2.0, 3.0]]
    assert batch["stoch"].tolist() == [[3, -1], [-1, -1], [1, -1]]
    assert (batch["deter"][:, 1] == -1).all() and not batch["image"].any()
