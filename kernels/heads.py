"""Heads on the features of imagined states: what each says, with one product for all first layers.

Legend: N rows, D deter, S stoch, K classes, U units, O outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import library
from .latent_linear import FEWEST_CLASSES, Latents, compiled_latent_linear
from .library import Arguments
from .register import compute_type, register
from .rssm_weights import MAX_LAYERS, CLayer, Layer, c_layer, layer_shapes
from .twohot import bins, symexp, twohot_mean

MAX_FEATURE_HEADS = 16  # of one call, as in csrc/gru.h


class Ran(NamedTuple):
    """What layers gave for some rows, and what their gradient needs of that.

    outputs: (..., O). kept: (rows * `kept_width`,), see ``fd_head``.
    """

    outputs: Tensor
    kept: Tensor


class Head(NamedTuple):
    """Layers behind one another on features.

    layers: all but perhaps the last with a norm. layout: of two-hot bins, whose mean is wanted;
    None for the outputs themselves. trained: with gradient to the weights; then without layout.
    ran: of a trained one, where these layers ran on these features before.
    """

    layers: tuple[Layer, ...]
    layout: str | None = None
    trained: bool = False
    ran: Ran | None = None


def heads(feat: Tensor, latents: Latents, given: Sequence[Head], eps: float) -> list[Tensor]:
    """What heads say of features; differentiable in the weights of those that are trained.

    Args:
        feat: (..., D + S K) float, without gradient. latents: the one-hot latents in it.
        given: the heads. eps: of their norms.

    Returns:
        For each head (..., O), or with a layout (...): the mean as of `twohot_mean`.

    Raises:
        ValueError: ``feat`` requires a gradient, or shapes do not fit.
    """
    return [_by_reference(feat, head, eps) for head in given]


def _by_reference(feat: Tensor, head: Head, eps: float) -> Tensor:
    _check_feat(feat)
    with torch.set_grad_enabled(torch.is_grad_enabled() and head.trained):
        for layer in head.layers:
            feat = layer(feat, eps)
        return feat if head.layout is None else twohot_mean(feat, head.layout)


def _check_feat(feat: Tensor) -> None:
    if feat.requires_grad:
        raise ValueError("heads has no gradient for feat: detach it")


def heads_by_operators(
    feat: Tensor, latents: Latents, given: Sequence[Head], eps: float
) -> list[Tensor]:
    """`heads`, layer by layer, by the operators of the features' device.

    In bfloat16 on a GPU, or by AMX, the product costs less than the rows that would replace it:
    there features are rounded once for all heads.
    """
    _check_feat(feat)
    mixed = feat.dtype == torch.float32 and compute_type(feat.device.type) == torch.bfloat16
    dense = mixed and (feat.is_cuda or library.has_amx())
    x, rows = (feat.bfloat16(), None) if dense else (feat, latents)
    return [_by_operators(x, rows, head, eps) for head in given]


def _by_operators(feat: Tensor, latents: Latents | None, head: Head, eps: float) -> Tensor:
    operators = torch.ops.fastdreamer
    with torch.set_grad_enabled(torch.is_grad_enabled() and head.trained):
        x = feat
        for weight, bias, scale, shift in head.layers:
            if x is feat and latents is not None:
                x = compiled_latent_linear(x, latents.drawn, weight, bias, *latents[1:])
            else:
                x = F.linear(x, weight, bias)
            if scale is not None:
                kind = "rms" if shift is None else "layer"
                x = operators.norm_act(x, scale, shift, kind, eps)
        x = x.to(weight.dtype)  # what mixed precision left in bfloat16
        return x if head.layout is None else operators.twohot_mean(x, head.layout)


SHARED_WEIGHTS = 2**18
"""Of all first layers, up to which one product for all is faster on a CPU: a core's second cache
keeps them. Beyond, heads with gradient are also faster layer by layer."""


def heads_cpp(feat: Tensor, latents: Latents, given: Sequence[Head], eps: float) -> list[Tensor]:
    """`heads` by the C++ library for float32; other types by operators.

    Heads that ran are not run again. In mixed precision others with gradient go by operators. Those
    without stay float32 in the library unless there is AMX: products by vdpbf16ps are slower.
    Raises RuntimeError where a class is out of range.
    """
    mixed = compute_type("cpu") == torch.bfloat16
    fits = len(given) <= MAX_FEATURE_HEADS and all(len(h.layers) <= MAX_LAYERS for h in given)
    if feat.dtype != torch.float32 or not fits or (mixed and library.has_amx()):
        return heads_by_operators(feat, latents, given, eps)
    _check_feat(feat)
    said = {i: _differentiable(x, feat, latents, eps) for i, x in enumerate(given) if x.ran}
    new = [i for i in range(len(given)) if i not in said]
    held = [i for i in new if not (mixed and given[i].trained)]
    if held and sum(given[i].layers[0].weight.numel() for i in held) <= SHARED_WEIGHTS:
        groups = [held]
    else:
        groups = [[i] for i in held if not given[i].trained]
    for group in groups:
        said |= zip(group, _by_library(feat, latents, [given[i] for i in group], eps), strict=True)
    rest = [i for i in new if i not in said]
    said |= zip(rest, heads_by_operators(feat, latents, [given[i] for i in rest], eps), strict=True)
    return [said[i] for i in range(len(given))]


def _by_library(feat: Tensor, latents: Latents, given: Sequence[Head], eps: float) -> list[Tensor]:
    tensors = [x for head in given for layer in head.layers for x in layer]
    counts, layouts = [len(head.layers) for head in given], [head.layout or "" for head in given]
    rows = feat.flatten(0, -2), latents.drawn.flatten(0, -2)
    trained = [head.trained and torch.is_grad_enabled() for head in given]
    with torch.no_grad():
        outputs = torch.ops.fastdreamer.heads(
            *rows, tensors, counts, layouts, trained, latents.start, latents.classes, eps
        )
    results, kept = [], iter(outputs[len(given) :])
    for head, y, wants in zip(given, outputs, trained, strict=False):
        y = y.unflatten(0, feat.shape[:-1])
        if wants:
            y = _differentiable(head._replace(ran=Ran(y, next(kept))), feat, latents, eps)
        results.append(y)
    return results


def _differentiable(head: Head, feat: Tensor, latents: Latents, eps: float) -> Tensor:
    """The outputs of a head that ran, with their gradient to its weights."""
    assert head.ran is not None and head.trained and head.layout is None
    rows = feat.flatten(0, -2), latents.drawn.flatten(0, -2)
    options = (latents.start, latents.classes, eps)
    weights = [x for layer in head.layers for x in layer]
    return _Trained.apply(*head.ran, *rows, *options, *weights)


class _Trained(torch.autograd.Function):
    """A head whose outputs are there already, with what was kept: its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        kept: Tensor,
        feat: Tensor,
        index: Tensor,
        start: int,
        classes: int,
        eps: float,
        *weights: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(kept, feat, index, *weights)
        ctx.latents, ctx.eps = (start, classes), eps
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Trained.gradients(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    @once_differentiable  # in the weights too: what was kept would be taken for constant
    def gradients(
        ctx: Any, dy: Tensor, kept: Tensor, feat: Tensor, index: Tensor, *weights: Any
    ) -> tuple[Tensor | None, ...]:
        head = Head(tuple(Layer(*weights[i : i + 4]) for i in range(0, len(weights), 4)))
        before, inputs = _kept_matrices(kept, head, feat)
        dy = dy.flatten(0, -2)
        grads: list[Tensor | None] = []
        for i, (weight, bias, scale, shift) in reversed(list(enumerate(head.layers))):
            dscale = dshift = None
            if scale is not None:
                kind = "rms" if shift is None else "layer"
                dy, dscale, dshift = torch.ops.fastdreamer.norm_act_backward(
                    dy, before[i], scale, shift, kind, ctx.eps, True
                )
            dbias = None if bias is None else dy.sum(0)
            dweight = dy.t() @ inputs[i] if i else _first_gradient(dy, feat, index, *ctx.latents)
            grads = [dweight, dbias, dscale, None if shift is None else dshift, *grads]
            dy = dy @ weight if i else dy
        return *(None,) * 7, *grads


def _first_gradient(dy: Tensor, feat: Tensor, index: Tensor, start: int, classes: int) -> Tensor:
    """Of the weight over features (O, D + S K), by the drawn classes where that is faster."""
    if classes < FEWEST_CLASSES:
        return dy.t() @ feat
    return torch.ops.fastdreamer.latent_linear_backward(dy, feat, index, start, classes)


def kept_width(layers: Sequence[Layer]) -> int:
    """Numbers that are kept of a row."""
    return sum(_kept_widths(layers))


def _kept_widths(layers: Sequence[Layer]) -> list[int]:
    """Of the matrices that are kept, in the order of ``fd_head``."""
    normed = [(i, x.weight.shape[0]) for i, x in enumerate(layers) if x.scale is not None]
    return [n for i, n in normed for _ in range(1 + (i + 1 < len(layers)))]


def _kept_matrices(kept: Tensor, head: Head, feat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer's norm took, and what each layer took."""
    widths, rows = _kept_widths(head.layers), len(feat)
    parts = kept.split([rows * n for n in widths])
    matrices = [x.view(rows, n) for x, n in zip(parts, widths, strict=True)]
    return matrices[::2], [feat, *matrices[1::2]]


class CHead(ctypes.Structure):
    """``fd_head``."""

    _fields_: ClassVar = [
        ("layers", ctypes.POINTER(CLayer)),
        ("count", ctypes.c_int64),
        ("bins", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
    ]


class CHeads(Arguments):
    """``fd_heads``."""

    _fields_: ClassVar = [
        *((k, ctypes.c_int64) for k in ("N", "deter", "stoch", "classes")),
        ("deter_first", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("feat", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("heads", ctypes.POINTER(CHead)),
        ("count", ctypes.c_int64),
    ]


SIGNATURE = (ctypes.POINTER(CHeads),)
SCHEMA = (
    "(Tensor feat, Tensor index, Tensor?[] layers, int[] counts, str[] layouts, bool[] trained, "
    "int start, int classes, float eps) -> Tensor[]"
)


def _unflatten(
    tensors: Sequence[Tensor | None], counts: Sequence[int], layouts: Sequence[str]
) -> list[Head]:
    layers = iter(Layer(*tensors[i : i + 4]) for i in range(0, len(tensors), 4))  # type: ignore
    pairs = zip(counts, layouts, strict=True)
    return [Head(tuple(next(layers) for _ in range(n)), layout or None) for n, layout in pairs]


def _fake(
    feat: Tensor,
    index: Tensor,
    layers: Sequence[Tensor | None],
    counts: Sequence[int],
    layouts: Sequence[str],
    trained: Sequence[bool],
    start: int,
    classes: int,
    eps: float,
) -> list[Tensor]:
    given = _unflatten(layers, counts, layouts)
    rows, latent = feat.shape[0], index.shape[1] * classes
    deter = feat.shape[1] - latent
    if index.shape[0] != rows or deter < 1 or start not in (0, deter):
        raise ValueError(
            f"heads: feat {tuple(feat.shape)} and index {tuple(index.shape)} do not fit {classes} "
            f"classes from {start} on"
        )
    if index.dtype != torch.int32:
        raise TypeError(f"heads: index must be torch.int32, got {index.dtype}")
    for head in given:
        for x, shape in layer_shapes(head.layers, feat.shape[1]):
            if tuple(x.shape) != shape:
                raise ValueError(f"heads: a weight must be {shape}, got {tuple(x.shape)}")
            if x.dtype != feat.dtype:
                raise TypeError(f"heads: all of {feat.dtype}, got {x.dtype}")
    outputs = ((h.layers[-1].weight.shape[0], h.layout) for h in given)
    results = [feat.new_empty((rows,) if layout else (rows, n)) for n, layout in outputs]
    wanted = (head for head, wants in zip(given, trained, strict=True) if wants)
    return results + [feat.new_empty(rows * kept_width(head.layers)) for head in wanted]


def _cpu(
    feat: Tensor,
    index: Tensor,
    layers: Sequence[Tensor | None],
    counts: Sequence[int],
    layouts: Sequence[str],
    trained: Sequence[bool],
    start: int,
    classes: int,
    eps: float,
) -> list[Tensor]:
    results = _fake(feat, index, layers, counts, layouts, trained, start, classes, eps)
    feat, index = feat.contiguous(), index.contiguous()
    given = _unflatten([None if x is None else x.contiguous() for x in layers], counts, layouts)
    c_heads = (CHead * len(given))()
    kept = iter(results[len(given) :])
    for c_head, head, y, wants in zip(c_heads, given, results, trained, strict=False):
        c_head.layers = (CLayer * len(head.layers))(*map(c_layer, head.layers))
        c_head.count, c_head.y = len(head.layers), y.data_ptr()
        if head.layout:
            outputs = head.layers[-1].weight.shape[0]
            c_head.bins = bins(head.layout, outputs, feat.dtype, feat.device).data_ptr()
        if wants:
            c_head.kept = next(kept).data_ptr()
    arguments = CHeads.of(
        N=feat.shape[0],
        deter=feat.shape[1] - index.shape[1] * classes,
        stoch=index.shape[1],
        classes=classes,
        deter_first=start > 0,
        eps=eps,
        feat=feat,
        index=index,
        heads=c_heads,
        count=len(given),
    )
    library.function("fd_run_heads", SIGNATURE)(ctypes.byref(arguments))
    for i, head in enumerate(given):
        if head.layout == "symlog":
            results[i] = symexp(results[i])
    return results


register("heads", SCHEMA, _cpu, _fake)
