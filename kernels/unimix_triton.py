# mypy: disable-error-code=no-untyped-def
"""Unimixed categoricals in Triton, many rows to a program. p = exp(logp) throughout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import unimix as plain
from .launch import launch, rows_and_columns
from .register import serve

TILE = 2048  # elements of a program's block, where a row is not longer


# logp = ln(floor + keep softmax(x)), floor = mix / K, keep = 1 - mix
@triton.jit
def unimix_fwd_kernel(
    x_ptr, logp_ptr, N, K, floor, keep, MIXED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    x = tl.load(x_ptr + n * K + k, inside, other=float("-inf"))
    x -= tl.max(x, 1, keep_dims=True)
    e = tl.exp(x)
    total = tl.sum(e, 1, keep_dims=True)
    logp = tl.log(e * (keep / total) + floor) if MIXED else x - tl.log(total)
    tl.store(logp_ptr + n * K + k, logp, inside)


# share = p - floor = keep softmax;  dx = share (dlogp / p - unit sum(share dlogp / p)),
# unit = 1 / keep
@triton.jit
def unimix_bwd_kernel(
    dlogp_ptr, logp_ptr, dx_ptr, N, K, floor, unit, MIXED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    d = tl.load(dlogp_ptr + n * K + k, inside, other=0)
    p = tl.exp(tl.load(logp_ptr + n * K + k, inside, other=0))
    share = p - floor
    if MIXED:
        d *= share / p
    along = tl.sum(d, 1, keep_dims=True) * unit
    tl.store(dx_ptr + n * K + k, d - share * along, inside)


@triton.jit
def entropy_fwd_kernel(logp_ptr, nats_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    logp = tl.load(logp_ptr + n * K + k, inside, other=0)
    tl.store(nats_ptr + n, -tl.sum(tl.exp(logp) * logp, 1, keep_dims=True), n < N)


@triton.jit
def entropy_bwd_kernel(
    dnats_ptr, logp_ptr, dlogp_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    logp = tl.load(logp_ptr + n * K + k, inside, other=0)
    dnats = tl.load(dnats_ptr + n, n < N, other=0)
    tl.store(dlogp_ptr + n * K + k, -dnats * tl.exp(logp) * (logp + 1), inside)


# sum(p (logp - logq)), once or to two tensors
@triton.jit
def kl_fwd_kernel(
    logp_ptr, logq_ptr, nats_ptr, again_ptr, N, K, TWICE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    logp = tl.load(logp_ptr + n * K + k, inside, other=0)
    logq = tl.load(logq_ptr + n * K + k, inside, other=0)
    nats = tl.sum(tl.exp(logp) * (logp - logq), 1, keep_dims=True)
    tl.store(nats_ptr + n, nats, n < N)
    if TWICE:
        tl.store(again_ptr + n, nats, n < N)


# dlogp = dp p (logp - logq + 1),  dlogq = -dq p
@triton.jit
def kl_bwd_kernel(
    dp_ptr, dq_ptr, logp_ptr, logq_ptr, dlogp_ptr, dlogq_ptr, N, K, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    logp = tl.load(logp_ptr + n * K + k, inside, other=0)
    logq = tl.load(logq_ptr + n * K + k, inside, other=0)
    dp, dq = tl.load(dp_ptr + n, n < N, other=0), tl.load(dq_ptr + n, n < N, other=0)
    p = tl.exp(logp)
    tl.store(dlogp_ptr + n * K + k, dp * p * (logp - logq + 1), inside)
    tl.store(dlogq_ptr + n * K + k, -dq * p, inside)


# One-hot of the first largest logp + noise; a NaN is larger than any number, as in PyTorch.
@triton.jit
def sample_fwd_kernel(
    logp_ptr, noise_ptr, onehot_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    v = tl.load(logp_ptr + n * K + k, inside, other=float("-inf"))
    v += tl.load(noise_ptr + n * K + k, inside, other=0)
    largest = tl.where(v == tl.max(v, 1, keep_dims=True), BLOCK_K, 2 * BLOCK_K)
    rank = k + tl.where(v == v, largest, 0)
    first = tl.min(rank, 1, keep_dims=True) % BLOCK_K
    tl.store(onehot_ptr + n * K + k, (k == first).to(tl.float32), inside)


# The straight-through gradient: dlogp = donehot p
@triton.jit
def sample_bwd_kernel(
    donehot_ptr, logp_ptr, dlogp_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n, k, inside = rows_and_columns(N, K, BLOCK_N, BLOCK_K)
    donehot = tl.load(donehot_ptr + n * K + k, inside)
    logp = tl.load(logp_ptr + n * K + k, inside)
    tl.store(dlogp_ptr + n * K + k, donehot * tl.exp(logp), inside)


def unimix(logits: Tensor, mix: float = 0.01) -> Tensor:
    logp = plain._unimix_fake(logits, mix)
    K = logits.shape[-1]
    _launch(unimix_fwd_kernel, (logits,), (logp,), mix / K, 1 - mix, MIXED=mix != 0)
    return logp


def unimix_backward(dlogp: Tensor, logp: Tensor, mix: float) -> Tensor:
    dx = plain._unimix_backward_fake(dlogp, logp, mix)
    floor, unit = mix / logp.shape[-1], 1 / (1 - mix) if mix < 1 else 0.0
    _launch(unimix_bwd_kernel, (dlogp, logp), (dx,), floor, unit, MIXED=mix != 0)
    return dx


def entropy(logp: Tensor) -> Tensor:
    nats = plain._entropy_fake(logp)
    _launch(entropy_fwd_kernel, (logp,), (nats,))
    return nats


def entropy_backward(dentropy: Tensor, logp: Tensor) -> Tensor:
    dlogp = plain._entropy_backward_fake(dentropy, logp)
    _launch(entropy_bwd_kernel, (dentropy, logp), (dlogp,))
    return dlogp


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    nats = plain._kl_fake(logp, logq)
    _launch(kl_fwd_kernel, (logp, logq), (nats, nats), TWICE=False)
    return nats


def balanced_kl(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    nats = plain._balanced_kl_fake(logp, logq)
    _launch(kl_fwd_kernel, (logp, logq), nats, TWICE=True)
    return nats


def kl_backward(dp: Tensor, dq: Tensor, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    grads = plain._kl_backward_fake(dp, dq, logp, logq)
    _launch(kl_bwd_kernel, (dp, dq, logp, logq), grads)
    return grads


def sample(logp: Tensor, noise: Tensor) -> Tensor:
    onehot = plain._sample_fake(logp, noise)
    _launch(sample_fwd_kernel, (logp, noise), (onehot,))
    return onehot


def sample_backward(donehot: Tensor, logp: Tensor) -> Tensor:
    dlogp = plain._sample_backward_fake(donehot, logp)
    _launch(sample_bwd_kernel, (donehot, logp), (dlogp,))
    return dlogp


def _launch(
    kernel: triton.JITFunction,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    *options: float,
    **constants: bool,
) -> None:
    """The last of ``inputs`` is (..., K)."""
    inputs = tuple(x.contiguous() for x in inputs)
    K = inputs[-1].shape[-1]
    N = inputs[-1].numel() // K
    classes = triton.next_power_of_2(K)
    rows = max(1, TILE // classes)
    blocks = {"BLOCK_N": rows, "BLOCK_K": classes}
    grid = (triton.cdiv(N, rows),)
    launch(kernel, grid, *inputs, *outputs, N, K, *options, **constants, **blocks)


def presets() -> None:
    """Latents of 4 to 64 classes, and policies of 18 and of 4 actions."""
    for K in (4, 16, 18, 32, 64):
        x, row = (torch.empty(shape, device="meta") for shape in ((1024, K), (1024,)))
        for mix in (0.0, 0.01):
            unimix(x, mix)
            unimix_backward(x, x, mix)
        entropy(x)
        entropy_backward(row, x)
        kl(x, x)
        balanced_kl(x, x)
        kl_backward(row, row, x, x)
        sample(x, x)
        sample_backward(x, x)


serve("unimix", unimix, plain._unimix_cpu)
serve("unimix_backward", unimix_backward, plain._unimix_backward_cpu)
serve("entropy", entropy, plain._entropy_cpu)
serve("entropy_backward", entropy_backward, plain._entropy_backward_cpu)
serve("kl", kl, plain._kl_cpu)
serve("balanced_kl", balanced_kl, plain._balanced_kl_cpu)
serve("kl_backward", kl_backward, plain._kl_backward_cpu)
serve("sample", sample, plain._sample_cpu)
serve("sample_backward", sample_backward, plain._sample_backward_cpu)
