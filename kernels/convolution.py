"""What the convolutions that halve or double images share: shapes, C structures, the plain form.

Legend: N images, H rows, W columns, C channels before and O after; H', W' the size after.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import Arguments

KINDS = ("pool", "stride", "upsample", "transpose")  # as in csrc/fastdreamer.h


def channels_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As PyTorch takes images, channels-last in memory; pixels as numbers."""
    if x.dtype == torch.uint8:
        x = x.to(dtype) / 255 - 0.5
    return x.contiguous().permute(0, 3, 1, 2)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """A convolution as in `conv_norm_act`, by PyTorch; (N, H, W, C) -> (N, H', W', O)."""
    x = channels_first(x, weight.dtype)
    if kind == "upsample":
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if kind == "transpose":
        y = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    elif kind == "stride":
        y = F.conv2d(x, weight, bias, stride=2, padding=1)
    else:
        y = F.conv2d(x, weight, bias, padding=2)
    if kind == "pool":
        y = F.max_pool2d(y, 2)
    return y.permute(0, 2, 3, 1)


def output_shape(x: Tensor, weight: Tensor, kind: str) -> torch.Size:
    n, height, width, _ = x.shape
    if kind in ("pool", "stride"):
        return torch.Size((n, height // 2, width // 2, weight.shape[0]))
    return torch.Size((n, 2 * height, 2 * width, weight.shape[1 if kind == "transpose" else 0]))


def check_shapes(name: str, x: Tensor, weight: Tensor, kind: str, *vectors: Tensor | None) -> None:
    """Raises ValueError where tensors of the operator ``name`` do not fit."""
    if kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {KINDS}, not {kind!r}")
    shapes = [tuple(p.shape) for p in vectors if p is not None]
    halves = kind in ("pool", "stride")
    window = (5, 5) if kind in ("pool", "upsample") else (4, 4)
    if (
        x.ndim != 4
        or 0 in x.shape[1:]
        or (halves and (x.shape[1] % 2 or x.shape[2] % 2))
        or weight.ndim != 4
        or 0 in weight.shape
        or weight.shape[2:] != window
        or weight.shape[0 if kind == "transpose" else 1] != x.shape[3]
        or any(v != (weight.shape[1 if kind == "transpose" else 0],) for v in shapes)
    ):
        raise ValueError(
            f"{name}: {kind} takes x (N, H, W, C){' with H and W even' * halves}, weight "
            f"{'(C, O' if kind == 'transpose' else '(O, C'}, {window[0]}, {window[1]}) and vectors "
            f"(O,), got {tuple(x.shape)}, {tuple(weight.shape)}, {shapes}"
        )


def library_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether channels and images are within the limits of ``fd_conv``."""
    channels = weight.shape[:2]
    pixels = 4 * x.shape[1] * x.shape[2]
    return channels.numel() <= 2**24 // 40 and pixels * max(channels) <= 2**26


_POINTER = ctypes.c_void_p


class CConv(Arguments):
    """``fd_conv``."""

    _fields_: ClassVar = [
        *((k, ctypes.c_int32) for k in ("kind", "input", "output", "centred")),
        ("eps", ctypes.c_float),
        *((k, ctypes.c_int64) for k in "NHWCO"),
        *((k, _POINTER) for k in ("x", "weight", "bias", "scale", "shift", "y", "z", "index")),
    ]


class CConvGrad(Arguments):
    """``fd_conv_grad``."""

    _fields_: ClassVar = [
        (k, _POINTER) for k in ("dy", "weight", "dx", "dweight", "dbias", "dscale", "dshift")
    ]


FWD_SIGNATURE = (ctypes.POINTER(CConv),)
BWD_SIGNATURE = (ctypes.POINTER(CConv), ctypes.POINTER(CConvGrad))
