"""A linear layer on features whose latents are one-hot: their share is a sum of weight rows.

Legend: N rows, D deter, S stoch, K classes, O outputs.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .register import register


class Latents(NamedTuple):
    """Where the one-hot latents of features are, and what they drew."""

    drawn: Tensor  # (..., S) int32, the class of each; -1 where all entries are 0
    start: int  # 0 or D
    classes: int


FEWEST_CLASSES = 16
"""With fewer, the product that the rows replace costs no more than they do on a CPU."""


def latent_linear(
    feat: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, start: int, classes: int
) -> Tensor:
    """Linear layer on features of a state; differentiable in weight and bias only.

    Args:
        feat: (..., D + S K) float, without gradient; S K of its entries are S one-hot (or zero)
            latents behind one another.
        index: (..., S) int32, the class of each latent; -1 where all of its entries are 0.
        weight: (O, D + S K). bias: (O,) or None.
        start: where the latents begin, 0 or D. classes: K.

    Returns:
        (..., O), equal to ``F.linear(feat, weight, bias)``.

    Raises:
        ValueError: shapes that do not fit, or ``feat`` requires a gradient.
    """
    _check(feat, index, weight, start, classes)
    return F.linear(feat, weight, bias)


def compiled_latent_linear(
    feat: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, start: int, classes: int
) -> Tensor:
    """`latent_linear` by the operator for float32; other types and few classes by the reference.

    Raises RuntimeError in C++ where a class is out of range; a GPU takes it for -1.
    """
    if feat.dtype != torch.float32 or classes < FEWEST_CLASSES:
        return latent_linear(feat, index, weight, bias, start, classes)
    rows = feat.flatten(0, -2), index.flatten(0, -2)
    y = torch.ops.fastdreamer.latent_linear(*rows, weight, start, classes)
    y = y if bias is None else y + bias
    return y.unflatten(0, feat.shape[:-1])


def _check(feat: Tensor, index: Tensor, weight: Tensor, start: int, classes: int) -> None:
    if feat.requires_grad:
        raise ValueError("latent_linear has no gradient for feat: detach it")
    latent = index.shape[-1] * classes
    fits = start in (0, feat.shape[-1] - latent) and feat.shape[-1] >= latent
    if feat.shape[:-1] != index.shape[:-1] or weight.shape[1:] != feat.shape[-1:] or not fits:
        raise ValueError(
            f"latent_linear: feat {tuple(feat.shape)}, index {tuple(index.shape)} and weight "
            f"{tuple(weight.shape)} do not fit {classes} classes from {start} on"
        )


def _parts(x: Tensor, start: int, latent: int) -> tuple[Tensor, Tensor]:
    """The columns of deter and those of the latents."""
    first, second = x.split(
        [start, x.shape[1] - start] if start else [latent, x.shape[1] - latent], 1
    )
    return (first, second) if start else (second, first)


_POINTERS = (ctypes.c_void_p,) * 3
SIGNATURE = (*_POINTERS, *library.SIZE * 4, *library.DTYPE_AND_STREAM)
SCHEMA = "(Tensor feat, Tensor index, Tensor weight, int start, int classes) -> Tensor"
BACKWARD_SCHEMA = "(Tensor dy, Tensor feat, Tensor index, int start, int classes) -> Tensor"


def _fake(feat: Tensor, index: Tensor, weight: Tensor, start: int, classes: int) -> Tensor:
    _check(feat, index, weight, start, classes)
    for name, x, dtype in (
        ("feat", feat, torch.float32),
        ("weight", weight, torch.float32),
        ("index", index, torch.int32),
    ):
        if x.dtype != dtype:
            raise TypeError(f"latent_linear: {name} must be {dtype}, got {x.dtype}")
    return feat.new_empty(feat.shape[0], weight.shape[0])


def _cpu(feat: Tensor, index: Tensor, weight: Tensor, start: int, classes: int) -> Tensor:
    y = _fake(feat, index, weight, start, classes)
    latent = index.shape[1] * classes
    deter, _ = _parts(feat, start, latent)
    by_deter, by_latent = _parts(weight, start, latent)
    torch.mm(deter, by_deter.t(), out=y)
    table, index = by_latent.t().contiguous(), index.contiguous()
    _call("fd_latent_gather", (table, index, y), classes)
    return y


def _call(name: str, tensors: tuple[Tensor, Tensor, Tensor], classes: int) -> None:
    (rows, latents), outputs = tensors[1].shape, tensors[2].shape[1]
    library.function(name, SIGNATURE)(
        *(x.data_ptr() for x in tensors), rows, latents, classes, outputs, 0, None
    )


def _fake_backward(dy: Tensor, feat: Tensor, index: Tensor, start: int, classes: int) -> Tensor:
    return dy.new_empty(dy.shape[1], feat.shape[1])


def _cpu_backward(dy: Tensor, feat: Tensor, index: Tensor, start: int, classes: int) -> Tensor:
    dweight = _fake_backward(dy, feat, index, start, classes)
    latent = index.shape[1] * classes
    deter, _ = _parts(feat, start, latent)
    by_deter, by_latent = _parts(dweight, start, latent)
    by_deter.copy_(dy.t() @ deter)
    dtable = dy.new_zeros(latent, dy.shape[1])
    _call("fd_latent_scatter", (dy.contiguous(), index.contiguous(), dtable), classes)
    by_latent.copy_(dtable.t())
    return dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feat, index, _weight, ctx.start, ctx.classes = inputs
    ctx.save_for_backward(feat, index)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dweight = torch.ops.fastdreamer.latent_linear_backward(
        dy, *ctx.saved_tensors, ctx.start, ctx.classes
    )
    return None, None, dweight, None, None


register("latent_linear", SCHEMA, _cpu, _fake, (_setup_context, _backward))
register("latent_linear_backward", BACKWARD_SCHEMA, _cpu_backward, _fake_backward)
