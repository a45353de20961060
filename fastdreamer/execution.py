"""How updates and acting are executed: precision, compiled losses, CUDA graphs.

None of it changes the algorithm, which is in ``learner`` and ``agent``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fastdreamer.agent import Agent, Carry
from fastdreamer.errors import UsageError
from fastdreamer.graph import Graphed, Inputs
from fastdreamer.kernels import library
from fastdreamer.learner import Learner, Metrics
from fastdreamer.rssm import State
from fastdreamer.stored import latents, unpack

Precision = Literal["auto", "fp32", "bf16"]
Switch = Literal["auto", "on", "off"]

COMPILED = ("encode", "predict", "judge", "policy_loss", "value_loss", "replay_value_loss")
"""The learner's methods that are compiled: all between the scans, which stay operators."""


@dataclass(frozen=True)
class Execution:
    """What the options come to on a device."""

    precision: Literal["fp32", "bf16"]
    compile: bool
    graph: bool

    @classmethod
    def choose(
        cls, precision: Precision, compile: Switch, graph: Switch, device: torch.device
    ) -> Execution:
        """Where "auto", a GPU has all three, a CPU with AMX bf16 alone, and another CPU none.

        Raises:
            UsageError: an explicit choice cannot work there.
        """
        on_gpu = device.type == "cuda"
        if graph == "on" and not on_gpu:
            raise UsageError("--graph on: it needs a GPU with CUDA; use --graph auto or off")
        missing = _missing_compiler(device)
        if compile == "on" and missing:
            raise UsageError(f"--compile on: it needs {missing}; use --compile auto or off")
        return cls(
            choose_precision(precision, device),
            compile == "on" or (compile == "auto" and on_gpu and not missing),
            graph == "on" or (graph == "auto" and on_gpu),
        )

    def __str__(self) -> str:
        names = {True: "on", False: "off"}
        return (
            f"precision {self.precision}, compile {names[self.compile]}, graph {names[self.graph]}"
        )


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What the option comes to: "auto" is bf16 where products in it have units of their own."""
    if precision != "auto":
        return precision
    return "bf16" if _has_bf16(device) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU from Ampere on, or a CPU whose library uses AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return library.has_amx()


def _missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on a device, or nothing."""
    if device.type == "cuda":
        return "" if find_spec("triton") else "the triton package"
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    return "" if any(map(shutil.which, compilers)) else "a C++ compiler"


def compile_losses(learner: Learner, backend: str = "inductor") -> None:
    """Compile the learner's methods between the scans, each to one graph."""
    for name in COMPILED:
        if hasattr(learner, name):
            method = getattr(learner, name)
            compiled = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)
            setattr(learner, name, compiled)


class Update:
    """One update from a batch as the replay gives it."""

    def __init__(self, learner: Learner, execution: Execution):
        self.learner = learner
        learner.agent.bf16 = execution.precision == "bf16"
        if execution.compile:
            compile_losses(learner)
        self.run: Callable[[Inputs], Any] = self.work
        """:meth:`work`, or its graph; only ``__call__`` counts."""
        if execution.graph:
            self.run = Graphed(self.work, learner.tensors, [learner.generator])

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Metrics, dict[str, Tensor]]:
        """Update.

        Returns:
            Metrics and, in recipe 2025, the latents to store for all steps but the first, on the
            device and until the next call.
        """
        results = self.run(batch)
        self.learner.updates += 1
        return results

    def work(self, batch: Inputs) -> tuple[Metrics, dict[str, Tensor]]:
        """What an update enqueues."""
        learner = self.learner
        metrics, states = learner.learn(unpack(batch, learner.agent))
        return metrics, latents(states) if learner.recipe.joint else {}


class Act:
    """Policy steps for N environments, with noise from a generator.

    Args:
        mode: take the policy's mode (latents are sampled either way).
        graph: as one CUDA graph.
    """

    def __init__(self, agent: Agent, generator: torch.Generator, graph: bool, mode: bool = False):
        self.agent, self.generator, self.mode = agent, generator, mode
        self.run = Graphed(self.work, generators=[generator]) if graph else self.work

    def __call__(self, obs: Mapping[str, Tensor], is_first: Tensor, carry: Carry | None) -> Carry:
        """The next carry, until the next call; arguments as of ``Agent.act``.

        Where ``carry`` is None, the policy takes over in the middle of episodes.
        """
        if carry is None:
            carry, is_first = self.agent.initial_carry(len(is_first)), torch.ones_like(is_first)
        state = {"deter": carry.state.deter, "stoch": carry.state.stoch}
        return self.run({**obs, **state, "is_first": is_first, "last action": carry.action})

    def work(self, inputs: Inputs) -> Carry:
        """What a step enqueues."""
        carry = Carry(State(inputs["deter"], inputs["stoch"]), inputs["last action"])
        obs = {k: inputs[k] for k in self.agent.obs_space}
        noise = self.agent.act_noise(len(carry.action), self.generator)
        return self.agent.act(obs, inputs["is_first"], carry, noise, self.mode)
