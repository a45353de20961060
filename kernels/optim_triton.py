# mypy: disable-error-code=no-untyped-def
"""The optimisers' steps on a GPU: tensors of any sizes in a few launches, whatever their number.

Tensors are cut into chunks, a program each; where they lie is a table of addresses in device
memory. The table is filled by a kernel that takes the addresses as arguments, so that no copy from
the host is needed: under a CUDA graph, where gradients have addresses of their own, they are part
of the captured launch. The cut depends on the sizes only, and is copied to the device once, at the
first step with them: take one before capturing.

Legend: T tensors, C chunks of all of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .optim import agc_laprop, changeable, check, clip_adam, ema
from .register import serve

CHUNK = 2048
ADDRESSES = 256  # arguments of one launch; older drivers allow 4 KiB of them
FORM: dict[str, Any] = {"CHUNK": CHUNK, "num_warps": 8}
Chunks = tuple[Tensor, Tensor, Tensor]


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
    table_ptr,  # (lists, T) addresses, of a list for each of the grid's second numbers
    tensor_ptr,  # (C,) of each chunk
    first_ptr,  # (T + 1,) chunk of each tensor
    size_ptr,  # (T,)
    square_ptr,  # (lists, C): sums over a chunk of x^2
    tensors,
    chunks,
    CHUNK: tl.constexpr,
):
    chunk, of = tl.program_id(0), tl.program_id(1)
    tensor, start, inside = place_of(chunk, tensor_ptr, first_ptr, size_ptr, CHUNK)
    x = tl.load(elements(table_ptr + of * tensors, tensor, start, CHUNK), inside, 0.0)
    tl.store(square_ptr + of * chunks + chunk, tl.sum(x * x, 0))


@triton.jit
def correction(beta: tl.constexpr, step_ptr):
    """1 - beta^step in float64, for in float32 the first ones would round to 1e-5."""
    step = tl.load(step_ptr).to(tl.float64)
    return 1 - tl.exp(step * tl.log(tl.full((), beta, tl.float64)))


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
    if tensor == 0:
        rate = tl.load(lr_ptr).to(tl.float64) / correction(BETA1, step_ptr)
        tl.store(factor_ptr + tensors, rate.to(tl.float32))
        tl.store(factor_ptr + tensors + 1, correction(BETA2, step_ptr).to(tl.float32))


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


@triton.jit
def clip_kernel(
    square_ptr,  # (C,) of the gradients
    step_ptr,
    lr_ptr,
    factor_ptr,  # (3,): what multiplies gradients; lr / (1 - beta1^step); 1 - beta2^step
    norm_ptr,  # scalar: norm of all gradients
    chunks,
    CLIP: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    norm = tl.sqrt(sum_partials(square_ptr, 0, chunks, BLOCK))
    tl.store(norm_ptr, norm)
    tl.store(factor_ptr, tl.minimum(CLIP / (norm + 1e-6), 1.0, tl.PropagateNan.ALL))
    rate = tl.load(lr_ptr).to(tl.float64) / correction(BETA1, step_ptr)
    tl.store(factor_ptr + 1, rate.to(tl.float32))
    tl.store(factor_ptr + 2, correction(BETA2, step_ptr).to(tl.float32))


@triton.jit
def adam_kernel(
    table_ptr,  # (4, T) addresses: grads, params, nu, mu
    tensor_ptr,
    first_ptr,
    size_ptr,
    factor_ptr,
    tensors,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # g = factor grad; mu += (1 - beta1) (g - mu); nu += (1 - beta2) (g^2 - nu)
    # param -= lr / (1 - beta1^step) mu / (sqrt(nu / (1 - beta2^step)) + eps)
    chunk = tl.program_id(0)
    tensor, start, inside = place_of(chunk, tensor_ptr, first_ptr, size_ptr, CHUNK)
    grad_at = elements(table_ptr, tensor, start, CHUNK)
    param_at = elements(table_ptr + tensors, tensor, start, CHUNK)
    nu_at = elements(table_ptr + 2 * tensors, tensor, start, CHUNK)
    mu_at = elements(table_ptr + 3 * tensors, tensor, start, CHUNK)
    grad = tl.load(grad_at, inside, 0.0) * tl.load(factor_ptr)
    nu, mu = tl.load(nu_at, inside, 0.0), tl.load(mu_at, inside, 0.0)
    mu += (1 - BETA1) * (grad - mu)
    nu += (1 - BETA2) * (grad * grad - nu)
    denominator = tl.sqrt(nu / tl.load(factor_ptr + 2)) + EPS
    param = tl.load(param_at, inside, 0.0) - tl.load(factor_ptr + 1) * (mu / denominator)
    tl.store(nu_at, nu, inside)
    tl.store(mu_at, mu, inside)
    tl.store(param_at, param, inside)


@triton.jit
def ema_kernel(
    table_ptr,  # (2, T) addresses: targets, params
    tensor_ptr,
    first_ptr,
    size_ptr,
    tensors,
    RATE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor, start, inside = place_of(chunk, tensor_ptr, first_ptr, size_ptr, CHUNK)
    target_at = elements(table_ptr, tensor, start, CHUNK)
    param = tl.load(elements(table_ptr + tensors, tensor, start, CHUNK), inside, 0.0)
    target = tl.load(target_at, inside, 0.0)
    tl.store(target_at, target + RATE * (param - target), inside)


@cache
def cut(sizes: tuple[int, ...], device: torch.device) -> Chunks:
    """Tensor of each chunk (C,), first chunk of each tensor (T + 1,), sizes (T,).

    They are kept for good, for captured launches read them.
    """
    counts = [triton.cdiv(size, CHUNK) for size in sizes]
    first = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tensor = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return tensor.to(device), first.to(device), torch.tensor(sizes).to(device)


def fill_table(addresses: list[int], table: Tensor) -> None:
    """Store the addresses in the table."""
    for start in range(0, len(addresses), ADDRESSES):
        part = tuple(addresses[start : start + ADDRESSES])
        launch(fill_table_kernel, (1,), table[start:], part, num_warps=1)


def table_of(*lists: list[Tensor]) -> tuple[Tensor, Chunks]:
    """Addresses (lists, T) of the tensors that are not empty, and how they are cut.

    The tensors must be kept until the kernels are launched.
    """
    filled = [i for i, x in enumerate(lists[0]) if x.numel()]
    addresses = [tensors[i].data_ptr() for tensors in lists for i in filled]
    device = lists[0][0].device
    table = torch.empty(len(addresses), dtype=torch.int64, device=device)
    fill_table(addresses, table)
    return table, cut(tuple(lists[0][i].numel() for i in filled), device)


def laprop_by_table(
    table: Tensor,
    chunks: Chunks,
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
    beta: dict[str, Any] = {"BETA1": betas[0], "BETA2": betas[1], "BLOCK": 1024}
    launch(squares_kernel, (count, 2), table, *chunks, squares, T, count, **FORM)
    scalars = (step, lr, factors, grad_squares)
    launch(factors_kernel, (T,), first, squares, *scalars, T, count, CLIP=clip, **beta)
    results = (factors, grad_squares, norm)
    launch(laprop_kernel, (count,), table, *chunks, *results, T, EPS=eps, **beta, **FORM)


def adam_by_table(
    table: Tensor,
    chunks: Chunks,
    step: Tensor,
    lr: Tensor,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    norm: Tensor,
) -> None:
    """One step over the tensors of a table, and the norm of all gradients."""
    count, T = len(chunks[0]), len(chunks[2])
    squares, factors = norm.new_empty(count), norm.new_empty(3)
    beta: dict[str, Any] = {"BETA1": betas[0], "BETA2": betas[1]}
    launch(squares_kernel, (count, 1), table, *chunks, squares, T, count, **FORM)
    scalars = (step, lr, factors, norm)
    launch(clip_kernel, (1,), squares, *scalars, count, CLIP=clip, BLOCK=1024, **beta)
    launch(adam_kernel, (count,), table, *chunks, factors, T, EPS=eps, **beta, **FORM)


def ema_by_table(table: Tensor, chunks: Chunks, rate: float) -> None:
    """One step over the tensors of a table."""
    launch(ema_kernel, (len(chunks[0]),), table, *chunks, len(chunks[2]), RATE=rate, **FORM)


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
    check("agc_laprop", (params, grads, nu, mu), (step, lr))
    if not changeable(params, nu, mu):
        return agc_laprop(params, grads, nu, mu, step, lr, clip, beta1, beta2, eps)
    norm, grads = params[0].new_zeros(()), [x.contiguous() for x in grads]
    table, chunks = table_of(params, grads, nu, mu)
    if len(table):
        laprop_by_table(table, chunks, step, lr, clip, (beta1, beta2), eps, norm)
    return norm


def clip_adam_triton(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: Tensor,
    lr: Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    check("clip_adam", (params, grads, nu, mu), (step, lr))
    if not changeable(params, nu, mu):
        return clip_adam(params, grads, nu, mu, step, lr, clip, beta1, beta2, eps)
    norm, grads = params[0].new_empty(()), [x.contiguous() for x in grads]
    table, chunks = table_of(grads, params, nu, mu)
    adam_by_table(table, chunks, step, lr, clip, (beta1, beta2), eps, norm)
    return norm


def ema_triton(targets: list[Tensor], params: list[Tensor], rate: float) -> None:
    check("ema", (targets, params))
    if not changeable(targets):
        ema(targets, params, rate)
        return
    params = [x.contiguous() for x in params]
    ema_by_table(*table_of(targets, params), rate)


def presets() -> None:
    """Tensors of any sizes, with scalars that were numbers or tensors."""
    sizes = tuple(1 << i for i in range(24))
    table, norm = (torch.empty(96, dtype=torch.int64, device="meta"), torch.empty(0, device="meta"))
    fill_table([1 << 40] * ADDRESSES, table)
    chunks = cut(sizes, table.device)
    for counted, dtype in ((torch.int64, torch.float32), (torch.float64, torch.float64)):
        step, lr = torch.empty((), dtype=counted, device="meta"), norm.to(dtype)
        laprop_by_table(table, chunks, step, lr, 0.3, (0.9, 0.999), 1e-20, norm)
        for clip, eps in ((1000.0, 1e-8), (100.0, 1e-5)):
            adam_by_table(table, chunks, step, lr.double(), clip, (0.9, 0.999), eps, norm)
    ema_by_table(table, chunks, 0.02)


serve("agc_laprop", agc_laprop_triton)
serve("clip_adam", clip_adam_triton)
serve("ema", ema_triton)
