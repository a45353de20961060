"""Convolution that halves or doubles images, with pooling, by minimal filtering (Winograd).

Legend: N images, H rows, W columns, C channels before and O after; H', W' the size after.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import library
from .conv_taps import GRADIENT, backward_weight, forward_weight, weight_gradient
from .convolution import (
    BWD_SIGNATURE,
    FWD_SIGNATURE,
    KINDS,
    CConv,
    CConvGrad,
    check_shapes,
    output_shape,
)
from .register import register


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Convolution, with pooling, as in `conv_norm_act`; (N, H, W, C) -> (N, H', W', O), float32.

    It equals `convolution`, but takes 2.6 to 4 times fewer products, of weights and pixels that are
    combined before: minimal filtering in tiles of 4x4 outputs for "stride" and "transpose" (2x2
    taps for each parity) and "upsample" (3x3), of 2x2 for "pool" (Lavin and Gray, 2016,
    https://arxiv.org/abs/1509.09308). Rounding errors are about five times those of the sums.

    Args:
        x: (N, H, W, C), H and W even where they are halved.
        weight: (O, C, 5, 5), (O, C, 4, 4) or, transposed, (C, O, 4, 4).
        bias: (O,), or None for none.
        kind: one of `KINDS`.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, or several devices.
        TypeError: a dtype other than float32.
    """
    return torch.ops.fastdreamer.winograd(x, weight, bias, kind)[0]


def _check(*inputs: Tensor | None) -> None:
    tensors = [p for p in inputs if p is not None]
    if dtypes := {p.dtype for p in tensors} - {torch.float32}:
        raise TypeError(f"winograd: all float32, got {dtypes.pop()}")
    if devices := {p.device for p in tensors} - {tensors[0].device}:
        raise ValueError(f"winograd: inputs on {tensors[0].device} and {devices.pop()}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The output; which pixel of 2x2 each of them was, where they are maxima."""
    check_shapes("winograd", x, weight, kind, bias)
    _check(x, weight, bias)
    shape = output_shape(x, weight, kind)
    return x.new_empty(shape), x.new_empty(shape if kind == "pool" else 0, dtype=torch.uint8)


def _c_conv(x: Tensor, outputs: int, kind: str, **tensors: Tensor | None) -> Any:
    sizes = dict(zip("NHWC", x.shape, strict=True))
    return CConv.of(kind=KINDS.index(kind), O=outputs, x=x, **sizes, **tensors)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    y, index = outputs = _fake(x, weight, bias, kind)
    x, taps = x.contiguous(), forward_weight(weight, kind)
    bias = None if bias is None else bias.contiguous()
    conv = _c_conv(x, y.shape[3], kind, weight=taps, bias=bias, y=y, index=index)
    library.function("fd_winograd", FWD_SIGNATURE)(ctypes.byref(conv))
    return outputs


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor, kind: str, wants_dx: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (empty if not wanted) and weight."""
    check_shapes("winograd", x, weight, kind)
    _check(x, weight, dy)
    shape = output_shape(x, weight, kind)
    if dy.shape != shape or index.shape != (shape if kind == "pool" else (0,)):
        raise ValueError(f"winograd: dy and index must have y's shape {tuple(shape)}")
    return x.new_empty(x.shape if wants_dx else 0), x.new_empty(weight.shape)


def _cpu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor, kind: str, wants_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, _ = _fake_backward(dy, x, weight, index, kind, wants_dx)
    dy, x, index = (p.contiguous() for p in (dy, x, index))
    conv = _c_conv(x, dy.shape[3], kind, index=index)
    taps, channels = GRADIENT[kind].shape[1], (x.shape[3], dy.shape[3])
    doubles = kind in ("upsample", "transpose")
    dtaps = x.new_empty(taps, taps, *(reversed(channels) if doubles else channels))
    back = backward_weight(weight, kind) if wants_dx else None
    grad = CConvGrad.of(dy=dy, weight=back, dx=dx if wants_dx else None, dweight=dtaps)
    function = library.function("fd_winograd_backward", BWD_SIGNATURE)
    function(ctypes.byref(conv), ctypes.byref(grad))
    return dx, weight_gradient(dtaps, kind)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.kind = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in the size of what is kept


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    wants_dx = ctx.needs_input_grad[0]
    operator = torch.ops.fastdreamer.winograd_backward
    dx, dweight = operator(dy, *ctx.saved_tensors, ctx.kind, wants_dx)
    dbias = dy.sum((0, 1, 2)) if ctx.has_bias else None
    return dx if wants_dx else None, dweight, dbias, None


register(
    "winograd",
    "(Tensor x, Tensor weight, Tensor? bias, str kind) -> (Tensor y, Tensor index)",
    _cpu,
    _fake,
    (_setup_context, _backward),
)
register(
    "winograd_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor index, str kind, bool wants_dx) -> "
    "(Tensor dx, Tensor dweight)",
    _cpu_backward,
    _fake_backward,
)
