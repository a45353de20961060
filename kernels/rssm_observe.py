"""The posterior scan over observations, forward and backward over the whole sequence.

Legend: B batch, T time, D deter, S stoch, K classes, A action, U hidden, G blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .register import compute_type
from .rssm_observe_operator import observe, takes
from .rssm_weights import (
    MAX_BLOCKS,
    RSSMWeights,
    sizes_of,
)
from .unimix import sample


def observe_step(
    weights: RSSMWeights,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One posterior step; where ``is_first``, from the initial state and a zero action.

    Args:
        deter: (B, D), stoch: (B, S, K) the last state. action: (B, A) that followed it.
        embedded: (B, U) the embedding's share of the posterior's first layer, with its bias.
        is_first: (B,) bool. noise: (B, S, K) Gumbel; zeros draw the mode.

    Returns:
        deter (B, D), stoch (B, S, K) one-hot, its log-probabilities (B, S, K).
    """
    first = is_first[:, None]
    deter = torch.where(first, weights.initial_deter, deter)
    stoch = torch.where(first[..., None], weights.initial_stoch, stoch)
    action = action.masked_fill(first, 0)
    deter = weights.cell.step(stoch.flatten(-2), action, deter, weights.eps)
    hidden, out = weights.posterior
    x = hidden.activate(F.linear(deter, hidden.weight) + embedded, weights.eps)
    logp = weights.latent([out], x)
    return deter, sample(logp, noise), logp


def rssm_observe(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior scan; differentiable in the weights and ``embedded``, not in the start.

    Args:
        start_deter: (B, D). start_stoch: (B, S, K) one-hot, or zeros.
        action: (B, T, A), ``action[:, t]`` the one taken *before* observation t.
        embedded: (B, T, U). is_first: (B, T) bool. noise: (B, T, S, K) Gumbel.

    Returns:
        deter (B, T, D), stoch (B, T, S, K) one-hot with straight-through gradient, and its
        log-probabilities (B, T, S, K).

    Source: DreamerV3, eq. 3.
    """
    state: tuple[Tensor, ...] = (start_deter.detach(), start_stoch.detach())
    steps = []
    for args in zip(*(x.unbind(1) for x in (action, embedded, is_first, noise)), strict=True):
        steps.append(observe_step(weights, state[0], state[1], *args))
        state = steps[-1]
    if not steps:
        return start_deter[:, None][:, :0], noise, noise
    deter, stoch, logp = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return deter, stoch, logp


def rssm_observe_cpp(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rssm_observe` by the C++ library, from and to float32.

    It multiplies in bfloat16 where autocast says so and the processor can, else in float32. Other
    types, cells of more than 64 blocks, and a single step, which packing the weights would take
    longer than, are served by the reference.
    """
    scan = (start_deter, start_stoch, action, embedded, is_first, noise)
    compute = compute_type("cpu")
    if compute == torch.bfloat16:
        embedded = embedded.float()
    served = embedded.dtype == torch.float32 and weights.blocks <= MAX_BLOCKS
    if not served or embedded.shape[1] == 1:
        return rssm_observe(weights, *scan)
    return observe(weights, *scan[:3], embedded, is_first, noise, compute)


def rssm_observe_cuda(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rssm_observe` by the CUDA library, from and to float32.

    It multiplies in bfloat16 where autocast says so, else in float32. Other types, and models that
    the library does not take, are served by the reference.
    """
    scan = (start_deter, start_stoch, action, embedded, is_first, noise)
    compute = compute_type("cuda")
    if compute == torch.bfloat16:
        embedded = embedded.float()
    sizes = sizes_of(weights, action.shape[-1], weights.posterior)
    fits = weights.blocks <= MAX_BLOCKS and takes(sizes, *is_first.shape, compute, action.device)
    if embedded.dtype != torch.float32 or not fits:
        return rssm_observe(weights, *scan)
    return observe(weights, *scan[:3], embedded, is_first, noise, compute)
