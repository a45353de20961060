# mypy: disable-error-code=no-untyped-def
"""Both recurrent cells on a GPU: the products by cuBLAS, what stands between them in one kernel.

A cell's norm needs every column of its product. A kernel that held both would keep all but a few
multiprocessors idle for 16 rows, and would read the weights once for every 16 rows for 1024.
Products therefore stay with the library, which reads weights once and has a form for every shape,
and each stretch between two products is one kernel with one row, or a part of one, per program:

    gru_step          product | norm, gates
    block_gru_step    product, product | bias, norm, SILU | product | bias, gates

Legend: B rows, D deter, U inputs, G blocks, W = D / G, P programs that share the rows of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_act_triton
from .gru_step import WIDEST_GRU, _fake, _fake_backward
from .launch import launch
from .norm_act_triton import partial_sums, sum_partials, tile
from .register import serve


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def next_state(reset, cand, update, h):
    """u tanh(r c) + (1 - u) h, with r = sigmoid(reset) and u = sigmoid(update - 1)."""
    cand = tanh(tl.sigmoid(reset) * cand)
    update = tl.sigmoid(update - 1)
    return update * cand + (1 - update) * h


@triton.jit
def gate_gradients(reset, cand, update, h, dnext):
    """Gradients of `next_state`'s arguments: of the three gates, and of h."""
    r = tl.sigmoid(reset)
    c = tanh(r * cand)
    u = tl.sigmoid(update - 1)
    dpre = dnext * u * (1 - c * c)
    return dpre * cand * r * (1 - r), dpre * r, dnext * (c - h) * u * (1 - u), dnext * (1 - u)


@triton.jit
def load_gates(ptr, at, step, inside):
    """Three values for each place, a step apart."""
    reset = tl.load(ptr + at, inside, 0.0).to(tl.float32)
    cand = tl.load(ptr + at + step, inside, 0.0).to(tl.float32)
    update = tl.load(ptr + at + 2 * step, inside, 0.0).to(tl.float32)
    return reset, cand, update


@triton.jit
def store_gates(ptr, at, step, inside, reset, cand, update):
    tl.store(ptr + at, reset, inside)
    tl.store(ptr + at + step, cand, inside)
    tl.store(ptr + at + 2 * step, update, inside)


@triton.jit
def centred(x, mean, inside):
    return tl.where(inside, x - mean[:, None], 0.0)


@triton.jit
def squares(x):
    return tl.sum(x * x, 1)


@triton.jit(do_not_specialize=["rows"])
def gru_fwd_kernel(
    gates_ptr,  # (B, 3 D) before the norm
    scale_ptr,
    shift_ptr,
    h_ptr,
    next_ptr,
    rows,
    D,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # next = next_state(LayerNorm over all 3 D gates, h)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    inside = (row[:, None] < rows) & (col[None, :] < D)
    a, b, c = load_gates(gates_ptr, row[:, None] * 3 * D + col[None, :], D, inside)
    mean = (tl.sum(a, 1) + tl.sum(b, 1) + tl.sum(c, 1)) / (3 * D)
    a, b, c = centred(a, mean, inside), centred(b, mean, inside), centred(c, mean, inside)
    rstd = tl.rsqrt((squares(a) + squares(b) + squares(c)) / (3 * D) + eps)[:, None]
    sa, sb, sc = load_gates(scale_ptr, col[None, :], D, col[None, :] < D)
    ta, tb, tc = load_gates(shift_ptr, col[None, :], D, col[None, :] < D)
    at = row[:, None] * D + col[None, :]
    h = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
    a, b, c = a * rstd * sa + ta, b * rstd * sb + tb, c * rstd * sc + tc
    tl.store(next_ptr + at, next_state(a, b, c, h), inside)


@triton.jit(do_not_specialize=["rows"])
def gru_bwd_kernel(
    dnext_ptr,
    gates_ptr,
    scale_ptr,
    shift_ptr,
    h_ptr,
    dgates_ptr,
    dh_ptr,  # what reaches h beside the gates
    mean_ptr,  # (B,) of the gates, for the sums over rows
    rstd_ptr,  # (B,)
    rows,
    D,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # d = dn scale; dgates = (d - xhat mean(d xhat) - mean(d)) rstd
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    inside = (row[:, None] < rows) & (col[None, :] < D)
    at3 = row[:, None] * 3 * D + col[None, :]
    a, b, c = load_gates(gates_ptr, at3, D, inside)
    mean = (tl.sum(a, 1) + tl.sum(b, 1) + tl.sum(c, 1)) / (3 * D)
    a, b, c = centred(a, mean, inside), centred(b, mean, inside), centred(c, mean, inside)
    rstd = tl.rsqrt((squares(a) + squares(b) + squares(c)) / (3 * D) + eps)
    tl.store(mean_ptr + row, mean, row < rows)
    tl.store(rstd_ptr + row, rstd, row < rows)
    rstd = rstd[:, None]
    a, b, c = a * rstd, b * rstd, c * rstd
    sa, sb, sc = load_gates(scale_ptr, col[None, :], D, col[None, :] < D)
    ta, tb, tc = load_gates(shift_ptr, col[None, :], D, col[None, :] < D)
    at = row[:, None] * D + col[None, :]
    h = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
    dnext = tl.load(dnext_ptr + at, inside, 0.0).to(tl.float32)
    da, db, dc, dh = gate_gradients(a * sa + ta, b * sb + tb, c * sc + tc, h, dnext)
    tl.store(dh_ptr + at, dh, inside)
    da, db, dc = da * sa, db * sb, dc * sc
    d = ((tl.sum(da, 1) + tl.sum(db, 1) + tl.sum(dc, 1)) / (3 * D))[:, None]
    dx = ((tl.sum(da * a, 1) + tl.sum(db * b, 1) + tl.sum(dc * c, 1)) / (3 * D))[:, None]
    da, db, dc = (da - a * dx - d) * rstd, (db - b * dx - d) * rstd, (dc - c * dx - d) * rstd
    store_gates(dgates_ptr, at3, D, inside, da, db, dc)


@triton.jit(do_not_specialize=["rows"])
def gru_norm_bwd_kernel(
    dnext_ptr,
    gates_ptr,
    scale_ptr,
    shift_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # (2, P, 3 D)
    rows,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # dscale = sum of dn xhat and dshift = sum of dn over rows; dn is computed again, which takes
    # less than keeping six sums of every column beside a whole row would
    program, programs = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = col[None, :] < D
    sa, sb, sc = load_gates(scale_ptr, col[None, :], D, within)
    ta, tb, tc = load_gates(shift_ptr, col[None, :], D, within)
    dsa, dsb, dsc = tl.zeros_like(sa), tl.zeros_like(sb), tl.zeros_like(sc)
    dta, dtb, dtc = tl.zeros_like(sa), tl.zeros_like(sb), tl.zeros_like(sc)
    for start in range(program * BLOCK_M, rows, programs * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (row[:, None] < rows) & within
        a, b, c = load_gates(gates_ptr, row[:, None] * 3 * D + col[None, :], D, inside)
        mean = tl.load(mean_ptr + row, row < rows, 0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)[:, None]
        a, b, c = (a - mean) * rstd, (b - mean) * rstd, (c - mean) * rstd
        at = row[:, None] * D + col[None, :]
        h = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
        dnext = tl.load(dnext_ptr + at, inside, 0.0).to(tl.float32)
        da, db, dc, _ = gate_gradients(a * sa + ta, b * sb + tb, c * sc + tc, h, dnext)
        dsa += tl.sum(da * a, 0)[None, :]
        dsb += tl.sum(db * b, 0)[None, :]
        dsc += tl.sum(dc * c, 0)[None, :]
        dta += tl.sum(da, 0)[None, :]
        dtb += tl.sum(db, 0)[None, :]
        dtc += tl.sum(dc, 0)[None, :]
    partial_ptr += program.to(tl.int64) * 3 * D
    store_gates(partial_ptr, col[None, :], D, within, dsa, dsb, dsc)
    partial_ptr += programs.to(tl.int64) * 3 * D
    store_gates(partial_ptr, col[None, :], D, within, dta, dtb, dtc)


@triton.jit(do_not_specialize=["rows"])
def block_gates_fwd_kernel(
    gates_ptr,  # (B, G, 3, W)
    bias_ptr,  # (G, 3, W)
    h_ptr,
    next_ptr,
    rows,
    D,
    W,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # gates += bias, in memory too; next = next_state(gates, h)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside, gate = (row < rows) & (col < D), col // W * 3 * W + col % W
    a, b, c = load_gates(gates_ptr, row * 3 * D + gate, W, inside)
    ba, bb, bc = load_gates(bias_ptr, gate, W, col < D)
    a, b, c = a + ba, b + bb, c + bc
    store_gates(gates_ptr, row * 3 * D + gate, W, inside, a, b, c)
    h = tl.load(h_ptr + row * D + col, inside, 0.0).to(tl.float32)
    tl.store(next_ptr + row * D + col, next_state(a, b, c, h), inside)


@triton.jit(do_not_specialize=["rows"])
def block_gates_bwd_kernel(
    dnext_ptr,
    gates_ptr,  # (B, G, 3, W)
    h_ptr,
    dgates_ptr,
    dh_ptr,  # what reaches h beside the gates
    rows,
    D,
    W,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside, gate = (row < rows) & (col < D), col // W * 3 * W + col % W
    a, b, c = load_gates(gates_ptr, row * 3 * D + gate, W, inside)
    h = tl.load(h_ptr + row * D + col, inside, 0.0).to(tl.float32)
    dnext = tl.load(dnext_ptr + row * D + col, inside, 0.0).to(tl.float32)
    da, db, dc, dh = gate_gradients(a, b, c, h, dnext)
    store_gates(dgates_ptr, row * 3 * D + gate, W, inside, da, db, dc)
    tl.store(dh_ptr + row * D + col, dh, inside)


def gates_forward(
    gates: Tensor, scale: Tensor, shift: Tensor, h: Tensor, eps: float, next_: Tensor
) -> None:
    """Norm and gates behind the product: (B, 3 D) -> (B, D)."""
    rows, deter = h.shape
    blocks = tile(deter)
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]),)
    launch(gru_fwd_kernel, grid, gates, scale, shift, h, next_, rows, deter, eps, **blocks)


def gates_backward(
    dnext: Tensor,
    gates: Tensor,
    scale: Tensor,
    shift: Tensor,
    h: Tensor,
    eps: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """dgates (B, 3 D), what reaches h beside them (B, D), and dnorm (6 D): scale, then shift."""
    dgates, dh, dnorm = grads
    rows, deter = h.shape
    blocks = tile(deter)
    mean, rstd = scale.new_empty(rows), scale.new_empty(rows)
    inputs = (dnext, gates, scale, shift, h)
    every = (triton.cdiv(rows, blocks["BLOCK_M"]),)
    launch(gru_bwd_kernel, every, *inputs, dgates, dh, mean, rstd, rows, deter, eps, **blocks)
    part = {"BLOCK_M": 8, "BLOCK_N": 64}
    partials = partial_sums(scale, shift, triton.cdiv(rows, part["BLOCK_M"]))
    grid = (triton.cdiv(deter, part["BLOCK_N"]), partials.shape[1])
    launch(gru_norm_bwd_kernel, grid, *inputs, mean, rstd, partials, rows, deter, **part)
    sum_partials(partials, dnorm[: 3 * deter], dnorm[3 * deter :])


def gru_step_triton(
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    """All products are in the type of the inputs, whatever ``compute`` is, as in the others."""
    next_, gates = _fake(h, x, weight, scale, shift, eps, compute)
    h, scale, shift = h.contiguous(), scale.contiguous(), shift.contiguous()
    torch.mm(torch.cat([h, x], 1), weight.T, out=gates)
    gates_forward(gates, scale, shift, h, eps, next_)
    return next_, gates


def gru_step_backward_triton(
    dnext: Tensor,
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    gates: Tensor,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    grads = _fake_backward(dnext, h, x, weight, scale, shift, gates, eps, compute)
    dnext, gates, scale, shift, h = (t.contiguous() for t in (dnext, gates, scale, shift, h))
    dh, dx, dgates, dnorm = grads
    gates_backward(dnext, gates, scale, shift, h, eps, (dgates, dh, dnorm))
    deter = h.shape[1]
    dh.addmm_(dgates, weight[:, :deter])
    torch.mm(dgates, weight[:, deter:], out=dx)
    return grads


def _by_block(x: Tensor, blocks: int) -> Tensor:
    """(B, G I) -> (G, B, I), a view."""
    return x.view(len(x), blocks, x.shape[1] // blocks).transpose(0, 1)


def _tiles(rows: int, deter: int) -> tuple[tuple[int, int], dict[str, int]]:
    """A grid over rows and columns, and the block of each program."""
    block = tile(min(deter, 512))
    return (triton.cdiv(rows, block["BLOCK_M"]), triton.cdiv(deter, block["BLOCK_N"])), block


def block_gates_forward(gates: Tensor, bias: Tensor, h: Tensor, blocks: int, next_: Tensor) -> None:
    """(B, 3 D) -> (B, D); the bias is first added to the gates, in place."""
    rows, deter = h.shape
    grid, block = _tiles(rows, deter)
    tensors = (gates, bias, h, next_)
    launch(block_gates_fwd_kernel, grid, *tensors, rows, deter, deter // blocks, **block)


def block_gates_backward(
    dnext: Tensor, gates: Tensor, h: Tensor, blocks: int, dgates: Tensor, dh: Tensor
) -> None:
    """dgates (B, 3 D) and what reaches h beside them (B, D)."""
    rows, deter = h.shape
    grid, block = _tiles(rows, deter)
    tensors = (dnext, gates, h, dgates, dh)
    launch(block_gates_bwd_kernel, grid, *tensors, rows, deter, deter // blocks, **block)


def block_gru_step_triton(h: Tensor, x: Tensor, *weights_and_options: Any) -> tuple[Tensor, ...]:
    next_, hidden, gates = _fake(h, x, *weights_and_options)
    *weights, eps, _compute = weights_and_options
    h, *weights = (t.contiguous() for t in (h, *weights))
    hidden_weight, hidden_bias, scale, gate_weight, gate_bias = weights
    blocks, width, _ = gate_weight.shape
    by_block = _by_block(hidden, blocks)
    torch.bmm(_by_block(h, blocks), hidden_weight[:, :width], out=by_block)
    by_block.baddbmm_(x.expand(blocks, *x.shape), hidden_weight[:, width:])
    z = torch.empty_like(hidden)
    norm_act_triton.forward(hidden, hidden_bias, scale, None, "rms", eps, True, z)
    torch.bmm(_by_block(z, blocks), gate_weight, out=_by_block(gates, blocks))
    block_gates_forward(gates, gate_bias, h, blocks, next_)
    return next_, hidden, gates


def block_gru_step_backward_triton(
    dnext: Tensor, h: Tensor, x: Tensor, *weights_kept_and_options: Any
) -> tuple[Tensor, ...]:
    grads = _fake_backward(dnext, h, x, *weights_kept_and_options)
    *tensors, eps, _compute = weights_kept_and_options
    dnext, h, *tensors = (t.contiguous() for t in (dnext, h, *tensors))
    hidden_weight, _, scale, gate_weight, _, hidden, gates = tensors
    dh, dx, dhidden, dgates, dnorm = grads
    blocks, width, _ = gate_weight.shape
    block_gates_backward(dnext, gates, h, blocks, dgates, dh)
    dz = torch.empty_like(hidden)
    torch.bmm(_by_block(dgates, blocks), gate_weight.mT, out=_by_block(dz, blocks))
    norm, rest = dnorm.chunk(2)  # an RMSNorm has no shift
    rest.zero_()
    norm_act_triton.backward(dz, hidden, scale, None, "rms", eps, True, (dhidden, norm, rest))
    by_block = _by_block(dhidden, blocks)
    _by_block(dh, blocks).baddbmm_(by_block, hidden_weight[:, :width].mT)
    _input_gradient(dhidden, hidden_weight[:, width:], dx)
    return grads


def _input_gradient(dhidden: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx (B, U) of an input that all blocks share; weight: (G, U, W).

    The smaller of two is written once more: the gradients by block, or the weight, transposed.
    """
    blocks, inputs, width = weight.shape
    if len(dhidden) < width:
        torch.sum(torch.bmm(_by_block(dhidden, blocks), weight.mT), 0, out=dx)
    else:
        torch.mm(dhidden, weight.mT.reshape(blocks * width, inputs), out=dx)


def presets() -> None:
    """The cells of all sizes."""
    for dtype in (torch.float32, torch.bfloat16):
        for deter in (256, 512, 1024, 2048, WIDEST_GRU):
            x, norm = _meta((1024, deter), dtype), _meta((3 * deter,))
            gates = _meta((1024, 3 * deter), dtype)
            gates_forward(gates, norm, norm, x, 1e-3, x)
            gates_backward(x, gates, norm, norm, x, 1e-3, (gates, x, _meta((6 * deter,))))
        for deter in (512, 2048, 3072, 8192):
            x, norm = _meta((1024, deter), dtype), _meta((deter,))
            gates, bias = _meta((1024, 3 * deter), dtype), _meta((3 * deter,))
            norm_act_triton.forward(x, norm, norm, None, "rms", 1e-4, True, x)
            block_gates_forward(gates, bias, x, 8, x)
            block_gates_backward(x, gates, x, 8, gates, x)


def _meta(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


serve("gru_step", gru_step_triton)
serve("gru_step_backward", gru_step_backward_triton)
serve("block_gru_step", block_gru_step_triton)
serve("block_gru_step_backward", block_gru_step_backward_triton)
