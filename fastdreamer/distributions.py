"""Distributions of the policy. Actions are vectors: a discrete action is its one-hot.

Noise makes sampling a function: standard Gumbel for a categorical, of the shape of the action.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdreamer.kernels.ops import Ops


class ActionDist(Protocol):
    """What the learner asks of a policy: (..., A) actions, (...) log-probability and entropy."""

    def sample(self, noise: Tensor) -> Tensor: ...

    def mode(self) -> Tensor: ...

    def log_prob(self, action: Tensor) -> Tensor: ...

    def entropy(self) -> Tensor: ...


class Categorical:
    """One discrete action from log-probabilities (..., A)."""

    def __init__(self, logp: Tensor, ops: Ops):
        self.logp, self.ops = logp, ops

    def sample(self, noise: Tensor) -> Tensor:
        return self.ops.sample(self.logp.detach(), noise)

    def mode(self) -> Tensor:
        return self.sample(torch.zeros_like(self.logp))

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.logp * action).sum(-1)

    def entropy(self) -> Tensor:
        return self.ops.entropy(self.logp)


def gumbel(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise on the generator's device."""
    noise = torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)
    return noise.log_().neg_().log_().neg_()  # a 0 becomes -inf: that class is not drawn
