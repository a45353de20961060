"""Unimix softmax: log-probabilities, entropy, KL and straight-through samples of categoricals.

Legend: K classes; all other axes are batch axes. "Log-probabilities" are normalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unimix(logits: Tensor, mix: float = 0.01) -> Tensor:
    """Log-probabilities of a softmax mixed with ``mix`` of the uniform distribution.

    Args:
        logits: (..., K) unnormalised, floating.
        mix: weight of the uniform distribution, in [0, 1); 0 gives the plain log-softmax.

    Returns:
        (..., K) log(mix / K + (1 - mix) softmax(logits)).

    Source: DreamerV3 (arXiv 2301.04104), "World Model Learning", 1 % unimix.
    """
    if mix == 0:
        return F.log_softmax(logits, -1)
    return torch.log((1 - mix) * F.softmax(logits, -1) + mix / logits.shape[-1])


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats, (..., K) log-probabilities -> (...)."""
    return -(logp.exp() * logp).sum(-1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats of two categoricals, both (..., K) log-probabilities -> (...)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def sample(logp: Tensor, noise: Tensor) -> Tensor:
    """One-hot Gumbel-max sample with straight-through gradient to the probabilities.

    Args:
        logp: (..., K) log-probabilities.
        noise: (..., K) standard Gumbel noise; zeros give the mode (first index on ties).

    Returns:
        (..., K) exactly one-hot in value; its gradient is that of ``logp.exp()``.
    """
    index = (logp.detach() + noise).argmax(-1, keepdim=True)
    onehot = torch.zeros_like(logp).scatter_(-1, index, 1.0)
    if not logp.requires_grad:
        return onehot
    probs = logp.exp()
    return onehot + (probs - probs.detach())
