"""Loads golden numbers of recipe 2025 (format: the official JAX code's own arrays).

Sizes, observation keys and kinds of action come from the set's arrays. Gaussian samples in the
sets are mean + std times a fixed vector, every other sample is a mode.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from golden_common import Arrays
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.compat.jax_params import from_jax, jax_names, to_layout
from fastdreamer.config import LearnerConfig, ModelConfig
from fastdreamer.kernels import Ops
from fastdreamer.learner import JointLearner, UpdateNoise
from fastdreamer.recipe import RECIPES
from fastdreamer.rssm import ImagineNoise

NOT_OBSERVED = {"action", "consec", "is_first", "is_last", "is_terminal", "reward", "stepid"}
GAUSSIAN = (0.7, -0.4, 0.3, -0.9)
DEFAULTS = LearnerConfig(kl_dynamics=1.0)


class Golden2025:
    """One set, read in float32 or float64."""

    recipe = RECIPES["2025"]

    def __init__(self, folder: Path, dtype: torch.dtype, ops: Ops):
        self.folder, self.dtype, self.ops = folder, dtype, ops
        results = folder / "f64" if dtype == torch.float64 else folder
        self.params = Arrays(folder / "params.npz", dtype)
        self.inputs = Arrays(folder / "inputs.npz", dtype)
        self.functions, self.agent_, self.grads, self.steps = (
            Arrays(results / f"{name}.npz", dtype) for name in ("funcs", "agent", "grads", "steps")
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, by its official name."""
        return tuple(self.params[name].shape)

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... there are."""
        n = 0
        while pattern.format(n) in self.params:
            n += 1
        return n

    @cached_property
    def actions(self) -> dict[str, Space]:
        """Action spaces by key, from the policy's heads."""
        spaces: dict[str, Space] = {}
        for name in self.params.keys("pol/head/"):
            key, kind, leaf = name.split("/")
            if leaf == "bias" and kind == "logits":
                spaces[key] = Discrete(self.shape(f"pol/head/{name}")[0])
            elif leaf == "bias" and kind == "mean":
                spaces[key] = Box(-1, 1, self.shape(f"pol/head/{name}"))
        return spaces

    @property
    def act_space(self) -> Space:
        single = set(self.actions) == {"action"}
        return self.actions["action"] if single else Dict(self.actions)

    @cached_property
    def obs_space(self) -> dict[str, Box]:
        keys = [k for k in self.inputs.keys("data/") if not k.startswith("dyn/")]
        spaces = {}
        for key in (k for k in keys if k not in NOT_OBSERVED | set(self.actions)):
            value = self.inputs[f"data/{key}"]
            image = value.dtype == torch.uint8
            low, high = (0, 255) if image else (-np.inf, np.inf)
            spaces[key] = Box(low, high, value.shape[2:], np.uint8 if image else np.float32)
        return spaces

    def model(self, depth: int | None = None) -> ModelConfig:
        stoch, classes = self.inputs["data/dyn/stoch"].shape[2:]
        channels = [self.shape(f"enc/cnn{i}/bias")[0] for i in range(self.count("enc/cnn{}/bias"))]
        mults = RECIPE_MULTS[: len(channels)]
        depth = depth or (channels[0] // mults[0] if channels else 2)
        if channels and depth == channels[0] // mults[0]:
            assert channels == [depth * m for m in mults], channels
        return ModelConfig(
            deter=self.inputs["data/dyn/deter"].shape[2],
            hidden=self.shape("dyn/dynin0/bias")[0],
            stoch=stoch,
            classes=classes,
            units=self.shape("val/mlp/linear0/bias")[0],
            layers=self.count("val/mlp/linear{}/bias"),
            head_layers=self.count("rew/mlp/linear{}/bias"),
            cnn_depth=depth,
            cnn_mults=mults or RECIPE_MULTS,
            blocks=self.shape("dyn/dynhid0/kernel")[0],
            bins=self.shape("rew/head/logits/bias")[0],
        )

    @property
    def horizon(self) -> int:
        return self.agent_["img/ret"].shape[1]

    def agent(self) -> Agent:
        agent = Agent(self.obs_space, self.act_space, self.model(), self.recipe, self.ops)
        agent.to(self.dtype)
        from_jax(agent, self.params.npz)
        return agent

    def learner(self, config: LearnerConfig = DEFAULTS) -> JointLearner:
        learner = JointLearner(self.agent(), self.learner_config(config))
        learner.scale.to(self.dtype)
        learner.scale.low.fill_(self.params["retnorm/lo/value"])
        learner.scale.high.fill_(self.params["retnorm/hi/value"])
        return learner

    def learner_config(self, config: LearnerConfig = DEFAULTS) -> LearnerConfig:
        rows, length = self.inputs["data/reward"].shape
        sizes = dict(batch_size=rows, batch_length=length - 1, horizon=self.horizon)
        return LearnerConfig(**{**vars(config), **sizes})

    def vectors(self, prefix: str, agent: Agent) -> Tensor:
        """Action vectors of the arrays ``prefix`` + action key."""
        parts = []
        for key, space in sorted(self.actions.items()):
            value = self.inputs[prefix + key]
            if isinstance(space, Discrete):
                value = torch.nn.functional.one_hot(value.long(), int(space.n))
            parts.append(value.to(self.dtype))
        return torch.cat(parts, -1)

    def batch(self, agent: Agent) -> dict[str, Tensor]:
        """The replayed batch with its step of context and its stored latents."""
        keys = [*self.obs_space, "reward", "is_first", "is_last", "is_terminal"]
        return {
            **{k: self.inputs[f"data/{k}"] for k in keys},
            "action": self.vectors("data/", agent),
            "deter": self.inputs["data/dyn/deter"],
            "stoch": self.inputs["data/dyn/stoch"],
        }

    def action_noise(self, *lead: int) -> Tensor:
        """Zeros for discrete parts, the fixed vector for continuous ones."""
        parts = []
        for _, space in sorted(self.actions.items()):
            if isinstance(space, Discrete):
                parts.append(torch.zeros(int(space.n)))
            else:
                parts.append(torch.tensor(GAUSSIAN[: space.shape[0]], dtype=torch.float64))
        return torch.cat([p.to(self.dtype) for p in parts]).expand(*lead, -1)

    def noise(self) -> UpdateNoise:
        rows, length = self.inputs["loss/obs/reward"].shape
        latent = self.inputs["data/dyn/stoch"].shape[2:]
        zeros = lambda *shape: torch.zeros(*shape, *latent, dtype=self.dtype)  # noqa: E731
        count = rows * length
        return UpdateNoise(
            zeros(rows, length),
            ImagineNoise(zeros(count, self.horizon), self.action_noise(count, self.horizon + 1)),
        )

    @staticmethod
    def official(agent: Agent, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by our parameter names -> by official ones, in their layouts."""
        names = jax_names(agent)
        return {names[k]: to_layout(v.detach()) for k, v in values.items()}


RECIPE_MULTS = (2, 3, 4, 4)
