"""CUDA graphs: a function of tensors, captured once, then replayed as one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Inputs = Mapping[str, Tensor]

WARMUP = 2
"""Runs before a capture: they compile and choose algorithms."""


@contextmanager
def preserved(
    state: Callable[[], Iterable[Tensor]], generators: Sequence[torch.Generator]
) -> Iterator[None]:
    """Put the tensors that ``state`` gives, and generators, back as they were, in place."""
    before = [(x, x.detach().clone()) for x in state()]
    drawn = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
        for generator, at in zip(generators, drawn, strict=True):
            generator.set_state(at)


class Graphed(Generic[T]):
    """A function of named tensors on a GPU, captured at the first call for each set of shapes.

    What it changes must stay at its place from then on: load a checkpoint before the first call.

    Args:
        function: only enqueues work on the current stream, and does the same for equal shapes.
        state: the tensors that it changes and reads again.
        generators: which it draws from; none may be in another graph.
    """

    def __init__(
        self,
        function: Callable[[Inputs], T],
        state: Callable[[], Iterable[Tensor]] = tuple,
        generators: Sequence[torch.Generator] = (),
    ):
        self._function, self._state, self._generators = function, state, generators
        self._inputs: dict[str, Tensor] = {}
        self._outputs: T | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Inputs) -> T:
        """The function's results, in memory that the next call overwrites.

        ``inputs`` are copied in stream order; their memory is free for work behind this call.
        """
        if _layout(inputs) != _layout(self._inputs):
            self._capture(inputs)
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        assert self._graph is not None and self._outputs is not None
        self._graph.replay()
        return self._outputs

    def _capture(self, inputs: Inputs) -> None:
        self._graph = self._outputs = None  # frees the last one's memory and its generators
        self._inputs, static = {}, {k: v.clone() for k, v in inputs.items()}
        self.rehearse(static)
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Only this thread is held to what a capture allows: another one feeds the next batch.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = self._function(static)
        self._graph, self._inputs = graph, static

    def rehearse(self, inputs: Inputs) -> None:
        """Run the function on a side stream, as captures want it, and undo what it changed."""
        with _side_stream(inputs), preserved(self._state, self._generators):
            for _ in range(WARMUP):
                self._function(inputs)


def _layout(tensors: Inputs) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {k: (v.shape, v.dtype) for k, v in tensors.items()}


@contextmanager
def _side_stream(inputs: Inputs) -> Iterator[None]:
    """Another stream of the inputs' GPU, behind and before the current one's work."""
    device = next(iter(inputs.values())).device
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
