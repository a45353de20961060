"""Loads golden numbers of recipe 2023 (format: sheeprl 0.8.4's own arrays) into our layouts.

Theirs is time-major (T, B, ...), images (C, H, W); ours batch-first, images (H, W, C).
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from golden_common import Arrays
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.compat.sheeprl_params import sheeprl_names
from fastdreamer.config import LearnerConfig, ModelConfig
from fastdreamer.kernels import Ops
from fastdreamer.learner import SeparateLearner, UpdateNoise
from fastdreamer.recipe import RECIPES
from fastdreamer.rssm import ImagineNoise

NOT_OBSERVED = {"actions", "rewards", "terminated", "is_first"}


class Golden2023:
    """One set, read in float32 or float64."""

    recipe = RECIPES["2023"]

    def __init__(self, folder: Path, dtype: torch.dtype, ops: Ops):
        self.folder, self.dtype, self.ops = folder, dtype, ops
        self.config = json.loads((folder / "manifest.json").read_text())["config"]
        precision = {torch.float32: "f32", torch.float64: "f64"}[dtype]
        self.functions = Arrays(folder / f"functions_{precision}.npz", dtype)
        self.train = Arrays(folder / f"train_{precision}.npz", dtype)
        self.params = Arrays(folder / "params_init.npz", dtype)
        self.inputs = Arrays(folder / "inputs.npz", dtype)

    @property
    def horizon(self) -> int:
        return self.config["horizon"]

    @cached_property
    def obs_space(self) -> dict[str, Box]:
        spaces = {}
        for key in self.inputs.keys("batch0/"):
            if key not in NOT_OBSERVED:
                shape = self.inputs[f"batch0/{key}"].shape[2:]
                image = len(shape) == 3
                shape = (*shape[1:], shape[0]) if image else shape
                spaces[key] = Box(0, 255, shape, np.uint8) if image else Box(-np.inf, np.inf, shape)
        return spaces

    def model(self) -> ModelConfig:
        c = self.config
        return ModelConfig(
            deter=c["recurrent_state_size"],
            hidden=c["hidden_size"],
            stoch=c["stochastic_size"],
            classes=c["discrete_size"],
            units=c["dense_units"],
            layers=c["mlp_layers"],
            head_layers=c["mlp_layers"],
            cnn_depth=c["cnn_channels_multiplier"],
            bins=c["bins"],
            unimix=c["unimix"],
        )

    def learner_config(self) -> LearnerConfig:
        c = self.config
        adam, moments, clip = c["adam"], c["moments"], c["clip"]
        return LearnerConfig(
            batch_size=c["batch"],
            batch_length=c["sequence"],
            horizon=c["horizon"],
            gamma=c["gamma"],
            lam=c["lmbda"],
            kl_dynamics=c["kl_dynamic"] * c["kl_regularizer"],
            kl_representation=c["kl_representation"] * c["kl_regularizer"],
            free_nats=c["kl_free_nats"],
            cont_scale=c["continue_scale_factor"],
            entropy_scale=c["ent_coef"],
            target_rate=c["tau"],
            return_decay=moments["decay"],
            return_low=moments["low"],
            return_high=moments["high"],
            return_limit=moments["max"],
            **{f"lr_{k}": adam[k]["lr"] for k in clip},
            **{f"eps_{k}": adam[k]["eps"] for k in clip},
            **{f"clip_{k}": v for k, v in clip.items()},
        )

    def agent(self) -> Agent:
        """An agent with the set's parameters."""
        space = Discrete(self.config["actions"])
        agent = Agent(self.obs_space, space, self.model(), self.recipe, self.ops).to(self.dtype)
        for name, parameter in self.trained(agent).items():
            parameter.data.copy_(self.params[self.names(agent)[name]])
        agent.target_critic.load_state_dict(agent.critic.state_dict())
        return agent

    @staticmethod
    def trained(agent: Agent) -> dict[str, torch.nn.Parameter]:
        return {k: p for k, p in agent.named_parameters() if p.requires_grad}

    @staticmethod
    def names(agent: Agent) -> dict[str, str]:
        """{our parameter: theirs}."""
        return sheeprl_names(k for k, _ in agent.named_parameters())

    def learner(self) -> SeparateLearner:
        learner = SeparateLearner(self.agent(), self.learner_config())
        learner.scale.to(self.dtype)
        return learner

    def batch(self, index: int) -> dict[str, Tensor]:
        """Batch of train step ``index`` (from 0), batch-first."""
        read = lambda key: self.inputs[f"batch{index}/{key}"].transpose(0, 1)  # noqa: E731
        return {
            **{k: self.observation(read(k)) for k in self.obs_space},
            "action": read("actions"),
            "reward": read("rewards")[..., 0],
            "is_terminal": read("terminated")[..., 0].bool(),
            "is_first": read("is_first")[..., 0].bool(),
        }

    @staticmethod
    def observation(value: Tensor) -> Tensor:
        """(..., C, H, W) uint8 -> (..., H, W, C); anything else unchanged."""
        return value.movedim(-3, -1) if value.dtype == torch.uint8 else value

    def no_noise(self) -> UpdateNoise:
        """Zeros: every sample is a mode, as in the set."""
        c = self.config
        rows, latent = c["batch"] * c["sequence"], (c["stochastic_size"], c["discrete_size"])
        zeros = lambda *shape: torch.zeros(shape, dtype=self.dtype)  # noqa: E731
        return UpdateNoise(
            zeros(c["batch"], c["sequence"], *latent),
            ImagineNoise(
                zeros(rows, self.horizon, *latent), zeros(rows, self.horizon + 1, c["actions"])
            ),
        )

    def rows(self, value: Tensor) -> Tensor:
        """Imagined arrays (H, N, ...) with n = t B + b -> ours (N, H, ...) with n = b T + t."""
        value = value.unflatten(1, (self.config["sequence"], self.config["batch"]))
        return value.permute(2, 1, 0, *range(3, value.ndim)).flatten(0, 1)
