"""The losses as pure functions of predictions and targets.

Legend: B batch, T time, N = B T, H horizon, S stoch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.kernels.ops import Ops
from fastdreamer.kernels.twohot import symlog
from fastdreamer.recipe import Recipe


def reconstruction_loss(pred: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
    """Squared error of vectors in symlog space without the 1/2, summed: (..., D) -> (...)."""
    error = (pred - symlog(target.to(pred.dtype))).square()
    return error.masked_fill(error < recipe.vector_floor, 0).sum(-1)


def kl_losses(post: Tensor, prior: Tensor, free_nats: float, ops: Ops) -> tuple[Tensor, ...]:
    """Dynamics and representation KL with free nats, and the plain KL: each (B, T) nats.

    Args:
        post, prior: (B, T, S, K) log-probabilities. The free nats bound the sum over latents.

    Source: DreamerV3, eq. 5.
    """
    dyn, rep = (x.sum(-1) for x in ops.balanced_kl(post, prior))
    return dyn.clamp(min=free_nats), rep.clamp(min=free_nats), dyn.detach()


def actor_loss(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, weight: Tensor, entropy_scale: float
) -> Tensor:
    """REINFORCE with an entropy bonus, all (N, H) -> scalar. Source: DreamerV3, eq. 11."""
    return -(weight * (log_prob * advantage.detach() + entropy_scale * entropy)).mean()


def critic_loss(
    logits: Tensor, targets: Iterable[Tensor], weight: Tensor, bins: str, ops: Ops
) -> Tensor:
    """Two-hot loss to the returns and to the target critic, (N, H + 1, bins) -> scalar.

    Args:
        logits: of all states; the last one has no target and no loss.
        targets: each (N, H); their losses are added. weight: (N, H).
    """
    target = F.pad(torch.stack(list(targets), -1), (0, 0, 0, 1))  # (N, H + 1, targets)
    return (weight * ops.twohot_loss(logits, target, bins)[:, :-1]).mean()


def replay_returns(
    reward: Tensor, last: Tensor, terminal: Tensor, boot: Tensor, gamma: float, lam: float, ops: Ops
) -> Tensor:
    """Lambda-returns of replayed states, bootstrapped from imagined ones.

    Args:
        reward, last, terminal: (B, T) received on arriving at each step, and how it ends (0/1).
        boot: (B, T) imagined return of each step. An episode that ends without being terminal
            is bootstrapped fully.

    Returns:
        (B, T - 1), for all steps but the last.
    """
    discount = (1 - terminal[:, 1:]) * gamma
    mix = lam * (1 - last[:, 1:])
    return ops.lambda_return(reward[:, 1:].to(boot.dtype), discount, boot[:, 1:], mix)


class ReturnScale(nn.Module):
    """Running range of the returns between two percentiles. Source: DreamerV3, eq. 12."""

    low: Tensor
    high: Tensor

    def __init__(self, decay: float, limit: float, percentiles: tuple[float, float]):
        super().__init__()
        self.decay, self.limit, self.percentiles = decay, limit, percentiles
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, returns: Tensor) -> Tensor:
        """Update with ``returns`` (any shape), then give the scale, at least the limit (scalar)."""
        ordered = returns.detach().flatten().sort().values
        for buffer, percentile in zip((self.low, self.high), self.percentiles, strict=True):
            buffer.lerp_(quantile(ordered, percentile).to(buffer.dtype), 1 - self.decay)
        return (self.high - self.low).clamp(min=self.limit)


def quantile(ordered: Tensor, q: float) -> Tensor:
    """The ``q``-quantile of ascending values (N,), linear between two of them (scalar).

    As ``torch.quantile``, which checks its argument on the host, but for NaN, which counts as the
    largest value.
    """
    rank = q * (len(ordered) - 1)
    below = ordered[math.floor(rank)]
    return below.lerp(ordered[math.ceil(rank)], rank - math.floor(rank))
