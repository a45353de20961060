"""One optimiser step over all parameters at once: LaProp with adaptive gradient clipping."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adaptive_clip(grads: list[Tensor], params: list[Tensor], clip: float) -> list[Tensor]:
    """Scale each gradient so that its norm is at most ``clip`` times its parameter's.

    Norms are over whole tensors; a parameter's counts as at least 1e-3.
    Source: AGC (arXiv 2102.06171), per tensor as DreamerV3 (Nature) has it.
    """
    caps = torch.stack(torch._foreach_norm(params)).clamp(min=1e-3) * clip
    ratios = torch.stack(torch._foreach_norm(grads)) / caps
    return list(torch._foreach_div(grads, list(ratios.clamp(min=1).unbind())))


@torch.no_grad()
def laprop(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-20,
) -> None:
    """LaProp in place: momentum over normalised gradients, both bias-corrected.

    Args:
        params, grads, nu, mu: tensors of the same shapes; nu and mu start at zero.
        step: number of this step, from 1. lr: its learning rate.

    Source: LaProp (arXiv 2002.04839), eps outside the root.
    """
    torch._foreach_lerp_(nu, list(torch._foreach_mul(grads, grads)), 1 - betas[1])
    denominator = list(torch._foreach_sqrt(list(torch._foreach_div(nu, 1 - betas[1] ** step))))
    torch._foreach_add_(denominator, eps)
    torch._foreach_lerp_(mu, list(torch._foreach_div(grads, denominator)), 1 - betas[0])
    torch._foreach_add_(params, mu, alpha=-lr / (1 - betas[0] ** step))
