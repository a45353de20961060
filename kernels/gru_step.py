"""One step of either recurrent cell. Legend: B batch, D deter, U width of the input, G blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .library import Arguments
from .register import compute_type, on_triton, products_in, register


def gru_step(
    h: Tensor, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-3
) -> Tensor:
    """LayerNorm-GRU of recipe 2023: one joint product, one norm over all three gates.

    Args:
        h: (B, D) state. x: (B, U) input. weight: (3D, D + U), state columns first, no bias.
        scale, shift: (3D,) of the LayerNorm. Gates come in the order reset, candidate, update.

    Returns:
        (B, D) next state ``u tanh(r c) + (1 - u) h`` with ``u = sigmoid(update - 1)``.

    Source: DreamerV2's cell as DreamerV3 v1 and sheeprl use it.
    """
    gates = F.linear(torch.cat([h, x], -1), weight).to(h.dtype)
    gates = F.layer_norm(gates, gates.shape[-1:], scale, shift, eps)
    reset, cand, update = gates.chunk(3, -1)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    return update * cand + (1 - update) * h


def block_gru_step(
    h: Tensor,
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    scale: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    eps: float = 1e-4,
) -> Tensor:
    """Block-GRU of recipe 2025: G blocks share the input, each sees its own part of the state.

    Args:
        h: (B, D) state, in G contiguous parts. x: (B, U) input, given to every block.
        hidden_weight: (G, D / G + U, D / G), state rows first. hidden_bias: (D,).
        scale: (D,) of the RMSNorm, which spans all blocks.
        gate_weight: (G, D / G, 3 D / G). gate_bias: (3 D,), block by block.
            Inside a block the gates come in the order reset, candidate, update.

    Returns:
        (B, D) next state ``u tanh(r c) + (1 - u) h`` with ``u = sigmoid(update - 1)``.

    Source: DreamerV3 (Nature), "Block-diagonal GRU".
    """
    blocks = hidden_weight.shape[0]
    shared = x.unsqueeze(-2).expand(*x.shape[:-1], blocks, -1)
    z = block_linear(torch.cat([h.unflatten(-1, (blocks, -1)), shared], -1), hidden_weight)
    z = F.silu(F.rms_norm(z.flatten(-2) + hidden_bias, scale.shape, scale, eps))
    gates = block_linear(z.unflatten(-1, (blocks, -1)), gate_weight).flatten(-2) + gate_bias
    gates = gates.unflatten(-1, (blocks, 3, -1))  # (B, G, 3, D / G)
    reset, cand, update = (gate.flatten(-2) for gate in gates.unbind(-2))
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    return update * cand + (1 - update) * h


def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """G products side by side: (..., G, I), (G, I, O) -> (..., G, O)."""
    return torch.einsum("...gi,gio->...go", x, weight).to(weight.dtype)


WIDEST_GRU, WIDEST_BLOCK_GRU = 4096, 8192
"""Deter of the widest cells that Triton's kernels hold in registers."""


def compiled_gru_step(
    h: Tensor, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-3
) -> Tensor:
    """`gru_step` by the operator: float32; Triton also takes bfloat16 beside a float32 norm.

    The C++ library multiplies in bfloat16 where autocast says so and the processor can. Other
    types, and states that are too wide for Triton's kernels, are served by the reference.
    """
    if not _served(h, WIDEST_GRU):
        return gru_step(h, x, weight, scale, shift, eps)
    return _by_rows(torch.ops.fastdreamer.gru_step, h, x, weight, scale, shift, eps)


def compiled_block_gru_step(
    h: Tensor,
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    scale: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    eps: float = 1e-4,
) -> Tensor:
    """`block_gru_step` by the operator: float32; Triton also takes bfloat16 beside float32 vectors.

    The C++ library multiplies in bfloat16 where autocast says so and the processor can. Other
    types, and states that are too wide for Triton's kernels, are served by the reference.
    """
    weights = (hidden_weight, hidden_bias, scale, gate_weight, gate_bias)
    if not _served(h, WIDEST_BLOCK_GRU):
        return block_gru_step(h, x, *weights, eps)
    return _by_rows(torch.ops.fastdreamer.block_gru_step, h, x, *weights, eps)


def _served(h: Tensor, widest: int) -> bool:
    if on_triton(h):
        return h.dtype in (torch.float32, torch.bfloat16) and h.shape[-1] <= widest
    return h.dtype == torch.float32


def _by_rows(operator: Callable, h: Tensor, x: Tensor, *weights_and_eps: Any) -> Tensor:
    """Over all leading dimensions, which h and x share."""
    compute = torch.float32 if on_triton(h) else compute_type("cpu")
    if h.ndim == x.ndim == 2:
        return operator(h, x, *weights_and_eps, compute)[0]
    if h.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"gru_step: h {tuple(h.shape)} and x {tuple(x.shape)} differ in rows")
    rows = (t.reshape(h.shape[:-1].numel(), t.shape[-1]) for t in (h, x))
    return operator(*rows, *weights_and_eps, compute)[0].reshape(h.shape)


_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


class CGRU(Arguments):
    """``fd_gru``."""

    _fields_: ClassVar = [
        ("cell", ctypes.c_int32),
        ("eps", ctypes.c_float),
        *((k, _SIZE) for k in ("deter", "inputs", "blocks")),
        *((k, _POINTER) for k in ("hidden_weight", "hidden_bias", "gate_weight", "gate_bias")),
        *((k, _POINTER) for k in ("scale", "shift")),
    ]


FWD_SIGNATURE = (ctypes.POINTER(CGRU), *library.SIZE, *library.OUTPUT * 5, *library.INT)
BWD_SIGNATURE = (ctypes.POINTER(CGRU), *library.SIZE, *library.OUTPUT * 9, *library.INT)
GRU = "Tensor weight, Tensor scale, Tensor shift"
BLOCK_GRU = (
    "Tensor hidden_weight, Tensor hidden_bias, Tensor scale, Tensor gate_weight, Tensor gate_bias"
)


def _c_gru(h: Tensor, x: Tensor, weights: Sequence[Tensor], eps: float) -> Any:
    sizes = {"eps": eps, "deter": h.shape[1], "inputs": x.shape[1]}
    if len(weights) == 3:
        weight, scale, shift = weights
        return CGRU.of(cell=0, blocks=1, gate_weight=weight, scale=scale, shift=shift, **sizes)
    hidden_weight, hidden_bias, scale, gate_weight, gate_bias = weights
    return CGRU.of(
        cell=1,
        blocks=hidden_weight.shape[0],
        hidden_weight=hidden_weight,
        hidden_bias=hidden_bias,
        scale=scale,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        **sizes,
    )


def _check(h: Tensor, x: Tensor, weights: Sequence[Tensor]) -> None:
    """Both cells: the block cell has five weights, the other three."""
    name = "gru_step" if len(weights) == 3 else "block_gru_step"
    if h.ndim != 2 or x.ndim != 2 or len(h) != len(x) or not h.shape[1] or not x.shape[1]:
        got = f"{tuple(h.shape)}, {tuple(x.shape)}"
        raise ValueError(f"{name}: h must be (B, D) and x (B, U), D and U > 0, got {got}")
    deter, inputs = h.shape[1], x.shape[1]
    norm = (3 * deter,)
    expected: tuple[tuple[int, ...], ...] = ((3 * deter, deter + inputs), norm, norm)
    if len(weights) == 5:
        blocks = max(1, weights[0].shape[0])
        width = deter // blocks
        first, last = (blocks, width + inputs, width), (blocks, width, 3 * width)
        expected = (first, (deter,), (deter,), last, norm)
    shapes = tuple(tuple(w.shape) for w in weights)
    if shapes != expected:
        raise ValueError(f"{name}: weights must be {expected}, got {shapes}")
    tensors = (h, x, *weights)
    half = h.dtype == torch.bfloat16 and on_triton(h)  # the states and matrices
    if any(t.dtype != (h.dtype if half and t.ndim > 1 else torch.float32) for t in tensors):
        dtypes = ", ".join(str(t.dtype) for t in tensors)
        raise TypeError(f"{name}: all must be torch.float32, got {dtypes}")
    if devices := {t.device for t in tensors} - {h.device}:
        raise ValueError(f"{name}: inputs on {h.device} and {devices.pop()}")


def _fake(h: Tensor, x: Tensor, *weights_and_options: Any) -> tuple[Tensor, ...]:
    """The next state, the hidden layer before its norm (blocks only), the gates."""
    *weights, _eps, _compute = weights_and_options
    _check(h, x, weights)
    (rows, deter), blocks = h.shape, len(weights) == 5
    widths = (deter, deter, 3 * deter) if blocks else (deter, 3 * deter)
    return tuple(h.new_empty(rows, width) for width in widths)


def _cpu(h: Tensor, x: Tensor, *weights_and_options: Any) -> tuple[Tensor, ...]:
    outputs = _fake(h, x, *weights_and_options)
    *weights, eps, compute = weights_and_options
    h, x, *weights = (t.contiguous() for t in (h, x, *weights))
    next_, *hidden, gates = outputs
    library.function("fd_gru_step", FWD_SIGNATURE)(
        ctypes.byref(_c_gru(h, x, weights, eps)),
        len(h),
        h.data_ptr(),
        x.data_ptr(),
        hidden[0].data_ptr() if hidden else None,
        gates.data_ptr(),
        next_.data_ptr(),
        library.COMPUTE_DTYPES[compute],
    )
    return outputs


def _fake_backward(dnext: Tensor, h: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of h, x, the hidden layer (blocks only), the gates; of the norm's parameters."""
    scale, kept = (rest[2], rest[5:-2]) if len(rest) == 9 else (rest[1], rest[3:-2])
    if dnext.shape != h.shape or dnext.dtype != h.dtype:
        shapes = f"{tuple(dnext.shape)} {dnext.dtype}, {tuple(h.shape)} {h.dtype}"
        raise ValueError(f"gru_step: dnext and h differ: {shapes}")
    norm = 2 * kept[0].shape[1]
    return (*(t.new_empty(t.shape) for t in (h, x, *kept)), scale.new_empty(norm))


def _cpu_backward(dnext: Tensor, h: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grads = _fake_backward(dnext, h, x, *rest)
    *tensors, eps, compute = rest
    dnext, h, x, *tensors = (t.contiguous() for t in (dnext, h, x, *tensors))
    weights, kept = (tensors[:5], tensors[5:]) if len(rest) == 9 else (tensors[:3], tensors[3:])
    dh, dx, *dkept, dnorm = grads
    hidden, dhidden = (kept[0].data_ptr(), dkept[0].data_ptr()) if len(kept) == 2 else (None, None)
    library.function("fd_gru_step_backward", BWD_SIGNATURE)(
        ctypes.byref(_c_gru(h, x, weights, eps)),
        len(h),
        h.data_ptr(),
        hidden,
        kept[-1].data_ptr(),
        dnext.data_ptr(),
        dh.data_ptr(),
        dx.data_ptr(),
        dhidden,
        dkept[-1].data_ptr(),
        dnorm.data_ptr(),
        library.COMPUTE_DTYPES[compute],
    )
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.compute = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dnext: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    h, x = saved[:2]
    dh, dx, dgates, dnorm = torch.ops.fastdreamer.gru_step_backward(
        dnext, *saved, ctx.eps, ctx.compute
    )
    dscale, dshift = dnorm.chunk(2)
    with products_in(ctx.compute, h):
        dweight = dgates.T @ torch.cat([h, x], 1)
    return dh, dx, dweight.to(h.dtype), dscale, dshift, None, None


def _block_backward(ctx: Any, dnext: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    h, x, hidden_weight, hidden_bias, scale, *gate_weights, hidden, _gates = saved
    weights = (hidden_weight, hidden_bias, *gate_weights)
    operator = torch.ops.fastdreamer.block_gru_step_backward
    dh, dx, dhidden, dgates, dnorm = operator(dnext, *saved, ctx.eps, ctx.compute)
    z = torch.ops.fastdreamer.norm_act(hidden, scale, None, "rms", ctx.eps)
    blocks = hidden_weight.shape[0]
    with products_in(ctx.compute, h):
        dweights = block_weight_gradients(h, x, z, dhidden, dgates, blocks)
    dweight, dbias, *dlast = (
        grad.to(weight.dtype) for grad, weight in zip(dweights, weights, strict=True)
    )
    return dh, dx, dweight, dbias, dnorm.chunk(2)[0], *dlast, None, None


def block_weight_gradients(
    h: Tensor, x: Tensor, z: Tensor, dhidden: Tensor, dgates: Tensor, blocks: int
) -> list[Tensor]:
    """Gradients of a block cell's hidden weight and bias, and gate weight and bias.

    Args:
        h: (N, D). x: (N, U). z: (N, D) input of the gates. dhidden: (N, D). dgates: (N, 3 D).
    """

    def by_block(value: Tensor) -> Tensor:  # (N, G I) -> (G, N, I)
        return value.unflatten(1, (blocks, -1)).transpose(0, 1)

    by_state = torch.bmm(by_block(h).mT, by_block(dhidden))
    by_input = (x.T @ dhidden).unflatten(1, (blocks, -1)).transpose(0, 1)
    dgate_weight = torch.bmm(by_block(z).mT, by_block(dgates))
    dbias, dgate_bias = (value.sum(0, dtype=torch.float32) for value in (dhidden, dgates))
    return [torch.cat([by_state, by_input], 1), dbias, dgate_weight, dgate_bias]


def _register(name: str, weights: str, kept: str, backward: Callable) -> None:
    """``kept``: names of what a step keeps for its backward pass, behind its next state."""
    tensors, grads = (", ".join(f"Tensor {mark}{k}" for k in kept.split()) for mark in ("", "d"))
    schema = (
        f"(Tensor h, Tensor x, {weights}, float eps, ScalarType compute) -> "
        f"(Tensor next, {tensors})"
    )
    backward_schema = (
        f"(Tensor dnext, Tensor h, Tensor x, {weights}, {tensors}, "
        f"float eps, ScalarType compute) -> "
        f"(Tensor dh, Tensor dx, {grads}, Tensor dnorm)"
    )
    register(name, schema, _cpu, _fake, (_setup_context, backward))
    register(f"{name}_backward", backward_schema, _cpu_backward, _fake_backward)


_register("gru_step", GRU, "gates", _backward)
_register("block_gru_step", BLOCK_GRU, "hidden gates", _block_backward)
