# mypy: disable-error-code=no-untyped-def
"""Two-hot cross-entropy and mean in Triton, several rows to a program."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import twohot as plain
from .launch import launch, rows_and_columns
from .register import serve

TILE = 2048  # elements of a program's block, where a row is not longer


@triton.jit
def symlog(x):
    """sign(x) ln(1 + |x|), without the rounding of 1 + |x|."""
    size = tl.abs(x)
    above = 1 + size
    rounding = tl.where(above < 16777216.0, (size - (above - 1)) / above, 0)
    y = tl.log(above) + rounding
    return tl.where(x < 0, -y, y)


@triton.jit
def symexp(x):
    """sign(x) (exp|x| - 1), by its series where x is small."""
    size = tl.abs(x)
    series = 1.0
    for i in tl.static_range(8, 1, -1):
        series = 1 + series * size / i
    y = tl.where(size < 0.5, series * size, tl.exp(size) - 1)
    return tl.where(x < 0, -y, y)


@triton.jit
def place(target_ptr, bins_ptr, bins, n, m, N, K, M: tl.constexpr, SYMLOG: tl.constexpr):
    """The bins below and above target m of each row, the weight of the one below; NaN for NaN."""
    y = tl.load(target_ptr + n * M + m, n < N, other=0).to(tl.float32)
    if SYMLOG:
        y = symlog(y)
    count = tl.sum((bins <= y).to(tl.int32), 1, keep_dims=True)
    below, above = tl.maximum(count - 1, 0), tl.minimum(count, K - 1)
    to_below = y - tl.load(bins_ptr + below)
    to_above = tl.load(bins_ptr + above) - y
    inside = (count > 0) & (count < K)
    weight = tl.where(inside, to_above / (to_below + to_above), tl.where(y == y, 1.0, y))
    return below, above, weight


# loss = -sum over targets of w logp[below] + (1 - w) logp[above]; stats = max, sum e^(x - max)
@triton.jit
def twohot_loss_fwd_kernel(
    logits_ptr, target_ptr, bins_ptr, loss_ptr, stats_ptr, N, K, M: tl.constexpr,
    SYMLOG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    bins = tl.load(bins_ptr + k, k < K, other=float("nan"))  # below no target
    x = tl.load(logits_ptr + n * K + k, inside, other=float("-inf"))
    top = tl.max(x, 1, keep_dims=True)
    total = tl.sum(tl.exp(x - top), 1, keep_dims=True)
    scale = top + tl.log(total)
    loss = tl.zeros([BLOCK_N, 1], tl.float32)
    for m in tl.static_range(M):
        below, above, weight = place(target_ptr, bins_ptr, bins, n, m, N, K, M, SYMLOG)
        x_below = tl.load(logits_ptr + n * K + below, n < N, other=0)
        x_above = tl.load(logits_ptr + n * K + above, n < N, other=0)
        loss -= weight * (x_below - scale) + (1 - weight) * (x_above - scale)
    tl.store(loss_ptr + n, loss, n < N)
    tl.store(stats_ptr + 2 * n, top, n < N)
    tl.store(stats_ptr + 2 * n + 1, total, n < N)


# dx = dloss sum over targets of softmax - (w at below, 1 - w at above)
@triton.jit
def twohot_loss_bwd_kernel(
    dloss_ptr, logits_ptr, target_ptr, bins_ptr, stats_ptr, dlogits_ptr, N, K, M: tl.constexpr,
    SYMLOG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    bins = tl.load(bins_ptr + k, k < K, other=float("nan"))  # below no target
    x = tl.load(logits_ptr + n * K + k, inside, other=0)
    dloss = tl.load(dloss_ptr + n, n < N, other=0)
    top = tl.load(stats_ptr + 2 * n, n < N, other=0)
    softmax = tl.exp(x - top) / tl.load(stats_ptr + 2 * n + 1, n < N, other=1)
    dx = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for m in tl.static_range(M):
        below, above, weight = place(target_ptr, bins_ptr, bins, n, m, N, K, M, SYMLOG)
        dx += softmax * (weight + (1 - weight))  # 1, or NaN: a NaN target's whole row
        dx -= tl.where(k == below, weight, 0) + tl.where(k == above, 1 - weight, 0)
    tl.store(dlogits_ptr + n * K + k, dloss * dx, inside)


# Over pairs of symmetric bins, j above the middle and j below it: equal logits give exactly 0.
@triton.jit
def twohot_mean_fwd_kernel(
    logits_ptr, bins_ptr, mean_ptr, N, K, SYMLOG: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    middle = K // 2
    n, j, inside = rows_and_columns(N, middle, BLOCK_N, BLOCK_K // 2)
    row = logits_ptr + n * K + middle
    high = tl.load(row + 1 + j, inside, other=float("-inf"))
    low = tl.load(row - 1 - j, inside, other=float("-inf"))
    mid = tl.load(row, n < N, other=0)
    top = tl.maximum(tl.max(tl.maximum(high, low), 1, keep_dims=True), mid)
    high, low = tl.exp(high - top), tl.exp(low - top)
    total = tl.sum(high + low, 1, keep_dims=True) + tl.exp(mid - top)
    bins = tl.load(bins_ptr + middle + 1 + j, j < middle, other=0)
    mean = tl.sum((high - low) * bins, 1, keep_dims=True) / total
    if SYMLOG:
        mean = symexp(mean)
    tl.store(mean_ptr + n, mean, n < N)


def twohot_loss(logits: Tensor, target: Tensor, layout: str = "symlog") -> tuple[Tensor, Tensor]:
    outputs = plain._loss_fake(logits, target, layout)
    inputs = (logits, target, _bins(logits, layout))
    M = plain._targets(logits, target)
    _launch(twohot_loss_fwd_kernel, logits.shape, inputs, outputs, layout, M=M)
    return outputs


def twohot_loss_backward(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, layout: str
) -> Tensor:
    dlogits = plain._loss_backward_fake(dloss, logits, target, stats, layout)
    inputs = (dloss, logits, target, _bins(logits, layout), stats)
    M = plain._targets(logits, target)
    _launch(twohot_loss_bwd_kernel, logits.shape, inputs, (dlogits,), layout, M=M)
    return dlogits


def twohot_mean(logits: Tensor, layout: str = "symlog") -> Tensor:
    mean = plain._mean_fake(logits, layout)
    inputs = (logits, _bins(logits, layout))
    _launch(twohot_mean_fwd_kernel, logits.shape, inputs, (mean,), layout)
    return mean


def _bins(logits: Tensor, layout: str) -> Tensor:
    return plain.bins(layout, logits.shape[-1], logits.dtype, logits.device)


def _launch(
    kernel: triton.JITFunction,
    shape: torch.Size,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    layout: str,
    **constants: int,
) -> None:
    """``shape`` (..., K) of the logits."""
    *lead, K = shape
    N, bins = math.prod(lead), triton.next_power_of_2(K + 1)  # K is odd, and may be 1
    rows = max(1, TILE // bins)
    launch(
        kernel,
        (triton.cdiv(N, rows),),
        *(x.contiguous() for x in inputs),
        *outputs,
        N,
        K,
        SYMLOG=layout == "symlog",
        BLOCK_N=rows,
        BLOCK_K=bins,
        **constants,
    )


def presets() -> None:
    """255 bins; one target, and the two of a critic."""
    logits, row = (torch.empty(shape, device="meta") for shape in ((1024, 255), (1024,)))
    for layout in ("symlog", "symexp"):
        for M in (1, 2):
            target = torch.empty((1024, M), device="meta")
            _, stats = twohot_loss(logits, target, layout)
            twohot_loss_backward(row, logits, target, stats, layout)
        twohot_mean(logits, layout)


serve("twohot_loss", twohot_loss, plain._loss_cpu)
serve("twohot_loss_backward", twohot_loss_backward, plain._loss_backward_cpu)
serve("twohot_mean", twohot_mean, plain._mean_cpu)
serve("twohot_mean_backward", plain._mean_backward_cpu)  # PyTorch's: no loss needs it
