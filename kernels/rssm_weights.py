"""Weights of a recurrent state-space model, its step functions, and its form for the C library.

Legend: B batch, D deter, S stoch, K classes, A action, U hidden, G blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gru_step import block_gru_step, gru_step
from .unimix import unimix


class Layer(NamedTuple):
    """Linear layer, with norm and SiLU behind it where ``scale`` is given.

    weight (O, I), rows may be strided; bias, scale, shift (O,). The norm is a LayerNorm with
    ``shift``, an RMSNorm without.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.activate(F.linear(x, self.weight, self.bias), eps)

    def activate(self, x: Tensor, eps: float) -> Tensor:
        """What follows the product, in the type of the weights."""
        x = x.to(self.weight.dtype)
        if self.scale is None:
            return x
        if self.shift is None:
            return F.silu(F.rms_norm(x, self.scale.shape, self.scale, eps))
        return F.silu(F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps))


class GRUWeights(NamedTuple):
    """Input layer and LayerNorm-GRU of recipe 2023; see :func:`gru_step`."""

    input: Layer  # (U, S K + A)
    gates: Tensor  # (3 D, D + U)
    scale: Tensor
    shift: Tensor

    def step(self, stoch: Tensor, action: Tensor, deter: Tensor, eps: float) -> Tensor:
        """(B, S K), (B, A), (B, D) -> next deter (B, D)."""
        x = self.input(torch.cat([stoch, action], -1), eps)
        return gru_step(deter, x, self.gates, self.scale, self.shift, eps)


class BlockGRUWeights(NamedTuple):
    """Three input layers and block-GRU of recipe 2025; see :func:`block_gru_step`."""

    deter: Layer  # (U, D)
    stoch: Layer  # (U, S K)
    action: Layer  # (U, A)
    hidden: Tensor  # (G, D / G + 3 U, D / G)
    hidden_bias: Tensor
    scale: Tensor
    gates: Tensor  # (G, D / G, 3 D / G)
    gate_bias: Tensor

    def step(self, stoch: Tensor, action: Tensor, deter: Tensor, eps: float) -> Tensor:
        """(B, S K), (B, A), (B, D) -> next deter (B, D)."""
        action = action / action.detach().abs().clamp(min=1)
        layers = ((self.deter, deter), (self.stoch, stoch), (self.action, action))
        x = torch.cat([layer(value, eps) for layer, value in layers], -1)
        return block_gru_step(deter, x, *self[3:], eps)


class RSSMWeights(NamedTuple):
    """All weights of the model.

    posterior: its first layer without the columns of the embedding (whose product is an input of
    the scan) and without bias, and its logits. prior: its layers, the logits last.
    initial_deter (D,), initial_stoch (S, K): where episodes start. eps: of every norm.
    """

    cell: GRUWeights | BlockGRUWeights
    posterior: tuple[Layer, Layer]
    prior: tuple[Layer, ...]
    initial_deter: Tensor
    initial_stoch: Tensor
    eps: float
    mix: float

    def latent(self, layers: Sequence[Layer], x: Tensor) -> Tensor:
        """Log-probabilities (..., S, K) by ``layers``."""
        for layer in layers:
            x = layer(x, self.eps)
        return unimix(x.unflatten(-1, self.initial_stoch.shape), self.mix)

    @property
    def blocks(self) -> int:
        """G, or 1 for a cell without blocks."""
        return 1 if isinstance(self.cell, GRUWeights) else self.cell.hidden.shape[0]


def drawn(stoch: Tensor) -> Tensor:
    """The drawn class of one-hot (..., S, K) latents, int32 (..., S); -1 where all are 0."""
    value, index = stoch.max(-1)
    return torch.where(value > 0, index, -1).to(torch.int32)


def layer_shapes(layers: Sequence[Layer], inputs: int) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Every tensor of layers behind one another over ``inputs``, with the shape it must have."""
    shapes: list[tuple[Tensor, tuple[int, ...]]] = []
    for weight, *vectors in layers:
        outputs = weight.shape[0]
        shapes.append((weight, (outputs, inputs)))
        shapes += [(x, (outputs,)) for x in vectors if x is not None]
        inputs = outputs
    return shapes


def _cell_shapes(
    cell: GRUWeights | BlockGRUWeights, deter: int, latent: int, action: int
) -> list[tuple[Tensor, tuple[int, ...]]]:
    if isinstance(cell, GRUWeights):
        units = cell.input.weight.shape[0]
        norm = [(x, (3 * deter,)) for x in (cell.scale, cell.shift)]
        gates = (cell.gates, (3 * deter, deter + units))
        return [*layer_shapes([cell.input], latent + action), gates, *norm]
    units, blocks = cell.stoch.weight.shape[0], cell.hidden.shape[0]
    width = deter // blocks
    shapes = [
        (cell.hidden, (blocks, width + 3 * units, width)),
        (cell.gates, (blocks, width, 3 * width)),
        (cell.hidden_bias, (deter,)),
        (cell.scale, (deter,)),
        (cell.gate_bias, (3 * deter,)),
    ]
    for layer, inputs in ((cell.deter, deter), (cell.stoch, latent), (cell.action, action)):
        shapes += layer_shapes([layer], inputs)
    return shapes


def check_weights(operator: str, weights: RSSMWeights, action: int, head: Sequence[Layer]) -> None:
    """What reads the weights by their addresses relies on.

    Raises ValueError for a weight whose shape does not fit the others', TypeError for one that is
    not float32; the message starts with ``operator``.
    """
    deter, latent = weights.initial_deter.shape[0], weights.initial_stoch.numel()
    shapes = _cell_shapes(weights.cell, deter, latent, action) + layer_shapes(head, deter)
    shapes.append((head[-1].weight, (latent, head[-1].weight.shape[1])))
    check_shapes(operator, shapes)


def check_shapes(operator: str, shapes: Sequence[tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raise as `check_weights` does."""
    for x, shape in shapes:
        if tuple(x.shape) != shape:
            raise ValueError(f"{operator}: a weight must be {shape}, got {tuple(x.shape)}")
        if x.dtype != torch.float32:
            raise TypeError(f"{operator}: weights must be torch.float32, got {x.dtype}")


def contiguous(weights: RSSMWeights) -> RSSMWeights:
    """Weights as the library takes them: only the columns of a layer may be part of more."""
    cell = weights.cell
    parts = (x.contiguous() if isinstance(x, Tensor) else x for x in cell)
    return weights._replace(cell=type(cell)(*parts))  # type: ignore[arg-type]


# Whether the cell has blocks; D, S, K, A, U, G; and the outputs of the layers behind the state.
Sizes = tuple[bool, int, int, int, int, int, int, tuple[int, ...]]


def sizes_of(weights: RSSMWeights, action: int, head: Sequence[Layer]) -> Sizes:
    """What decides whether a device takes a model, with the posterior or the prior as ``head``."""
    cell = weights.cell
    units = (cell.input if isinstance(cell, GRUWeights) else cell.stoch).weight.shape[0]
    outputs = tuple(layer.weight.shape[0] for layer in head)
    deter, (stoch, classes) = weights.initial_deter.shape[0], weights.initial_stoch.shape
    blocked = isinstance(cell, BlockGRUWeights)
    return blocked, deter, stoch, classes, action, units, weights.blocks, outputs


MAX_LAYERS, MAX_BLOCKS, MAX_HEADS, MAX_CUDA_PARTS = 8, 64, 64, 8
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class CLayer(ctypes.Structure):
    """``fd_layer``."""

    _fields_ = [(k, _POINTER) for k in ("weight", "bias", "scale", "shift")] + [
        (k, _SIZE) for k in ("inputs", "outputs", "stride")
    ]


class CModel(ctypes.Structure):
    """``fd_rssm``."""

    _fields_ = [
        ("cell", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("mix", ctypes.c_float),
        *((k, _SIZE) for k in ("deter", "stoch", "classes", "action", "hidden", "blocks")),
        *((k, CLayer) for k in ("in_stoch", "in_action", "in_deter")),
        *((k, _POINTER) for k in ("hidden_weight", "hidden_bias", "gate_weight", "gate_bias")),
        *((k, _POINTER) for k in ("cell_scale", "cell_shift")),
        ("head", CLayer * MAX_LAYERS),
        ("head_layers", _SIZE),
    ]


def c_layer(layer: Layer) -> CLayer:
    """The layer's pointers; valid while its tensors live."""
    weight, *others = layer
    assert weight.stride(1) == 1 or weight.shape[1] == 1
    assert all(x is None or x.is_contiguous() for x in others)
    pointers = (None if x is None else x.data_ptr() for x in others)
    return CLayer(weight.data_ptr(), *pointers, weight.shape[1], weight.shape[0], weight.stride(0))


def c_model(weights: RSSMWeights, action: int, head: Sequence[Layer]) -> CModel:
    """The model's pointers, with the posterior or the prior as ``head``; valid while they live."""
    cell = weights.cell
    stoch, classes = weights.initial_stoch.shape
    model = CModel(
        cell=int(isinstance(cell, BlockGRUWeights)),
        eps=weights.eps,
        mix=weights.mix,
        deter=weights.initial_deter.shape[0],
        stoch=stoch,
        classes=classes,
        action=action,
        blocks=weights.blocks,
        gate_weight=cell.gates.data_ptr(),
        cell_scale=cell.scale.data_ptr(),
        head=(CLayer * MAX_LAYERS)(*(c_layer(layer) for layer in head)),
        head_layers=len(head),
    )
    if isinstance(cell, GRUWeights):
        by_stoch, by_action = cell.input.weight.split([stoch * classes, action], 1)
        model.hidden = cell.input.weight.shape[0]
        model.in_stoch = c_layer(cell.input._replace(weight=by_stoch))
        model.in_action = c_layer(Layer(by_action))
        model.cell_shift = cell.shift.data_ptr()
        return model
    model.hidden = cell.stoch.weight.shape[0]
    model.in_stoch, model.in_action = c_layer(cell.stoch), c_layer(cell.action)
    model.in_deter = c_layer(cell.deter)
    model.hidden_weight, model.hidden_bias = cell.hidden.data_ptr(), cell.hidden_bias.data_ptr()
    model.gate_bias = cell.gate_bias.data_ptr()
    return model


SOMEWHERE = 256  # an address that a call without a workspace does not follow


def placeholder_layers(inputs: int, outputs: Sequence[int]) -> list[CLayer]:
    """Layers behind one another that have sizes but no weights."""
    widths = (inputs, *outputs)
    return [CLayer(*[SOMEWHERE] * 4, i, o, i) for i, o in pairwise(widths)]


def placeholder_model(sizes: Sizes) -> CModel:
    """A model that has sizes but no weights."""
    blocked, deter, stoch, classes, action, hidden, blocks, head = sizes
    pointers = ("hidden_weight", "hidden_bias", "gate_weight", "gate_bias", "cell_scale")
    inputs = {"in_stoch": stoch * classes, "in_action": action, "in_deter": deter}
    return CModel(
        cell=blocked,
        deter=deter,
        stoch=stoch,
        classes=classes,
        action=action,
        hidden=hidden,
        blocks=blocks,
        **dict.fromkeys((*pointers, "cell_shift"), SOMEWHERE),
        **{name: placeholder_layers(width, [hidden])[0] for name, width in inputs.items()},
        head=(CLayer * MAX_LAYERS)(*placeholder_layers(deter, head)),
        head_layers=len(head),
    )
