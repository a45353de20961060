"""The weights of the posterior scan as a list, and their gradients.

Legend: B batch, T time, D deter, S stoch, K classes, A action, U hidden, G blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .gru_step import block_weight_gradients
from .rssm_weights import BlockGRUWeights, GRUWeights, Layer, RSSMWeights


def flatten(weights: RSSMWeights) -> list[Tensor]:
    """Every tensor that a gradient flows to, in the order of :func:`unflatten`."""
    cell, (hidden, out) = weights.cell, weights.posterior
    parts: list[Tensor | None] = []
    for item in cell:
        parts += [item] if isinstance(item, Tensor) else item
    return [x for x in (*parts, *hidden, *out, weights.initial_deter) if x is not None]


def unflatten(tensors: list[Tensor], classes: int, eps: float, mix: float) -> RSSMWeights:
    *tensors, initial = tensors
    cell: GRUWeights | BlockGRUWeights
    if len(tensors) == 11:
        weight, scale, shift, *rest = tensors
        cell = GRUWeights(Layer(weight, None, scale, shift), *rest[:3])
        first, first_scale, first_shift, out, bias = rest[3:]
        hidden = Layer(first, None, first_scale, first_shift)
    else:
        deter, stoch, action = (Layer(*tensors[i : i + 3]) for i in (0, 3, 6))
        cell = BlockGRUWeights(deter, stoch, action, *tensors[9:14])
        first, first_scale, out, bias = tensors[14:]
        hidden = Layer(first, None, first_scale)
    zeros = initial.new_zeros(out.shape[0] // classes, classes)
    return RSSMWeights(cell, (hidden, Layer(out, bias)), (), initial, zeros, eps, mix)


def widths_of(weights: RSSMWeights) -> tuple[int, int, int]:
    """Units before the norms: of the input layers, of the hidden layer (blocks only), U."""
    deter, units = weights.initial_deter.shape[0], weights.posterior[0].weight.shape[0]
    return (units, 0, units) if isinstance(weights.cell, GRUWeights) else (3 * units, deter, units)


def last_state(
    weights: RSSMWeights, starts: Sequence[Tensor], deter: Tensor, stoch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each step started from: deter (N, D), stoch (N, S K), action (N, A); N = B T."""
    start_deter, start_index, initial_index, action, is_first = starts
    first = is_first.bool().unsqueeze(-1)

    def onehot(index: Tensor) -> Tensor:
        classes = torch.arange(stoch.shape[-1], device=index.device)
        return (index.unsqueeze(-1) == classes).to(stoch.dtype)

    before = torch.cat([start_deter.unsqueeze(1), deter[:, :-1]], 1)
    before = torch.where(first, weights.initial_deter, before)
    drawn_before = torch.cat([onehot(start_index).unsqueeze(1), stoch[:, :-1]], 1)
    drawn_before = torch.where(first.unsqueeze(-1), onehot(initial_index), drawn_before)
    action = action.masked_fill(first, 0)
    return before.flatten(0, 1), drawn_before.flatten(2).flatten(0, 1), action.flatten(0, 1)


def weight_gradients(
    weights: RSSMWeights,
    last: tuple[Tensor, Tensor, Tensor],
    deter: Tensor,
    kept: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> list[Tensor]:
    """One product for each weight over all steps, in the order of :func:`flatten`."""
    inputs, hidden, _gates, posterior = (x.flatten(0, 1) for x in kept)
    dinputs, dhidden, dgates, dposterior, dlogits = (x.flatten(0, 1) for x in grads[:5])
    *_, dinitial, dnorm = grads
    cell, (first, _out), eps = weights.cell, weights.posterior, weights.eps
    before, drawn_before, action = last
    before_width, middle, units = widths_of(weights)
    sizes = [before_width] * 2 + [middle or 3 * before.shape[1]] * 2 + [units] * 2
    dscale, dshift, dcell_scale, dcell_shift, dfirst_scale, dfirst_shift = dnorm.split(sizes)
    if isinstance(cell, GRUWeights):
        x = cell.input.activate(inputs, eps)
        dgate_weight = dgates.T @ torch.cat([before, x], 1)
        dinput = dinputs.T @ torch.cat([drawn_before, action], 1)
        dcell = [dinput, dscale, dshift, dgate_weight, dcell_scale, dcell_shift]
    else:
        dcell = _block_gradients(cell, last, inputs, hidden, dinputs, dhidden, dgates, eps)
        for i, part in enumerate(dscale.chunk(3)):
            dcell.insert(3 * i + 2, part)
        dcell.insert(11, dcell_scale)
    dlogits = dlogits.flatten(1)
    dhead = [dposterior.T @ deter.flatten(0, 1), dfirst_scale]
    dhead += [] if first.shift is None else [dfirst_shift]
    dhead += [dlogits.T @ first.activate(posterior, eps), dlogits.sum(0)]
    return [*dcell, *dhead, dinitial]


def _block_gradients(
    cell: BlockGRUWeights,
    last: tuple[Tensor, Tensor, Tensor],
    inputs: Tensor,
    hidden: Tensor,
    dinputs: Tensor,
    dhidden: Tensor,
    dgates: Tensor,
    eps: float,
) -> list[Tensor]:
    """Gradients of the block cell's weights and biases, without the norms' scales."""
    before, drawn_before, action = last
    action = action / action.abs().clamp(min=1)
    layers = (cell.deter, cell.stoch, cell.action)
    grads, parts = [], []
    for layer, x, source, dx in zip(
        layers, inputs.chunk(3, 1), (before, drawn_before, action), dinputs.chunk(3, 1), strict=True
    ):
        parts.append(layer.activate(x, eps))
        grads += [dx.T @ source, dx.sum(0)]
    z = F.silu(F.rms_norm(hidden, cell.scale.shape, cell.scale, eps))
    x = torch.cat(parts, 1)
    return grads + block_weight_gradients(before, x, z, dhidden, dgates, cell.hidden.shape[0])
