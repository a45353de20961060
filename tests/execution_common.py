"""A tiny learner of each recipe, with a batch, for the tests of how it is executed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.config import SIZES, LearnerConfig
from fastdreamer.kernels import Ops
from fastdreamer.learner import Learner
from fastdreamer.recipe import RECIPES
from fastdreamer.stored import columns

B, T = 3, 5
OBS = {"eye": Box(0, 255, (16, 16, 3), np.uint8), "joints": Box(-9, 9, (4,), np.float32)}
ACTIONS: dict[str, Space] = {
    "2023": Discrete(3),
    "2025": Dict({"jump": Discrete(3), "move": Box(-1, 1, (2,))}),
}


def tiny_learner(recipe: str, ops: Ops, **options: float) -> Learner:
    """On the CPU, always with the same weights."""
    torch.manual_seed(0)
    model = replace(SIZES[recipe]["debug"], stoch=4, classes=16)
    agent = Agent(OBS, ACTIONS[recipe], model, RECIPES[recipe], ops)
    with torch.no_grad():  # the heads that start at 0 would hide what is behind them
        for head in (agent.world_model.reward, agent.critic):
            std = 1e-7 if RECIPES[recipe].bins == "symexp" else 0.1  # the last bin is 5e8 or 20
            torch.nn.init.normal_(head.out.weight, std=std)
    config = LearnerConfig(batch_size=B, batch_length=T, horizon=4, **{"warmup": 0, **options})
    return Learner.make(agent, config)


def replayed(learner: Learner, seed: int = 0, rows: int = B) -> dict[str, Tensor]:
    """A batch as the replay gives it, without step ids."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, T + learner.recipe.joint)
    batch = {}
    for name, column in columns(learner.agent).items():
        size = (*shape, *column.shape)
        if column.dtype == torch.bool:
            batch[name] = torch.rand(size, generator=g) < 0.2
        elif column.dtype == torch.uint8:
            top = learner.agent.model.classes if name == "stoch" else 256
            batch[name] = torch.randint(top, size, generator=g, dtype=torch.uint8)
        else:
            batch[name] = torch.randn(size, generator=g)
    return batch
