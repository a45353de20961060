"""One step of either recurrent cell. Legend: B batch, D deter, U width of the input, G blocks."""

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


def block_gru_step(
    h: Tensor,
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    scale: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    eps: float = 1e-4,
) -> Tensor:
    """Block-GRU of recipe 2025: G blocks share the input, each sees its own part of the state.

    Args:
        h: (B, D) state, in G contiguous parts. x: (B, U) input, given to every block.
        hidden_weight: (G, D / G + U, D / G), state rows first. hidden_bias: (D,).
        scale: (D,) of the RMSNorm, which spans all blocks.
        gate_weight: (G, D / G, 3 D / G). gate_bias: (3 D,), block by block.
            Inside a block the gates come in the order reset, candidate, update.

    Returns:
        (B, D) next state ``u tanh(r c) + (1 - u) h`` with ``u = sigmoid(update - 1)``.

    Source: DreamerV3 (Nature), "Block-diagonal GRU".
    """
    blocks = hidden_weight.shape[0]
    shared = x.unsqueeze(-2).expand(*x.shape[:-1], blocks, -1)
    z = block_linear(torch.cat([h.unflatten(-1, (blocks, -1)), shared], -1), hidden_weight)
    z = F.silu(F.rms_norm(z.flatten(-2) + hidden_bias, scale.shape, scale, eps))
    gates = block_linear(z.unflatten(-1, (blocks, -1)), gate_weight).flatten(-2) + gate_bias
    gates = gates.unflatten(-1, (blocks, 3, -1))  # (B, G, 3, D / G)
    reset, cand, update = (gate.flatten(-2) for gate in gates.unbind(-2))
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    return update * cand + (1 - update) * h


def block_linear(x: Tensor, weight: Tensor) -> Tensor:
    """G products side by side: (..., G, I), (G, I, O) -> (..., G, O)."""
    return torch.einsum("...gi,gio->...go", x, weight)
