"""Parameter counts of recipe 2025, from the official code's layers (danijar/dreamerv3, e3f0224).

The formula below follows its `rssm.py`, `agent.py`, `heads.py` and `configs.yaml` and knows nothing
of our modules. The slow critic, which is not trained, is left out on either side.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastdreamer.agent import Agent
from fastdreamer.config import SIZES
from fastdreamer.kernels import resolve
from fastdreamer.recipe import RECIPES

STOCH, BLOCKS, BINS, KERNEL, LAYERS = 32, 8, 255, 5, 3
MULTS = (2, 3, 4, 4)
# size: (deter, hidden and units, classes and depth), from the blocks size1m to size400m
OFFICIAL = {
    "1m": (512, 64, 4),
    "12m": (2048, 256, 16),
    "25m": (3072, 384, 24),
    "50m": (4096, 512, 32),
    "100m": (6144, 768, 48),
    "200m": (8192, 1024, 64),
    "400m": (12288, 1536, 96),
}
IMAGE = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}
WALKER = {
    name: spaces.Box(-np.inf, np.inf, (size,), np.float32)
    for name, size in {"height": 1, "orientations": 14, "velocity": 9}.items()
}


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def normed(inputs: int, outputs: int) -> int:
    """A linear layer with bias, and the scale of the RMSNorm after it."""
    return linear(inputs, outputs) + outputs


def block_linear(inputs: int, outputs: int) -> int:
    return inputs // BLOCKS * outputs + outputs


def conv(inputs: int, outputs: int) -> int:
    return KERNEL**2 * inputs * outputs + outputs


def mlp(inputs: int, units: int, layers: int) -> int:
    return normed(inputs, units) + (layers - 1) * normed(units, units)


def dynamics(deter: int, hidden: int, latent: int, tokens: int, action: int) -> int:
    inputs = normed(deter, hidden) + normed(latent, hidden) + normed(action, hidden)
    # Each block reads its share of deter and all three inputs.
    cell = block_linear(deter + BLOCKS * 3 * hidden, deter) + deter + block_linear(deter, 3 * deter)
    posterior = normed(deter + tokens, hidden) + linear(hidden, latent)
    prior = mlp(deter, hidden, 2) + linear(hidden, latent)
    return inputs + cell + posterior + prior


def image_coder(deter: int, units: int, latent: int, depth: int) -> int:
    """Encoder and decoder of a 64 x 64 x 3 image, which is 4 x 4 in the middle."""
    sizes = [depth * mult for mult in MULTS]
    down = sum(conv(a, b) + b for a, b in zip([3, *sizes[:-1]], sizes, strict=True))
    middle = 4 * 4 * sizes[-1]
    stem = block_linear(deter, middle) + normed(latent, 2 * units) + linear(2 * units, middle)
    up = sum(conv(b, a) + a for a, b in pairwise(sizes))
    return down + stem + sizes[-1] + up + conv(sizes[0], 3)


def official_count(size: str, vectors: int, action: int, continuous: bool) -> int:
    """Trained parameters with `vectors` numbers to observe, or a 64 x 64 image where that is 0."""
    deter, units, depth = OFFICIAL[size]
    latent = STOCH * depth
    feat = deter + latent
    if vectors:
        tokens = units
        coder = mlp(vectors, units, LAYERS) + mlp(feat, units, LAYERS) + linear(units, vectors)
    else:
        tokens = 4 * 4 * MULTS[-1] * depth
        coder = image_coder(deter, units, latent, depth)
    reward = mlp(feat, units, 1) + linear(units, BINS)
    keep = mlp(feat, units, 1) + linear(units, 1)
    policy = mlp(feat, units, LAYERS) + (1 + continuous) * linear(units, action)
    value = mlp(feat, units, LAYERS) + linear(units, BINS)
    world = dynamics(deter, units, latent, tokens, action) + coder
    return world + reward + keep + policy + value


def our_count(size: str, obs: dict, act: spaces.Space) -> int:
    with torch.device("meta"):
        agent = Agent(obs, act, SIZES["2025"][size], RECIPES["2025"], resolve("reference"))
    return sum(p.numel() for p in agent.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", OFFICIAL)
def test_parameters_with_images_and_discrete_actions(size: str) -> None:
    ours = our_count(size, IMAGE, spaces.Discrete(18))
    assert ours == official_count(size, 0, 18, continuous=False)


@pytest.mark.parametrize("size", OFFICIAL)
def test_parameters_with_vectors_and_continuous_actions(size: str) -> None:
    ours = our_count(size, WALKER, spaces.Box(-1, 1, (6,), np.float32))
    assert ours == official_count(size, 24, 6, continuous=True)


def test_every_size_is_an_official_one() -> None:
    assert set(SIZES["2025"]) - {"debug"} == set(OFFICIAL)
