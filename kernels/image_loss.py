"""Squared error between predicted and true images, in one pass over them each way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .register import register

SCHEMA = "(Tensor x, Tensor target, float shift, bool squash) -> Tensor"
BACKWARD_SCHEMA = "(Tensor dloss, Tensor x, Tensor target, float shift, bool squash) -> Tensor"
SIZES = library.SIZE * 2 + library.FLOAT + library.INT + library.DTYPE_AND_STREAM
SIGNATURE = library.OUTPUT * 3 + SIZES
BACKWARD_SIGNATURE = library.OUTPUT * 4 + SIZES


def image_loss(x: Tensor, target: Tensor, shift: float, squash: bool) -> Tensor:
    """Squared error without the 1/2, summed per image.

    Args:
        x: (..., H, W, C) predictions of target / 255 - shift, or with ``squash`` what becomes them
            by a sigmoid. target: (..., H, W, C) uint8.

    Returns:
        (...) in the dtype of x.

    Raises:
        ValueError: the shapes differ, or are not of images. TypeError: target is not uint8.

    This is the plain PyTorch form of ``torch.ops.fastdreamer.image_loss``, and takes any floating
    dtype and device; the operator computes float32 in C++.
    """
    _check(x, target)
    pred = torch.sigmoid(x) if squash else x
    target = target.to(x.dtype).div_(255)
    if shift:
        target.sub_(shift)
    return F.mse_loss(pred, target, reduction="none").flatten(-3).sum(-1)


def _check(x: Tensor, target: Tensor) -> None:
    if x.ndim < 3 or 0 in x.shape[-3:] or target.shape != x.shape:
        raise ValueError(
            f"image_loss: x and target must both be (..., H, W, C), got {tuple(x.shape)}, "
            f"{tuple(target.shape)}"
        )
    if target.dtype != torch.uint8:
        raise TypeError(f"image_loss: target must be torch.uint8, got {target.dtype}")


def image_loss_cpp(x: Tensor, target: Tensor, shift: float, squash: bool) -> Tensor:
    """`image_loss` by the C++ library for float32; other types by the reference."""
    if x.dtype != torch.float32:
        return image_loss(x, target, shift, squash)
    return torch.ops.fastdreamer.image_loss(x, target, shift, squash)


def _fake(x: Tensor, target: Tensor, shift: float, squash: bool) -> Tensor:
    _check(x, target)
    if x.dtype != torch.float32:
        raise TypeError(f"image_loss: x must be torch.float32, got {x.dtype}")
    if target.device != x.device:
        raise ValueError(f"image_loss: inputs on {x.device} and {target.device}")
    return x.new_empty(x.shape[:-3])


def _cpu(x: Tensor, target: Tensor, shift: float, squash: bool) -> Tensor:
    loss = _fake(x, target, shift, squash)
    x, target = x.contiguous(), target.contiguous()
    library.function("fd_image_loss", SIGNATURE)(
        x.data_ptr(), target.data_ptr(), loss.data_ptr(), *_sizes(x), shift, squash, 0, None
    )
    return loss


def _sizes(x: Tensor) -> tuple[int, int]:
    each = x.shape[-3:].numel()
    return x.numel() // each, each


def _fake_backward(dloss: Tensor, x: Tensor, target: Tensor, shift: float, squash: bool) -> Tensor:
    loss = _fake(x, target, shift, squash)
    if dloss.shape != loss.shape or dloss.dtype != loss.dtype:
        raise ValueError(
            f"image_loss: dloss must be {tuple(loss.shape)} of {loss.dtype}, got "
            f"{tuple(dloss.shape)} of {dloss.dtype}"
        )
    return x.new_empty(x.shape)


def _cpu_backward(dloss: Tensor, x: Tensor, target: Tensor, shift: float, squash: bool) -> Tensor:
    dx = _fake_backward(dloss, x, target, shift, squash)
    inputs = [tensor.contiguous() for tensor in (dloss, x, target)]
    library.function("fd_image_loss_backward", BACKWARD_SIGNATURE)(
        *(t.data_ptr() for t in inputs), dx.data_ptr(), *_sizes(x), shift, squash, 0, None
    )
    return dx


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, target, *ctx.options = inputs
    ctx.save_for_backward(x, target)


def _backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
    dx = torch.ops.fastdreamer.image_loss_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dx, None, None, None


register("image_loss", SCHEMA, _cpu, _fake, (_setup_context, _backward))
register("image_loss_backward", BACKWARD_SCHEMA, _cpu_backward, _fake_backward)
