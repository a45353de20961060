"""One step of the recurrent cell. Legend: B batch, D deter, U width of the cell's input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    gates = F.linear(torch.cat([h, x], -1), weight)
    gates = F.layer_norm(gates, gates.shape[-1:], scale, shift, eps)
    reset, cand, update = gates.chunk(3, -1)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    return update * cand + (1 - update) * h
