# mypy: disable-error-code=no-untyped-def
"""Launches Triton's kernels, or records the launches, to compile them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """A kernel with all that its compilation depends on."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Run a kernel over a grid of programs; an empty grid runs nothing.

    Args:
        arguments: of the kernel, in its order. The first is a tensor, on whose device it runs.
        constants: the kernel's ``tl.constexpr`` arguments.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](
            *arguments,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,  # the default, of which some versions warn where it is not said
            **constants,
        )


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of running them; the tensors may be on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


@triton.jit
def rows_and_columns(N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program's rows (BLOCK_N, 1), all columns (1, BLOCK_K), and which of both there are."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    return n, k, (n < N) & (k < K)
