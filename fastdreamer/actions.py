"""Action spaces as vectors, and the policy's distributions over them.

An action vector (..., A) is the concatenation of its parts in sorted order of their names: a
discrete part is a one-hot, a continuous one its values scaled so that the bounds are -1 and 1.
Noise makes sampling a function: standard Gumbel for a discrete part, standard normal for a
continuous one, of the shape of the action vector; zeros give the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from torch import Tensor

from fastdreamer.kernels.gumbel import gumbel
from fastdreamer.kernels.ops import Ops
from fastdreamer.kernels.rssm_imagine import bounded_normal


@dataclass(frozen=True)
class Part:
    """One discrete choice of ``size`` classes, or ``size`` continuous values."""

    name: str
    size: int
    discrete: bool


class ActionSpec:
    """Translates between environment actions and action vectors.

    Args:
        space: of one environment: Discrete, MultiDiscrete, bounded Box, or a Dict of those. A
            plain space's part is named "action".

    Raises:
        ValueError: for any other space; the message names it and what is supported.
    """

    def __init__(self, space: gymnasium.Space[Any]):
        self.space = space
        self.spaces = dict(sorted(space.spaces.items())) if isinstance(space, Dict) else {}
        named = self.spaces or {"action": space}
        self.parts = [part for name, sub in named.items() for part in _parts(name, sub)]
        self.sizes = [part.size for part in self.parts]
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"the names of the action's parts are not unique: {names}")
        self.size = sum(self.sizes)

    @property
    def discrete(self) -> bool:
        """Every part is discrete."""
        return all(part.discrete for part in self.parts)

    def noise(
        self,
        lead: Sequence[int],
        generator: torch.Generator,
        dtype: torch.dtype,
        gumbel: Callable[..., Tensor] = gumbel,
    ) -> Tensor:
        """Fresh noise (*lead, A) on the generator's device; ``gumbel`` draws discrete parts."""
        draws = [
            gumbel((*lead, part.size), generator, dtype)
            if part.discrete
            else torch.randn(
                *lead, part.size, generator=generator, dtype=dtype, device=generator.device
            )
            for part in self.parts
        ]
        return torch.cat(draws, -1)

    def encode(self, action: Any) -> np.ndarray:
        """Environment actions of N environments (arrays, or a dict of them) -> (N, A) float32."""
        named = action if self.spaces else {"action": action}
        spaces = self.spaces or {"action": self.space}
        vectors = [_encode(np.asarray(named[name]), space) for name, space in spaces.items()]
        return np.concatenate(vectors, -1).astype(np.float32)

    def decode(self, vector: np.ndarray) -> Any:
        """(N, A) -> actions as the environments take them; continuous values are clipped."""
        spaces = self.spaces or {"action": self.space}
        widths = [sum(p.size for p in _parts(name, sub)) for name, sub in spaces.items()]
        pieces = np.split(vector, np.cumsum(widths)[:-1], -1)
        actions = {
            name: _decode(piece, sub)
            for (name, sub), piece in zip(spaces.items(), pieces, strict=True)
        }
        return actions if self.spaces else actions["action"]


def _parts(name: str, space: gymnasium.Space[Any]) -> list[Part]:
    if isinstance(space, Discrete):
        return [Part(name, int(space.n), True)]
    if isinstance(space, MultiDiscrete) and space.nvec.ndim == 1:
        return [Part(f"{name}{i}", int(n), True) for i, n in enumerate(space.nvec)]
    if isinstance(space, Box) and (_width(space) > 0).all() and np.isfinite(_width(space)).all():
        return [Part(name, int(np.prod(space.shape)), False)]
    raise ValueError(
        f"action space {name}: {space} is not supported; Discrete, MultiDiscrete, bounded Box and "
        "Dict of those are"
    )


def _width(space: Box) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return space.high.astype(np.float64) - space.low.astype(np.float64)


def _encode(action: np.ndarray, space: gymnasium.Space[Any]) -> np.ndarray:
    if isinstance(space, Discrete):
        return np.eye(int(space.n), dtype=np.float32)[action - space.start]
    if isinstance(space, MultiDiscrete):
        index = action - space.start
        columns = [np.eye(int(n))[index[:, i]] for i, n in enumerate(space.nvec)]
        return np.concatenate(columns, -1)
    assert isinstance(space, Box)
    unit = 2 * (action.astype(np.float64) - space.low) / _width(space) - 1
    return unit.reshape(len(action), -1)


def _decode(vector: np.ndarray, space: gymnasium.Space[Any]) -> np.ndarray:
    if isinstance(space, Discrete):
        return vector.argmax(-1) + space.start
    if isinstance(space, MultiDiscrete):
        pieces = np.split(vector, np.cumsum(space.nvec)[:-1], -1)
        return np.stack([piece.argmax(-1) for piece in pieces], -1) + space.start
    assert isinstance(space, Box)
    unit = vector.clip(-1, 1).reshape(len(vector), *space.shape)
    value = (unit + 1) / 2 * _width(space) + space.low
    if np.issubdtype(space.dtype, np.integer):
        value = np.rint(value)
    return value.astype(space.dtype).clip(space.low, space.high)


class Categorical:
    """One discrete choice from log-probabilities (..., n)."""

    def __init__(self, logp: Tensor, ops: Ops):
        self.logp, self.ops = logp, ops

    def sample(self, noise: Tensor) -> Tensor:
        return self.ops.sample(self.logp.detach(), noise)

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.logp * action).sum(-1)

    def entropy(self) -> Tensor:
        return self.ops.entropy(self.logp)


class BoundedNormal:
    """Gaussian with mean in (-1, 1) and standard deviation in (0.1, 1), from raw (..., n).

    The log-probability is that of the unbounded sample. Source: DreamerV3's "bounded_normal".
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = bounded_normal(mean, std)

    def sample(self, noise: Tensor) -> Tensor:
        return (self.mean + self.std * noise).detach()

    def log_prob(self, action: Tensor) -> Tensor:
        return (
            torch.distributions.Normal(self.mean, self.std, validate_args=False)
            .log_prob(action)
            .sum(-1)
        )

    def entropy(self) -> Tensor:
        return (
            torch.distributions.Normal(self.mean, self.std, validate_args=False).entropy().sum(-1)
        )


class Policy:
    """Independent distributions of the parts of an action vector (..., A)."""

    def __init__(self, parts: Mapping[str, Categorical | BoundedNormal], sizes: Sequence[int]):
        self.parts, self.sizes = parts, list(sizes)

    def sample(self, noise: Tensor) -> Tensor:
        """Action (..., A), without gradient, from ``noise`` (..., A)."""
        pieces = zip(self.parts.values(), noise.split(self.sizes, -1), strict=True)
        return torch.cat([dist.sample(piece) for dist, piece in pieces], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """(..., A) -> (...) nats, summed over the parts."""
        pieces = zip(self.parts.values(), action.split(self.sizes, -1), strict=True)
        return torch.stack([dist.log_prob(piece) for dist, piece in pieces]).sum(0)

    def entropy(self) -> Tensor:
        """(...) nats, summed over the parts."""
        return torch.stack([dist.entropy() for dist in self.parts.values()]).sum(0)
