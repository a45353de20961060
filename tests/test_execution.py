"""Compiled losses and mixed precision beside the eager update in float32."""

from __future__ import annotations

import pytest
import torch
from execution_common import B, T, replayed, tiny_learner

from fastdreamer.execution import COMPILED, Act, Execution, Update, compile_losses
from fastdreamer.learner import Learner
from fastdreamer.stored import unpack

RECIPES = ("2023", "2025")


# Compiled --------------------------------------------------------------------------------------


def loss_and_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Of one update: its metrics, gradients and the parameters behind it."""
    metrics, states = learner.update(unpack(replayed(learner), learner.agent))
    return metrics | {"deter": states.deter.detach()} | {k: p.detach() for k, p in learner.agent.named_parameters()}


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled(ops, recipe, backend):
    torch._dynamo.reset()
    eager, compiled = (tiny_learner(recipe, ops) for _ in range(2))
    compile_losses(compiled, backend)
    torch.testing.assert_close(loss_and_gradients(compiled), loss_and_gradients(eager), rtol=1e-5, atol=1e-6)
