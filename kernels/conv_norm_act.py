"""Convolution that halves or doubles images, with norm and SiLU behind it.

Legend: N images, H rows, W columns, C channels before and O after; H', W' the size after.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .conv_taps import GRADIENT, backward_weight, forward_weight, weight_gradient
from .convolution import (
    BWD_SIGNATURE,
    FWD_SIGNATURE,
    KINDS,
    CConv,
    CConvGrad,
    channels_first,
    check_shapes,
    convolution,
    library_takes,
    output_shape,
)
from .norm_act import norm_act
from .register import compute_type, register
from .winograd import winograd

BLOCK = 16  # images that the C++ library computes side by side, as there
FEW_CHANNELS = 1024  # product of C and O
LEAST_TILES = 128
TYPES = library.COMPUTE_DTYPES | {torch.uint8: 3}  # of images, as in csrc/fastdreamer.h


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    norm: str,
    eps: float,
) -> Tensor:
    """Convolution, norm over channels, SiLU; (N, H, W, C) -> (N, H', W', O).

    "pool" is a 5x5 convolution and the maximum of every 2x2, "stride" a 4x4 one of stride 2; both
    halve. "upsample" is a 5x5 convolution of the image with every pixel doubled both ways,
    "transpose" a transposed 4x4 one of stride 2; both double. Borders are zeros.

    Args:
        x: (N, H, W, C), H and W even where they are halved. uint8 pixels are taken as
            x/255 - 0.5.
        weight: (O, C, 5, 5), (O, C, 4, 4) or, transposed, (C, O, 4, 4).
        bias: (O,), or None for none.
        scale, shift: (O,) of the norm as in `norm_act`; without scale there is neither norm nor
            SiLU.
        kind: one of `KINDS`.
        norm: "layer" or "rms".
        eps: of the norm.

    Returns:
        (N, H', W', O) of weight's dtype.

    Raises:
        ValueError: an unknown kind or shapes that do not fit.

    This is the plain PyTorch form of ``torch.ops.fastdreamer.conv_norm_act``, and takes any
    floating dtype and device; the operator computes in float32, and takes x, and gives y, in
    bfloat16 too.
    """
    _check_shapes(x, weight, bias, scale, shift, kind)
    y = convolution(x, weight, bias, kind)
    return y if scale is None else norm_act(y, scale, shift, norm, eps)


def conv_norm_act_cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    norm: str,
    eps: float,
) -> Tensor:
    """`conv_norm_act` by the C++ library, or by PyTorch's convolutions where those are faster.

    In mixed precision the library computes in float32, reads bfloat16 and, before further layers,
    gives it; the last images, without a norm, are float32.
    """
    _check_shapes(x, weight, bias, scale, shift, kind)
    way = _fastest_way(x, weight, kind, bias, scale, shift)
    if way == "conv_norm_act":
        operator = torch.ops.fastdreamer.conv_norm_act
        dtype = torch.float32 if scale is None else compute_type(x.device.type)
        return operator(x, weight, bias, scale, shift, kind, norm, eps, dtype)[0]
    if way == "winograd":
        return _norm_act(winograd(x, weight, bias, kind), scale, shift, norm, eps)
    return conv_then_norm_act(x, weight, bias, scale, shift, kind, norm, eps)


def conv_then_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    norm: str,
    eps: float,
) -> Tensor:
    """`conv_norm_act` by PyTorch's convolution and the operator `norm_act` of x's device."""
    _check_shapes(x, weight, bias, scale, shift, kind)
    if kind == "upsample" and x.device.type == "cpu":  # on a GPU not yet measured
        y = _upsampled_by_parity(x, weight, bias)
    else:
        y = convolution(x, weight, bias, kind)
    return _norm_act(y, scale, shift, norm, eps)


def _norm_act(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, norm: str, eps: float
) -> Tensor:
    return y if scale is None else torch.ops.fastdreamer.norm_act(y, scale, shift, norm, eps)


def _fastest_way(x: Tensor, weight: Tensor, kind: str, *vectors: Tensor | None) -> str:
    """The operator "conv_norm_act" for few channels, "winograd" for many, or "pytorch".

    Both serve batches of many images in float32, the first also those that mixed precision left in
    bfloat16. Measured forward and backward with one thread, in AVX-512 and AVX2: the first takes
    0.1 to 1.04 of PyTorch's time up to FEW_CHANNELS, where the second takes 0.6 to 0.95 of the
    first's; from there on the second takes 0.4 to 0.9 of PyTorch's on 1024 images, but up to 1.5
    where tiles hang over the border, and up to 2 with a few dozen tiles.
    """
    dtypes = {p.dtype for p in (weight, *vectors) if p is not None}
    if dtypes != {torch.float32} or len(x) < BLOCK or not library_takes(x, weight):
        return "pytorch"
    channels = weight.shape[:2].numel()
    if channels >= FEW_CHANNELS and _fits_winograd(x, kind):
        return "winograd"
    return "conv_norm_act" if channels <= FEW_CHANNELS and x.dtype in TYPES else "pytorch"


def _fits_winograd(x: Tensor, kind: str) -> bool:
    """In float32, also within autocast; sides that whole tiles of outputs fill; and so many tiles
    that transforming the weights is worth it."""
    if x.dtype != torch.float32 or compute_type(x.device.type) != torch.float32:
        return False
    tile = {"pool": 2, "stride": 8}.get(kind, 4)
    rows, columns = x.shape[1] // tile, x.shape[2] // tile
    filled = x.shape[1] % tile == 0 and x.shape[2] % tile == 0
    return filled and len(x) * rows * columns >= LEAST_TILES


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
) -> None:
    check_shapes("conv_norm_act", x, weight, kind, bias, scale, shift)
    if shift is not None and scale is None:
        raise ValueError("conv_norm_act: a shift without a scale")


def _upsampled_by_parity(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kind "upsample" as one 3x3 convolution of the small image, with channels by parity.

    A row or column of the doubled image is one of the small image twice, so that a 5x5 window
    meets 3x3 pixels, and weights on the same pixel are summed before: 36 products for 100.
    """
    columns = _by_parity(_by_parity(weight, 2), 4)  # (2, 3, 2, 3, O, C): columns, rows
    by_parity = columns.permute(2, 0, 4, 5, 3, 1).flatten(0, 2)
    bias = None if bias is None else bias.repeat(4)
    y = F.conv2d(channels_first(x, weight.dtype), by_parity, bias, padding=1)
    y = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, weight.shape[0]))  # (N, H, W, 2, 2, O)
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _by_parity(weight: Tensor, dim: int) -> Tensor:
    """Five taps along an axis -> (2, 3, the other axes): of even and of odd positions."""
    a, b, c, d, e = weight.unbind(dim)
    return torch.stack([torch.stack([a + b, c + d, e]), torch.stack([a, b + c, d + e])])


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    norm: str,
) -> None:
    _check_shapes(x, weight, bias, scale, shift, kind)
    tensors = [p for p in (weight, bias, scale, shift) if p is not None]
    dtypes = [p.dtype for p in (x, *tensors)]
    if dtypes[0] not in TYPES or set(dtypes[1:]) != {torch.float32}:
        got = ", ".join(map(str, dtypes))
        raise TypeError(f"conv_norm_act: all float32, or x bfloat16 or uint8, got {got}")
    if devices := {p.device for p in tensors} - {x.device}:
        raise ValueError(f"conv_norm_act: inputs on {x.device} and {devices.pop()}")
    if norm not in ("layer", "rms") or (norm == "rms" and shift is not None):
        raise ValueError(f"conv_norm_act: norm {norm!r}; it must be layer, or rms without a shift")


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    norm: str,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of ``dtype``; its value before the norm and which pixels were the maxima, in blocks."""
    _check(x, weight, bias, scale, shift, kind, norm)
    shape = output_shape(x, weight, kind)
    z, words = _kept_shapes(shape)
    kept = weight.new_empty(0 if scale is None else z)
    index = weight.new_empty(words if kind == "pool" else 0, dtype=torch.int32)
    return weight.new_empty(shape, dtype=dtype), kept, index


def _kept_shapes(shape: torch.Size) -> tuple[torch.Size, torch.Size]:
    """Of z and index for an output's shape; index has two bits for each of 16 channels."""
    n, height, width, channels = shape
    blocks, words = (n + BLOCK - 1) // BLOCK, (channels + 15) // 16
    kept = torch.Size((blocks, height, width, channels, BLOCK))
    return kept, torch.Size((blocks, height, width, words, BLOCK))


def _c_conv(
    x: Tensor,
    outputs: int,
    output: torch.dtype,
    scale: Tensor | None,
    shift: Tensor | None,
    options: tuple[str, str, float],
    **tensors: Tensor | None,
) -> Any:
    kind, norm, eps = options
    n, height, width, channels = x.shape
    return CConv.of(
        kind=KINDS.index(kind),
        input=TYPES[x.dtype],
        output=TYPES[output],
        centred=norm == "layer",
        eps=eps,
        N=n,
        H=height,
        W=width,
        C=channels,
        O=outputs,
        x=x,
        scale=scale,
        shift=shift,
        **tensors,
    )


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    norm: str,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    y, z, index = outputs = _fake(x, weight, bias, scale, shift, kind, norm, eps, dtype)
    x, taps = x.contiguous(), forward_weight(weight, kind)
    bias, scale, shift = (None if p is None else p.contiguous() for p in (bias, scale, shift))
    tensors = {"weight": taps, "bias": bias, "y": y, "z": z, "index": index}
    conv = _c_conv(x, y.shape[3], dtype, scale, shift, (kind, norm, eps), **tensors)
    library.function("fd_conv_norm_act", FWD_SIGNATURE)(ctypes.byref(conv))
    return outputs


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    z: Tensor,
    index: Tensor,
    kind: str,
    norm: str,
    eps: float,
    wants_dx: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x (empty if not wanted), weight, bias, scale and shift (zeros without them)."""
    _check(x, weight, None, scale, shift, kind, norm)
    if wants_dx and x.dtype == torch.uint8:
        raise TypeError("conv_norm_act: pixels of uint8 have no gradient")
    shape = output_shape(x, weight, kind)
    if dy.shape != shape or dy.dtype not in library.COMPUTE_DTYPES:
        got = f"{tuple(dy.shape)} {dy.dtype}"
        raise ValueError(f"conv_norm_act: dy {got}, y {tuple(shape)} float32 or bfloat16")
    kept, words = _kept_shapes(shape)
    if z.numel() != kept.numel() * (scale is not None) or (
        index.numel() != words.numel() * (kind == "pool")
    ):
        raise ValueError("conv_norm_act: z and index must be those of the forward pass")
    dx, dweight = x.new_empty(x.shape if wants_dx else 0), weight.new_empty(weight.shape)
    return dx, dweight, *(weight.new_empty(shape[3]) for _ in range(3))


def _cpu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    z: Tensor,
    index: Tensor,
    kind: str,
    norm: str,
    eps: float,
    wants_dx: bool,
) -> tuple[Tensor, ...]:
    dx, _, *dvectors = _fake_backward(
        dy, x, weight, scale, shift, z, index, kind, norm, eps, wants_dx
    )
    dy, x, z, index = (p.contiguous() for p in (dy, x, z, index))
    scale, shift = (None if p is None else p.contiguous() for p in (scale, shift))
    conv = _c_conv(x, dy.shape[3], dy.dtype, scale, shift, (kind, norm, eps), z=z, index=index)
    taps, order = GRADIENT[kind].shape[1], (1, 0) if kind in ("upsample", "transpose") else (0, 1)
    channels = x.shape[3], dvectors[0].shape[0]
    dtaps = weight.new_empty(taps, taps, *(channels[i] for i in order))
    names = ("dbias", "dscale", "dshift")
    back = backward_weight(weight, kind) if wants_dx else None
    grad = CConvGrad.of(
        dy=dy,
        weight=back,
        dx=dx if wants_dx else None,
        dweight=dtaps,
        **dict(zip(names, dvectors, strict=True)),
    )
    function = library.function("fd_conv_norm_act_backward", BWD_SIGNATURE)
    function(ctypes.byref(conv), ctypes.byref(grad))
    return dx, weight_gradient(dtaps, kind), *dvectors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, *ctx.options, _dtype = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, scale, shift, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros in the size of what is kept


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    wants_dx = ctx.needs_input_grad[0]
    dx, dweight, dbias, dscale, dshift = torch.ops.fastdreamer.conv_norm_act_backward(
        dy, *ctx.saved_tensors, *ctx.options, wants_dx
    )
    _x, _weight, scale, shift = ctx.saved_tensors[:4]
    return (
        dx if wants_dx else None,
        dweight,
        dbias if ctx.has_bias else None,
        None if scale is None else dscale,
        None if shift is None else dshift,
        *(None,) * 4,
    )


_WEIGHTS = "Tensor? scale, Tensor? shift"
_OPTIONS = "str kind, str norm, float eps"
register(
    "conv_norm_act",
    f"(Tensor x, Tensor weight, Tensor? bias, {_WEIGHTS}, {_OPTIONS}, "
    "ScalarType dtype=float) -> "
    "(Tensor y, Tensor z, Tensor index)",
    _cpu,
    _fake,
    (_setup_context, _backward),
    autocast=False,
)
register(
    "conv_norm_act_backward",
    f"(Tensor dy, Tensor x, Tensor weight, {_WEIGHTS}, Tensor z, Tensor index, {_OPTIONS}, "
    "bool wants_dx) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift)",
    _cpu_backward,
    _fake_backward,
)
