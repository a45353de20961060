"""LayerNorm or RMSNorm with a SiLU behind it. Legend: N width of the last axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .register import register

ARGUMENTS = "Tensor x, Tensor scale, Tensor? shift, str kind, float eps, bool silu"
SCHEMA = f"({ARGUMENTS}=True) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor dy, {ARGUMENTS}) -> (Tensor dx, Tensor dscale, Tensor dshift)"
SIZES = library.SIZE * 2 + library.INT * 2 + library.FLOAT + library.DTYPE_AND_STREAM
FWD_SIGNATURE = library.OUTPUT * 4 + SIZES
BWD_SIGNATURE = library.OUTPUT * 7 + SIZES


def norm_act(
    x: Tensor, scale: Tensor, shift: Tensor | None, kind: str, eps: float, silu: bool = True
) -> Tensor:
    """Norm over the last axis, then SiLU.

    ``n = (x - mean) / sqrt(var + eps) * scale + shift`` and ``y = n * sigmoid(n)``. RMSNorm takes
    0 for the mean and the mean square for the variance.

    Args:
        x: (..., N), N > 0.
        scale: (N,), of x's dtype or a wider one, in which it is computed.
        shift: (N,), or None for none; RMSNorm has none.
        kind: "layer" or "rms".
        eps: what is added to the variance.
        silu: False for the norm alone.

    Returns:
        (..., N) of x's dtype, contiguous where x is.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, or a shift of an RMSNorm.

    Source: Ba et al. 2016 (LayerNorm), Zhang and Sennrich 2019 (RMSNorm), Elfwing et al. 2018
    (SiLU). This is the plain PyTorch form of ``torch.ops.fastdreamer.norm_act``, and takes any
    floating dtype and device; the operator computes float32 in C++ or Triton and float64 in
    PyTorch, and takes x in bfloat16 beside a float32 scale and shift.
    """
    _check_shapes(x, scale, shift, kind)
    wide = x.to(scale.dtype)
    if kind == "layer":
        y = F.layer_norm(wide, scale.shape, scale, shift, eps)
    else:
        y = F.rms_norm(wide, scale.shape, scale, eps)
    return (F.silu(y) if silu else y).to(x.dtype)


def _check_shapes(x: Tensor, scale: Tensor, shift: Tensor | None, kind: str) -> None:
    if kind not in ("layer", "rms"):
        raise ValueError(f"norm_act: kind must be layer or rms, not {kind!r}")
    if kind == "rms" and shift is not None:
        raise ValueError("norm_act: an RMSNorm has no shift")
    shapes = [tuple(p.shape) for p in (scale, shift) if p is not None]
    if x.ndim == 0 or x.shape[-1] == 0 or any(shape != x.shape[-1:] for shape in shapes):
        raise ValueError(
            "norm_act: x must be (..., N) with N > 0, scale and shift (N,), got "
            f"{tuple(x.shape)}, {', '.join(map(str, shapes))}"
        )


def _check(x: Tensor, scale: Tensor, shift: Tensor | None, kind: str) -> None:
    _check_shapes(x, scale, shift, kind)
    tensors = [p for p in (x, scale, shift) if p is not None]
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    if dtype not in (torch.float32, torch.float64) or any(p.dtype != dtype for p in tensors[1:]):
        dtypes = ", ".join(str(p.dtype) for p in tensors)
        raise TypeError(
            f"norm_act: all float32 or all float64, or x bfloat16 among float32, got {dtypes}"
        )
    if devices := {p.device for p in tensors} - {x.device}:
        raise ValueError(f"norm_act: inputs on {x.device} and {devices.pop()}")


def _sizes(x: Tensor, kind: str, eps: float, silu: bool) -> tuple[Any, ...]:
    n = x.shape[-1]
    return x.numel() // n, n, kind == "layer", silu, eps, library.COMPUTE_DTYPES[x.dtype], None


def _cpu(
    x: Tensor, scale: Tensor, shift: Tensor | None, kind: str, eps: float, silu: bool = True
) -> Tensor:
    y = _fake(x, scale, shift, kind, eps, silu)
    x, scale = x.contiguous(), scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    if x.dtype == torch.float64:
        return norm_act(x, scale, shift, kind, eps, silu)
    library.function("fd_norm_act", FWD_SIGNATURE)(
        x.data_ptr(),
        scale.data_ptr(),
        None if shift is None else shift.data_ptr(),
        y.data_ptr(),
        *_sizes(x, kind, eps, silu),
    )
    return y


def _fake(
    x: Tensor, scale: Tensor, shift: Tensor | None, kind: str, eps: float, silu: bool = True
) -> Tensor:
    _check(x, scale, shift, kind)
    return x.new_empty(x.shape)


def _cpu_backward(
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
    if x.dtype == torch.float64:
        return _gradients(dy, x, scale, shift, kind, eps, silu)
    dx, dscale, dshift = grads
    library.function("fd_norm_act_backward", BWD_SIGNATURE)(
        dy.data_ptr(),
        x.data_ptr(),
        scale.data_ptr(),
        None if shift is None else shift.data_ptr(),
        dx.data_ptr(),
        dscale.data_ptr(),
        None if shift is None else dshift.data_ptr(),
        *_sizes(x, kind, eps, silu),
    )
    return grads


def _gradients(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in plain PyTorch, in any floating dtype; computed in that of scale."""
    given, x, dy = x.dtype, x.to(scale.dtype), dy.to(scale.dtype)
    centre = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    r = torch.rsqrt(centre.square().mean(-1, keepdim=True) + eps)
    xhat = centre * r
    if silu:
        n = xhat * scale if shift is None else xhat * scale + shift
        s = torch.sigmoid(n)
        dy = dy * s * (1 + n * (1 - s))
    dxhat = dy * scale
    dx = dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)
    if kind == "layer":
        dx = dx - dxhat.mean(-1, keepdim=True)
    dscale, dshift = ((dy * xhat).sum_to_size(scale.shape), dy.sum_to_size(scale.shape))
    return (dx * r).to(given), dscale, dshift if shift is not None else dshift[:0]


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, scale, shift, kind)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(f"norm_act: dy {tuple(dy.shape)} {dy.dtype}, x {tuple(x.shape)} {x.dtype}")
    dshift = scale.new_empty(0 if shift is None else scale.shape[0])
    return x.new_empty(x.shape), scale.new_empty(scale.shape), dshift


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, *ctx.options = inputs
    ctx.save_for_backward(x, scale, shift)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift = ctx.saved_tensors
    dx, dscale, dshift = torch.ops.fastdreamer.norm_act_backward(dy, x, scale, shift, *ctx.options)
    return dx, dscale, None if shift is None else dshift, None, None, None


register("norm_act", SCHEMA, _cpu, _fake, (_setup_context, _backward), autocast=False)
register("norm_act_backward", BACKWARD_SCHEMA, _cpu_backward, _fake_backward)
