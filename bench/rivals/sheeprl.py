"""sheeprl's own update: ``dreamer_v3`` for recipe 2023, ``dreamer_v3_5`` for recipe 2025.

Its configuration files, ``build_agent``, optimisers, ``Moments`` and ``train`` are used as they
are, through Lightning Fabric; only the environment, which would name the spaces, is replaced by
the workload's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from bench.rivals import Makers, settings
from bench.workload import Update, Workload

PACKAGES = ("sheeprl==0.8.4",)
SIZES = {
    "2023": {name: f"dreamer_v3_{name.upper()}" for name in ("xs", "s", "m", "l", "xl")},
    "2025": {
        name: f"dreamer_v3_5_{name.upper()}"
        for name in ("1m", "12m", "25m", "50m", "100m", "200m", "400m")
    },
}
NAMES = {"action": "actions", "reward": "rewards", "is_terminal": "terminated"}
# Precision of Fabric and of float32 matrix products; "medium" lets a CPU use bfloat16 for them.
PRECISIONS = {
    "float32": ("32-true", "high"),
    "float32, bfloat16 products": ("32-true", "medium"),
    "bf16-mixed": ("bf16-mixed", "high"),
}


def supports(workload: Workload) -> bool:
    """Every size and observation, but not our own size "debug"."""
    return workload.size in SIZES[workload.recipe]


def updates(workload: Workload, compiled: bool) -> Makers:
    """Float32 and bf16-mixed, each as it is and compiled by its own ``algo.compile``."""
    make = _make_2023 if workload.recipe == "2023" else _make_2025
    return {
        name + (", torch.compile" if compile_ else ""): partial(
            _build, make, workload, *precision, compile_
        )
        for compile_, (name, precision) in product((False, True), PRECISIONS.items())
        if compiled or not compile_
    }


def _build(
    make: Callable[..., Update], workload: Workload, precision: str, products: str, compiled: bool
) -> Update:
    """One update under the settings that its command line would make."""
    config = _config(workload, precision, compiled)
    with settings(products):
        torch.manual_seed(0)
        update = make(workload, config, _fabric(config))

    def configured() -> None:
        with settings(products):
            update()

    return configured


def _config(workload: Workload, precision: str, compiled: bool) -> Any:
    """Its configuration files, composed as its command line does."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from sheeprl.utils.utils import dotdict

    images = [k for k, v in workload.spaces[0].items() if len(v.shape) == 3]
    vectors = [k for k in workload.spaces[0] if k not in images]
    overrides = [
        f"exp={'dreamer_v3' if workload.recipe == '2023' else 'dreamer_v3_5'}",
        f"algo={SIZES[workload.recipe][workload.size]}",
        f"algo.cnn_keys.encoder=[{','.join(images)}]",
        f"algo.mlp_keys.encoder=[{','.join(vectors)}]",
        "algo.cnn_keys.decoder=${algo.cnn_keys.encoder}",
        "algo.per_rank_batch_size=16",
        "algo.per_rank_sequence_length=64",
        f"algo.compile.enabled={compiled}",
        f"fabric.precision={precision}",
        f"fabric.accelerator={workload.device}",
        "metric.log_level=0",
    ]
    with initialize_config_module("sheeprl.configs", version_base="1.3"):
        config = compose("config", overrides)
    config.run_name = "update"  # its default interpolates Hydra's clock
    return dotdict(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))


def _fabric(config: Any) -> Any:
    from lightning.fabric import Fabric

    return Fabric(
        accelerator=config.fabric.accelerator, devices=1, precision=config.fabric.precision
    )


def _agent(algorithm: str, workload: Workload, config: Any, fabric: Any) -> tuple[Any, ...]:
    """World model, actor, critic, target critic."""
    module = importlib.import_module(f"sheeprl.algos.{algorithm}.agent")
    observations = spaces.Dict({k: _space(v) for k, v in workload.spaces[0].items()})
    sizes, continuous = _actions(workload)
    return module.build_agent(fabric, sizes, continuous, config, observations)[:4]


def _space(space: spaces.Box) -> spaces.Box:
    """Its images are (C, H, W)."""
    if len(space.shape) == 1:
        return space
    height, width, channels = space.shape
    return spaces.Box(0, 255, (channels, height, width), np.uint8)


def _actions(workload: Workload) -> tuple[list[int], bool]:
    """Sizes of the action's parts, and whether it is continuous."""
    space = workload.spaces[1]
    if isinstance(space, spaces.Discrete):
        return [int(space.n)], False
    return [int(np.prod(space.shape or ()))], True


def _batch(workload: Workload) -> dict[str, Tensor]:
    """The workload's batch by its names, time first, images (C, H, W), flags (T, B, 1)."""
    batch = {NAMES.get(k, k): v.transpose(0, 1) for k, v in workload.batch.items()}
    batch["truncated"] = batch.pop("is_last") & ~batch["terminated"]
    for name, value in batch.items():
        batch[name] = value.unsqueeze(-1) if value.ndim == 2 else value
        if value.dtype == torch.uint8:
            batch[name] = value.movedim(-1, -3).contiguous()
    return batch


def _make_2023(workload: Workload, config: Any, fabric: Any) -> Update:
    """The body of the loop over batches in its ``dreamer_v3.main``."""
    import hydra
    from sheeprl.algos.dreamer_v3 import dreamer_v3
    from sheeprl.algos.dreamer_v3.utils import Moments

    world_model, actor, critic, target = _agent("dreamer_v3", workload, config, fabric)
    algo = config.algo
    optimizers = fabric.setup_optimizers(
        *(
            hydra.utils.instantiate(part.optimizer, params=module.parameters(), _convert_="all")
            for part, module in (
                (algo.world_model, world_model),
                (algo.actor, actor),
                (algo.critic, critic),
            )
        )
    )
    moments = _moments(Moments, config)
    # Its replay hands over float32; train() divides images by 255 itself.
    batch = {k: v.float() for k, v in _batch(workload).items()}
    sizes, continuous = _actions(workload)

    def update() -> None:
        tau = algo.critic.tau
        for p, q in zip(critic.module.parameters(), target.parameters(), strict=True):
            q.data.copy_(tau * p.data + (1 - tau) * q.data)
        dreamer_v3.train(
            *(fabric, world_model, actor, critic, target),
            *optimizers,
            *(dict(batch), None, config, continuous, sizes, moments),
        )

    return update


def _make_2025(workload: Workload, config: Any, fabric: Any) -> Update:
    """The body of the loop over batches in its ``dreamer_v3_5.main``."""
    import hydra
    from sheeprl.algos.dreamer_v3_5 import dreamer_v3_5
    from sheeprl.algos.dreamer_v3_5.utils import Moments

    world_model, actor, critic, target = _agent("dreamer_v3_5", workload, config, fabric)
    params = [p for module in (world_model, actor, critic) for p in module.parameters()]
    optimizer = fabric.setup_optimizers(
        hydra.utils.instantiate(config.algo.optimizer, params=params, _convert_="all")
    )
    moments = _moments(Moments, config)
    batch = _batch(workload)
    batch["stoch"] = batch["stoch"].argmax(-1).to(torch.uint8)
    sizes, _ = _actions(workload)

    def update() -> None:
        dreamer_v3_5.train(
            *(fabric, config, world_model, actor, critic, target),
            *(optimizer, moments, dict(batch), None, sizes),
        )
        dreamer_v3_5.update_target_critic(critic, target, config.algo.critic.tau)

    return update


def _moments(kind: Callable[..., Any], config: Any) -> Any:
    moments = config.algo.actor.moments
    return kind(moments.decay, moments.max, moments.percentile.low, moments.percentile.high)
