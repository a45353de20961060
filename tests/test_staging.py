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


@pytest.mark.parametrize("missing", ["waits", "synchronizes"])
def test_without_the_events_it_would_be(monkeypatch, missing):
    machine = Machine(monkeypatch)
    setattr(machine, missing, False)
    with pytest.raises(Race):
        train(machine, 1)


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


def test_on_the_host_values_are_written_where_finish_stands():
    calls = []

    class Replay:
        def write(self, *args):
            calls.append(args)

    back, ids = WriteBack(Replay()), torch.arange(2)
    back.finish()
    back.start(ids, {"deter": torch.ones(2, 3)})
    ids.zero_()  # the staging buffer they lie in is taken by the next batch
    assert not calls
    back.finish()
    back.finish()
    ((name, written, values),) = calls
    assert name == "deter" and written.tolist() == [0, 1] and torch.equal(values, torch.ones(2, 3))
