# mypy: disable-error-code=no-untyped-def
"""`norm_act` on a GPU: whole rows in registers, several narrow ones in each program.

Legend: N width of a row, P programs that share the rows of a backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .norm_act import _fake, _fake_backward, _gradients, norm_act
from .register import serve

WIDEST = 16384
"""Wider rows are the plain form's."""
WIDEST_BACKWARD = {"layer": 4096, "rms": 8192}
"""Wider ones do not fit the registers beside the sums over rows."""
PROGRAMS = 1024  # as many partial sums over rows; some eight for each multiprocessor


@triton.jit
def norm_rows(x, inside, N, eps, LAYER: tl.constexpr):
    """(x - mean) / sqrt(var + eps) of each row and 1 / sqrt(var + eps); 0 outside of it."""
    if LAYER:
        x = tl.where(inside, x - (tl.sum(x, 1) / N)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / N + eps)
    return x * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows"])
def norm_act_fwd_kernel(
    x_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    rows,
    N,
    eps,
    LAYER: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # x += bias, in memory too; n = norm(x) scale + shift; y = n sigmoid(n)
    start = tl.program_id(0) * BLOCK_M
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x_ptr += start.to(tl.int64) * N
    y_ptr += start.to(tl.int64) * N
    at = row[:, None] * N + col[None, :]
    inside = (start + row[:, None] < rows) & (col[None, :] < N)
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, col < N, 0.0)[None, :]
        tl.store(x_ptr + at, x, inside)
    n, _ = norm_rows(x, inside, N, eps, LAYER)
    n *= tl.load(scale_ptr + col, col < N, 0.0)[None, :]
    if shift_ptr is not None:
        n += tl.load(shift_ptr + col, col < N, 0.0)[None, :]
    if SILU:
        n *= tl.sigmoid(n)
    tl.store(y_ptr + at, n, inside)


@triton.jit(do_not_specialize=["rows"])
def norm_act_bwd_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    dx_ptr,
    partial_ptr,  # (2, P, N): dscale, dshift
    rows,
    N,
    eps,
    LAYER: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # dn = dy silu'(n); d = dn scale; dx = (d - xhat mean(d xhat) - mean(d)) rstd
    # RMSNorm has no mean(d); dscale = sum of dn xhat, dshift = sum of dn over rows
    program, programs = tl.program_id(0), tl.num_programs(0)
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = row[:, None] * N + col[None, :]
    first, step = program.to(tl.int64) * BLOCK_M * N, programs.to(tl.int64) * BLOCK_M * N
    dy_ptr += first
    x_ptr += first
    dx_ptr += first
    scale = tl.load(scale_ptr + col, col < N, 0.0)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + col, col < N, 0.0)[None, :]
    dscale = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dshift = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(program * BLOCK_M, rows, programs * BLOCK_M):
        inside = (start + row[:, None] < rows) & (col[None, :] < N)
        x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
        dn = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32)
        xhat, rstd = norm_rows(x, inside, N, eps, LAYER)
        if SILU:
            n = xhat * scale
            if shift_ptr is not None:
                n += shift
            s = tl.sigmoid(n)
            dn *= s * (1 + n * (1 - s))
        dscale += dn * xhat
        if shift_ptr is not None:
            dshift += dn
        d = dn * scale
        dx = d - xhat * (tl.sum(d * xhat, 1) / N)[:, None]
        if LAYER:
            dx -= (tl.sum(d, 1) / N)[:, None]
        tl.store(dx_ptr + at, dx * rstd[:, None], inside)
        dy_ptr += step
        x_ptr += step
        dx_ptr += step
    partial_ptr += program * N
    tl.store(partial_ptr + col, tl.sum(dscale, 0), col < N)
    if shift_ptr is not None:
        tl.store(partial_ptr + programs * N + col, tl.sum(dshift, 0), col < N)


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # (1 or 2, P, N)
    first_ptr,  # (N,)
    second_ptr,  # (N,), where there is a second
    programs,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Always in the same order, so that results repeat.
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    partial_ptr += which.to(tl.int64) * programs * N
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, programs, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row[:, None] < programs) & (col[None, :] < N)
        sums += tl.load(partial_ptr + row[:, None] * N + col[None, :], inside, 0.0)
    if which == 0:
        tl.store(first_ptr + col, tl.sum(sums, 0), col < N)
    else:
        tl.store(second_ptr + col, tl.sum(sums, 0), col < N)


def tile(n: int) -> dict[str, int]:
    """Rows of a program, columns, and warps, with four elements for each thread up to N = 2048."""
    block_n = triton.next_power_of_2(n)
    block_m = max(1, 512 // block_n)
    warps = min(max(block_m * block_n // 128, 4), 16)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps}


def forward(
    x: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    silu: bool,
    y: Tensor,
) -> None:
    """Contiguous x (..., N) -> y (..., N); a bias (N,) is first added to x, in place."""
    n = x.shape[-1]
    blocks, rows = tile(n), x.numel() // n
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]),)
    tensors = (x, bias, scale, shift, y)
    launch(
        norm_act_fwd_kernel,
        grid,
        *tensors,
        rows,
        n,
        eps,
        LAYER=kind == "layer",
        SILU=silu,
        **blocks,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    silu: bool,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Contiguous dy and x (..., N) -> dx (..., N), dscale (N,), and dshift (N,) if shifted."""
    dx, dscale, dshift = grads
    n = x.shape[-1]
    blocks, rows = tile(n), x.numel() // n
    partials = partial_sums(scale, shift, triton.cdiv(rows, blocks["BLOCK_M"]))
    tensors, form = (dy, x, scale, shift, dx, partials), {"LAYER": kind == "layer", "SILU": silu}
    launch(norm_act_bwd_kernel, partials.shape[1:2], *tensors, rows, n, eps, **form, **blocks)
    sum_partials(partials, dscale, dshift)


def partial_sums(scale: Tensor, shift: Tensor | None, blocks: int) -> Tensor:
    """Room for (1 or 2, P, N); a program has four blocks of rows at least, so that P is small."""
    programs = max(1, min(triton.cdiv(blocks, 4), PROGRAMS))
    return scale.new_empty(1 if shift is None else 2, programs, len(scale))


def sum_partials(partials: Tensor, first: Tensor, second: Tensor) -> None:
    """(1 or 2, P, N) -> (N,) once or twice."""
    count, programs, n = partials.shape
    grid = (triton.cdiv(n, 32), count)
    launch(sum_partials_kernel, grid, partials, first, second, programs, n, BLOCK_M=32, BLOCK_N=32)


def norm_act_triton(
    x: Tensor, scale: Tensor, shift: Tensor | None, kind: str, eps: float, silu: bool = True
) -> Tensor:
    y = _fake(x, scale, shift, kind, eps, silu)
    x, scale = x.contiguous(), scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    if x.dtype == torch.float64 or x.shape[-1] > WIDEST:
        return norm_act(x, scale, shift, kind, eps, silu)
    forward(x, None, scale, shift, kind, eps, silu, y)
    return y


def norm_act_backward_triton(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_backward(dy, x, scale, shift, kind, eps, silu)
    dy, x, scale = dy.contiguous(), x.contiguous(), scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    if x.dtype == torch.float64 or x.shape[-1] > WIDEST_BACKWARD[kind]:
        return _gradients(dy, x, scale, shift, kind, eps, silu)
    backward(dy, x, scale, shift, kind, eps, silu, grads)
    return grads


def presets() -> None:
    """Rows of the presets' convolutions, hidden layers and states, and the widest."""
    for n in (24, 64, 96, 256, 512, 1024, 1536, 4096, 8192, WIDEST):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(1024, n, dtype=dtype, device="meta")
            scale = torch.empty(n, device="meta")
            for kind, shift in (("layer", scale), ("rms", None)):
                forward(x, None, scale, shift, kind, 1e-3, True, x)
                if n <= WIDEST_BACKWARD[kind]:
                    backward(x, x, scale, shift, kind, 1e-3, True, (x, scale, scale))


serve("norm_act", norm_act_triton)
serve("norm_act_backward", norm_act_backward_triton)
