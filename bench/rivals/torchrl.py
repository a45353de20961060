"""TorchRL's DreamerV3 learner, recipe 2025 from vectors.

The wheel on PyPI holds the losses and the optimisation stepper (``torchrl.objectives``,
``torchrl.trainers.algorithms``) and, beside the package, the example that puts networks and losses
together; used here as its own learner benchmark uses it, but for the example's YAML files, which
the wheel lacks: ``CONFIG`` stands for config.yaml with config_dmc_walker.yaml over it.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.rivals import Makers, settings
from bench.workload import CONTINUOUS, VECTORS, Update, Workload

PACKAGES = ("torchrl==0.14.1", "tensordict==0.14.3", "hydra-core==1.3.2")

OBSERVATION = sum(space.shape[0] for space in VECTORS.values())
ACTION = CONTINUOUS.shape[0]
CONFIG: dict[str, dict[str, Any]] = {
    "env": {
        "backend": "custom",
        "factory": "bench.rivals.torchrl:environment",
        "seed": 0,
        "use_seed": False,
        "max_episode_steps": 1000,
        "vector_key": "observation",
        "pixels_key": None,
    },
    "collector": {"num_envs": 1},
    "networks": {
        "num_categoricals": 32,
        "unimix": 0.01,
        "recurrent_model": "block_gru",
        "num_blocks": 8,
        "dynamics_layers": 1,
        "prior_layers": 2,
        "posterior_layers": 1,
        "norm_eps": 1e-4,
        "decoder_event_dims": [space.shape[0] for space in VECTORS.values()],
        "num_reward_bins": 255,
        "num_value_bins": 255,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "reward_layers": 1,
        "actor_layers": 3,
        "value_layers": 3,
        "policy_min_std": 0.1,
        "policy_max_std": 1.0,
    },
    "optimization": {
        "mixed_precision": True,  # which its stepper heeds on CUDA only
        "compile": "off",
        "compile_train_step_mode": "default",
        "rssm_scan_unroll": 8,
        "lr": 4e-5,
        "optimizer_eps": 1e-20,
        "adaptive_grad_clip": 0.3,
        "warmup_steps": 1000,
        "imagination_horizon": 15,
        "continuation_horizon": 333,
        "use_reinforce": True,
        "return_normalization_rate": 0.01,
        "return_normalization_min_scale": 1.0,
        "slow_critic_regularization": 1.0,
        "slow_critic_tau": 0.02,
        "replay_value_loss_weight": 0.3,
        "free_bits": 1.0,
        "dynamic_loss_weight": 1.0,
        "representation_loss_weight": 0.1,
        "gamma": 1.0,
        "lmbda": 0.95,
    },
}
PRODUCTS = {"": "high", ", bfloat16 products": "medium"}
"""Precision of float32 matrix products; "medium" lets a CPU use bfloat16 for them."""


def supports(workload: Workload) -> bool:
    """Every size of recipe 2025 from vectors, but not our own size "debug"."""
    return (workload.recipe, workload.obs) == ("2025", "vector") and workload.size != "debug"


def updates(workload: Workload, compiled: bool) -> Makers:
    """As it is; compiled are the scan alone or the whole step, which on CUDA is also captured."""
    modes = ["eager", "compiled scan", "compiled step"] if compiled else ["eager"]
    precision = "float32" if workload.device == "cpu" else "bf16-mixed"
    return {
        f"{precision}{name}, {mode}": partial(_build, workload, mode, products)
        for mode in modes
        for name, products in PRODUCTS.items()
    }


def environment(**_: Any) -> Any:
    """An environment that is never stepped: the example reads the spaces of one."""
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs import EnvBase

    class Spaces(EnvBase):
        def __init__(self) -> None:
            super().__init__(device="cpu")
            self.observation_spec = Composite(observation=Unbounded((OBSERVATION,)))
            self.action_spec = Bounded(-1, 1, (ACTION,))
            self.reward_spec = Unbounded((1,))

        def _reset(self, tensordict: Any, **_: Any) -> Any:
            return self.observation_spec.zero()

        def _step(self, tensordict: Any) -> Any:
            raise NotImplementedError

        def _set_seed(self, seed: int | None) -> None:
            pass

    return Spaces()


def _example() -> dict[str, Any]:
    """What its train.py defines."""
    package = importlib.util.find_spec("torchrl")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent.parent / "sota-implementations" / "dreamer_v3"
    sys.path.insert(0, str(folder))
    try:
        return runpy.run_path(str(folder / "train.py"), run_name="bench")
    finally:
        sys.path.remove(str(folder))


def _config(workload: Workload, mode: str) -> Any:
    from omegaconf import OmegaConf

    model, device = workload.model, workload.device
    config = OmegaConf.create(CONFIG)
    config.networks.update(
        rnn_hidden_dim=model.deter, num_classes=model.classes, hidden_dim=model.units
    )
    config.optimization.update(
        compile_rssm=None if mode == "eager" else "scan",
        compile_train_step=mode == "compiled step",
        cudagraph_train_step=mode != "eager" and device == "cuda",
    )
    return config


def _build(workload: Workload, mode: str, products: str) -> Update:
    """One update of its stepper: losses, backward, optimiser, slow value target."""
    example, config = _example(), _config(workload, mode)
    device = torch.device(workload.device)
    with settings(products):
        torch.manual_seed(0)
        learner = example["_build_learner"](config, device, OBSERVATION, ACTION)
        stepper = example["_make_learner_update"](config, device, learner)
        batch = _batch(workload)
        if mode != "eager":
            stepper.warmup(batch.clone())

    def update() -> None:
        with settings(products):
            stepper.step(None, batch)

    return update


def _batch(workload: Workload) -> Any:
    """The workload's transitions; resets only fall between its sequences, so there are none."""
    from tensordict import TensorDict

    ours = workload.batch
    shape = (workload.shape[0], workload.shape[1] - 1)
    before, after = ({k: v[:, s] for k, v in ours.items()} for s in (slice(-1), slice(1, None)))
    never = torch.zeros(*shape, 1, dtype=torch.bool, device=workload.device)
    return TensorDict(
        {
            "state": before["stoch"].flatten(-2),
            "belief": before["deter"],
            "action": before["action"],
            "is_init": never.clone(),
            "next": {
                "observation": torch.cat([after[k] for k in VECTORS], -1),
                "reward": after["reward"].unsqueeze(-1),
                "done": never.clone(),
                "terminated": never.clone(),
                "truncated": never.clone(),
            },
        },
        shape,
        device=workload.device,
    )
