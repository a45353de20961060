"""What the replay stores of a step, and how a batch of it becomes the learner's.

Images stay uint8, actions are vectors. Recipe 2025 also stores latents: deter as float32, stoch as
the class of each latent in uint8; updates rewrite both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.replay import Column
from fastdreamer.rssm import State

FLAGS = ("is_first", "is_last", "is_terminal")


def columns(agent: Agent) -> dict[str, Column]:
    """Columns of the replay for an agent."""
    spaces = agent.obs_space.items()
    found = {k: Column(s.shape, torch.from_numpy(np.empty(0, s.dtype)).dtype) for k, s in spaces}
    found["action"] = Column((agent.spec.size,), torch.float32)
    found["reward"] = Column((), torch.float32)
    if agent.recipe.joint:
        model = agent.model
        found["deter"] = Column((model.deter,), torch.float32, mutable=True)
        found["stoch"] = Column((model.stoch,), torch.uint8, mutable=True)
    return found | {k: Column((), torch.bool) for k in FLAGS}


def latents(state: State) -> dict[str, Tensor]:
    """The columns deter and stoch of states (..., D), (..., S, K), where those are."""
    stoch = state.stoch.detach().argmax(-1).to(torch.uint8)
    return {"deter": state.deter.detach(), "stoch": stoch}


def unpack(batch: Mapping[str, Tensor], agent: Agent) -> dict[str, Tensor]:
    """A gathered batch as the learner takes it: stored classes become one-hot."""
    batch = dict(batch)
    if agent.recipe.joint:
        classes = torch.arange(agent.model.classes, device=batch["stoch"].device)
        batch["stoch"] = (batch["stoch"].unsqueeze(-1) == classes).to(agent.dtype)
    return batch
