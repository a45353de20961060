"""One whole update as every contender runs it: spaces, sizes, a batch, and ours.

Legend: B batch, T time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastdreamer import execution as execution_module
from fastdreamer.agent import Agent
from fastdreamer.config import PRESETS, SIZES, LearnerConfig, ModelConfig
from fastdreamer.execution import Execution
from fastdreamer.kernels import Ops, resolve
from fastdreamer.kernels.twohot import bins
from fastdreamer.learner import Learner
from fastdreamer.recipe import RECIPES

Update = Callable[[], object]
PLAIN = Execution("fp32", compile=False, graph=False)

IMAGE = {"image": Box(0, 255, (64, 64, 3), np.uint8)}
VECTORS = {  # of DeepMind Control's walker
    name: Box(-np.inf, np.inf, (size,), np.float32)
    for name, size in {"height": 1, "orientations": 14, "velocity": 9}.items()
}
DISCRETE, CONTINUOUS = Discrete(9), Box(-1, 1, (6,), np.float32)  # MsPacman's, the walker's


@dataclass(frozen=True)
class Workload:
    """Updates of one recipe and size from batches of 16 x 64 with horizon 15."""

    recipe: str
    size: str
    obs: str
    """"image" (64 x 64 x 3, 9 discrete actions) or "vector" (24 numbers; 6 continuous actions,
    in recipe 2023 the 9 discrete ones)."""
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.size} {self.obs}"

    @property
    def model(self) -> ModelConfig:
        return SIZES[self.recipe][self.size]

    @property
    def learner(self) -> LearnerConfig:
        preset = "atari100k" if self.recipe == "2023" else "atari100k-2025"
        return PRESETS[preset].learner

    @property
    def spaces(self) -> tuple[dict[str, Box], gymnasium.Space]:
        """Of observations by name, and of the action."""
        if self.obs == "image":
            return IMAGE, DISCRETE
        return VECTORS, DISCRETE if self.recipe == "2023" else CONTINUOUS

    @property
    def shape(self) -> tuple[int, int]:
        """B and T of the learner's batch; in recipe 2025 a step of context comes first."""
        learner = self.learner
        return learner.batch_size, learner.batch_length + RECIPES[self.recipe].joint

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """A batch as the learner takes it: random, with some episode ends."""
        g, shape = torch.Generator().manual_seed(0), self.shape
        spaces, actions = self.spaces
        batch = {k: _observation(space, shape, g) for k, space in spaces.items()}
        batch["action"] = _actions(actions, shape, g)
        batch["reward"] = torch.randn(shape, generator=g)
        batch["is_last"] = torch.rand(shape, generator=g) < 0.01
        batch["is_terminal"] = batch["is_last"] & (torch.rand(shape, generator=g) < 0.5)
        batch["is_first"] = batch["is_last"].roll(1, 1)
        if RECIPES[self.recipe].joint:
            model = self.model
            batch["deter"] = torch.randn(*shape, model.deter, generator=g).tanh()
            classes = torch.randint(model.classes, (*shape, model.stoch), generator=g)
            batch["stoch"] = torch.nn.functional.one_hot(classes, model.classes).float()
        return {k: v.to(self.device) for k, v in batch.items()}

    def agent(self, ops: Ops) -> Agent:
        """Ours, with new parameters."""
        torch.manual_seed(0)
        return Agent(*self.spaces, self.model, RECIPES[self.recipe], ops).to(self.device)

    def update(self, ops: Ops, execution: Execution = PLAIN) -> Update:
        """One update of ours, on new parameters, from a batch as the replay gives it."""
        return self.update_of(Learner.make(self.agent(ops), self.learner), execution)

    def update_of(self, learner: Learner, execution: Execution = PLAIN) -> Update:
        """One update of a learner of ours from a batch as the replay gives it."""
        batch = dict(self.batch)
        if "stoch" in batch:
            batch["stoch"] = batch["stoch"].argmax(-1).to(torch.uint8)
        update = execution_module.Update(learner, execution)
        return lambda: update(batch)

    def flops(self) -> int:
        """Dense floating-point operations of one update, by the reference; nothing is computed."""
        with self.counted() as (update, _, counter):
            update()
        return counter.get_total_flops()

    @contextmanager
    def counted(self) -> Iterator[tuple[Update, Learner, FlopCounterMode]]:
        """An update of the reference in which nothing is computed, its learner, and the counter."""
        agent = self.agent(resolve("reference"))
        bins(agent.recipe.bins, agent.model.bins, agent.dtype, agent.device)  # are kept: real ones
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            learner = Learner.make(copy.deepcopy(agent), self.learner)
            batch = {k: fake.from_tensor(v) for k, v in self.batch.items()}
            with FlopCounterMode(display=False) as counter:
                yield lambda: learner.update(batch), learner, counter


def _observation(space: Box, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    if space.dtype == np.uint8:
        return torch.randint(256, (*shape, *space.shape), generator=g, dtype=torch.uint8)
    return torch.randn(*shape, *space.shape, generator=g)


def _actions(space: gymnasium.Space, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    if isinstance(space, Discrete):
        index = torch.randint(int(space.n), shape, generator=g)
        return torch.nn.functional.one_hot(index, int(space.n)).float()
    return 2 * torch.rand(*shape, *CONTINUOUS.shape, generator=g) - 1
