# mypy: disable-error-code=no-untyped-def
"""`agc_laprop` on a GPU: parameters of any sizes in three launches, whatever their number.

Tensors are cut into chunks, a program each; where they lie is a table of addresses in device
memory. The table is filled by a kernel that takes the addresses as arguments, so that no copy from
the host is needed: under a CUDA graph, where gradients have addresses of their own, they are part
of the captured launch. The cut depends on the sizes only, and is copied to the device once, at the
first step with them: take one before capturing.

Adam and the target critic's moving average stay PyTorch's: ``Adam(fused=True)`` and
``torch._foreach_lerp_`` are one pass over memory each. Only clipping by the global norm takes
passes that a kernel would save, two of ten: some 50 us on an H100 for the 18 million parameters of
2023 size S.

Legend: T tensors, C chunks of all of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .optim import _compiled, _fake, agc_laprop
from .register import serve

CHUNK = 2048
ADDRESSES = 256  # arguments of one launch; older drivers allow 4 KiB of them


@triton.jit
def fill_table_kernel(table_ptr, addresses):
    for i in tl.static_range(len(addresses)):
        tl.store(table_ptr + i, addresses[i].to(tl.int64))


@triton.jit
def place_of(chunk, tensor_ptr, first_ptr, size_ptr, CHUNK: tl.constexpr):
    """A chunk's tensor, its first place in there, and which of its elements there are."""
    tensor = tl.load(tensor_ptr + chunk)
    start = (chunk - tl.load(first_ptr + tensor)).to(tl.int64) * CHUNK
    return tensor, start, tl.arange(0, CHUNK) < tl.load(size_ptr + tensor) - start


@triton.jit
def elements(table_ptr, tensor, start, CHUNK: tl.constexpr):
    """Pointers to a chunk's elements."""
    ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(tl.float32))
    return ptr + start + tl.arange(0, CHUNK)


@triton.jit
def sum_partials(ptr, start, end, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(start, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        sums += tl.load(ptr + at, at < end, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def squares_kernel(
    table_ptr,  # (4, T) addresses: params, grads, nu, mu
    tensor_ptr,  # (C,) of each chunk
    first_ptr,  # (T + 1,) chunk of each tensor
    size_ptr,  # (T,)
    square_ptr,  # (2, C): sums over a chunk of param^2, grad^2
    tensors,
    chunks,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor, start, inside = place_of(chunk, tensor_ptr, first_ptr, size_ptr, CHUNK)
    param = tl.load(elements(table_ptr, tensor, start, CHUNK), inside, 0.0)
    grad = tl.load(elements(table_ptr + tensors, tensor, start, CHUNK), inside, 0.0)
    tl.store(square_ptr + chunk, tl.sum(param * param, 0))
    tl.store(square_ptr + chunks + chunk, tl.sum(grad * grad, 0))


@triton.jit
def factors_kernel(
    first_ptr,
    square_ptr,
    step_ptr,
    lr_ptr,
    factor_ptr,  # (T + 2,): what divides a tensor's gradients; lr / (1 - beta1^step);
    # 1 - beta2^step
    grad_square_ptr,  # (T,)
    tensors,
    chunks,
    CLIP: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    start, end = tl.load(first_ptr + tensor), tl.load(first_ptr + tensor + 1)
    param = tl.sqrt(sum_partials(square_ptr, start, end, BLOCK))
    grad = sum_partials(square_ptr + chunks, start, end, BLOCK)
    ratio = tl.sqrt(grad) / (tl.maximum(param, 1e-3, tl.PropagateNan.ALL) * CLIP)
    tl.store(factor_ptr + tensor, tl.maximum(ratio, 1.0, tl.PropagateNan.ALL))
    tl.store(grad_square_ptr + tensor, grad)
    if tensor == 0:  # in float64, for in float32 the first corrections would round to 1e-5
        step = tl.load(step_ptr).to(tl.float64)
        beta1, beta2 = tl.full((), BETA1, tl.float64), tl.full((), BETA2, tl.float64)
        rate = tl.load(lr_ptr).to(tl.float64) / (1 - tl.exp(step * tl.log(beta1)))
        tl.store(factor_ptr + tensors, rate.to(tl.float32))
        tl.store(factor_ptr + tensors + 1, (1 - tl.exp(step * tl.log(beta2))).to(tl.float32))


@triton.jit
def laprop_kernel(
    table_ptr,
    tensor_ptr,
    first_ptr,
    size_ptr,
    factor_ptr,
    grad_square_ptr,
    norm_ptr,  # scalar: norm of all gradients
    tensors,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # g = grad / factor; nu += (1 - beta2) (g^2 - nu); d = sqrt(nu / (1 - beta2^step)) + eps
    # mu += (1 - beta1) (g / d - mu); param -= lr / (1 - beta1^step) mu
    chunk = tl.program_id(0)
    tensor, start, inside = place_of(chunk, tensor_ptr, first_ptr, size_ptr, CHUNK)
    param_at = elements(table_ptr, tensor, start, CHUNK)
    grad_at = elements(table_ptr + tensors, tensor, start, CHUNK)
    nu_at = elements(table_ptr + 2 * tensors, tensor, start, CHUNK)
    mu_at = elements(table_ptr + 3 * tensors, tensor, start, CHUNK)
    grad = tl.load(grad_at, inside, 0.0) / tl.load(factor_ptr + tensor)
    nu, mu = tl.load(nu_at, inside, 0.0), tl.load(mu_at, inside, 0.0)
    nu += (1 - BETA2) * (grad * grad - nu)
    denominator = tl.sqrt(nu / tl.load(factor_ptr + tensors + 1)) + EPS
    mu += (1 - BETA1) * (grad / denominator - mu)
    param = tl.load(param_at, inside, 0.0) - tl.load(factor_ptr + tensors) * mu
    tl.store(nu_at, nu, inside)
    tl.store(mu_at, mu, inside)
    tl.store(param_at, param, inside)
    if chunk == 0:
        tl.store(norm_ptr, tl.sqrt(sum_partials(grad_square_ptr, 0, tensors, BLOCK)))


@lru_cache(16)
def cut(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tensor of each chunk (C,), first chunk of each tensor (T + 1,), sizes (T,)."""
    counts = [triton.cdiv(size, CHUNK) for size in sizes]
    first = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tensor = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return tensor.to(device), first.to(device), torch.tensor(sizes).to(device)


def fill_table(addresses: list[int], table: Tensor) -> None:
    """Store the addresses in the table (4 T,)."""
    for start in range(0, len(addresses), ADDRESSES):
        part = tuple(addresses[start : start + ADDRESSES])
        launch(fill_table_kernel, (1,), table[start:], part, num_warps=1)


def step_by_table(
    table: Tensor,
    chunks: tuple[Tensor, Tensor, Tensor],
    step: Tensor,
    lr: Tensor,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    norm: Tensor,
) -> None:
    """One step over the tensors of a table, and the norm of all gradients."""
    first = chunks[1]
    count, T = len(chunks[0]), len(chunks[2])
    squares = norm.new_empty(2, count)
    factors, grad_squares = norm.new_empty(T + 2), norm.new_empty(T)
    form: dict[str, Any] = {"CHUNK": CHUNK, "num_warps": 8}
    beta: dict[str, Any] = {"BETA1": betas[0], "BETA2": betas[1], "BLOCK": 1024}
    launch(squares_kernel, (count,), table, *chunks, squares, T, count, **form)
    scalars = (step, lr, factors, grad_squares)
    launch(factors_kernel, (T,), first, squares, *scalars, T, count, CLIP=clip, **beta)
    results = (factors, grad_squares, norm)
    launch(laprop_kernel, (count,), table, *chunks, *results, T, EPS=eps, **beta, **form)


def agc_laprop_triton(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: Tensor,
    lr: Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
) -> Tensor:
    norm = _fake(params, grads, nu, mu, step, lr, clip)
    if not _compiled(params, nu, mu):
        return agc_laprop(params, grads, nu, mu, step, lr, clip, beta1, beta2, eps)
    filled = [i for i, x in enumerate(params) if x.numel()]
    if not filled:
        return norm.zero_()
    grads = [x.contiguous() for x in grads]  # kept until the kernels are launched
    addresses = [tensors[i].data_ptr() for tensors in (params, grads, nu, mu) for i in filled]
    table = torch.empty(len(addresses), dtype=torch.int64, device=norm.device)
    fill_table(addresses, table)
    sizes = tuple(params[i].numel() for i in filled)
    chunks, betas = cut(sizes, norm.device), (beta1, beta2)
    step_by_table(table, chunks, step, lr, clip, betas, eps, norm)
    return norm


def presets() -> None:
    """Tensors of any sizes, with scalars that were numbers or tensors."""
    sizes = tuple(1 << i for i in range(24))
    table, norm = (torch.empty(96, dtype=torch.int64, device="meta"), torch.empty(0, device="meta"))
    fill_table([1 << 40] * ADDRESSES, table)
    chunks = cut(sizes, table.device)
    for counted, dtype in ((torch.int64, torch.float32), (torch.float64, torch.float64)):
        step, lr = torch.empty((), dtype=counted, device="meta"), norm.to(dtype)
        step_by_table(table, chunks, step, lr, 0.3, (0.9, 0.999), 1e-20, norm)


serve("agc_laprop", agc_laprop_triton)
