"""What a run will do: checks of its configuration, and the announcement at its start."""

from __future__ import annotations

import functools
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastdreamer
from fastdreamer.config import Config, LearnerConfig
from fastdreamer.errors import UsageError
from fastdreamer.graph import preserved
from fastdreamer.kernels import Ops
from fastdreamer.recipe import RECIPES

if TYPE_CHECKING:
    from fastdreamer.trainer import Trainer

LONG = 24 * 3600  # seconds from which smaller runs are named


def check(config: Config) -> None:
    """Refuse values that cannot work, naming the option and what is valid.

    Raises:
        UsageError: in one line.
    """
    learner, model = config.learner, config.model
    _check_range(
        "at least 1",
        lambda v: v >= 1,
        config,
        ["steps", "num_envs", "capacity", "log.every"]
        + [f"learner.{k}" for k in ("batch_size", "batch_length", "horizon")]
        + [f"model.{k}" for k, v in vars(model).items() if type(v) is int],
    )
    _check_range("at least 2", lambda v: v >= 2, config, ["model.classes", "model.bins"])
    _check_range(
        "in 0..1",
        lambda v: 0 <= v <= 1,
        config,
        ["model.unimix"]
        + [f"learner.{k}" for k in ("gamma", "lam", "target_rate", "return_decay")]
        + ["learner.return_low", "learner.return_high"],
    )
    _check_range(
        "positive and finite",
        lambda v: 0 < v < math.inf,
        config,
        [f"learner.{k}" for k in vars(learner) if k.startswith(("lr", "eps", "clip"))]
        + ["learner.return_limit"],
    )
    _check_range(
        "at least 0 and finite",
        lambda v: 0 <= v < math.inf,
        config,
        ["seed", "threads", "eval_episodes", "log.video_every", "learner.prefill", "learner.warmup"]
        + [f"learner.{k}" for k in vars(learner) if k.endswith("_scale") or k.startswith("kl_")]
        + ["learner.free_nats", "learner.replay_ratio"],
    )
    _check_recipe(config)
    if learner.return_low >= learner.return_high:
        raise UsageError("--learner.return-low must be below --learner.return-high")
    if config.model.bins % 2 == 0:
        raise UsageError(f"--model.bins must be odd, got {config.model.bins}")
    try:
        config.save_interval  # noqa: B018
    except ValueError:
        raise UsageError(
            f"--checkpoint-every {config.checkpoint_every}: give steps (5000) or minutes (30m)"
        ) from None
    needed = window(config) * config.num_envs
    if learner.replay_ratio and learner.prefill < needed:
        raise UsageError(
            f"--learner.prefill must be at least sequence length x environments = {needed}, "
            f"got {learner.prefill}"
        )
    if min(config.capacity, config.steps) < needed:
        raise UsageError(
            f"--steps and --capacity must be at least sequence length x environments = {needed}"
        )


def _check_range(rule: str, valid: Callable[[Any], bool], config: Config, names: list[str]) -> None:
    for name in names:
        value = functools.reduce(getattr, name.split("."), config)
        if not valid(value):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} must be {rule}, got {value}")


ONE_RECIPE = {
    "2023": [f"{k}_{m}" for k in ("lr", "eps", "clip") for m in ("world_model", "actor", "critic")],
    "2025": ["lr", "eps", "warmup", "clip_adaptive", "replay_value_scale"],
}
"""Learner options that only one recipe has."""


def _check_recipe(config: Config) -> None:
    """Refuse options of the other recipe, and latents that the replay cannot store."""
    for recipe, names in ONE_RECIPE.items():
        for name in names:
            changed = getattr(config.learner, name) != getattr(LearnerConfig(), name)
            if changed and recipe != config.recipe:
                option = f"--learner.{name.replace('_', '-')}"
                raise UsageError(f"{option} is of recipe {recipe}; this run is of {config.recipe}")
    if RECIPES[config.recipe].joint and config.model.classes > 256:
        raise UsageError(f"--model.classes must be at most 256, got {config.model.classes}")


def total_updates(config: Config, step: int) -> int:
    """Updates that the train ratio owes by environment step ``step``."""
    learner = config.learner
    return max(0, math.floor(learner.replay_ratio * (step - learner.prefill) + 1e-9))


def capacity(config: Config) -> int:
    """Steps that the replay holds: no more than the run has."""
    return min(config.capacity, -(-config.steps // config.num_envs) * config.num_envs)


def window(config: Config) -> int:
    """Steps of a replayed sequence: recipe 2025 has one more, whose latents are the start."""
    return config.learner.batch_length + RECIPES[config.recipe].joint


def default_logdir(config: Config) -> Path:
    """runs/<preset>-<task>-<size>-seed<seed>."""
    task = re.sub(r"[^\w.-]+", "-", config.task)
    return Path("runs") / f"{config.preset}-{task}-{config.size}-seed{config.seed}"


def describe(trainer: Trainer) -> str:
    """What the run will do and, from a short measurement, how long it will take."""
    config, learner, agent = trainer.config, trainer.config.learner, trainer.agent
    size = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    steps = config.steps - trainer.step
    updates = total_updates(config, config.steps) - trainer.learner.updates
    frames = f" of {trainer.envs.frames} frames" if trainer.envs.frames > 1 else ""
    resumed = f" from step {trainer.step:,} on" if trainer.step else ""
    kind = "" if RECIPES[config.recipe].joint else "random "
    lines = [
        f"fastdreamer {fastdreamer.__version__}: {config.task}, {steps:,} steps{frames}{resumed}, "
        f"{config.num_envs} environment(s), seed {config.seed}",
        f"recipe {config.recipe}, size {config.size} ({size / 1e6:.1f} M parameters), "
        f"{updates:,} updates of {learner.batch_size} x {learner.batch_length} "
        f"(replay ratio {learner.replay_ratio:g} after {learner.prefill:,} {kind}steps)",
        f"device {trainer.device} ({_device_name(trainer.device)}), kernels {_served(agent.ops)}, "
        f"log directory {trainer.logdir}",
        _execution(trainer),
    ]
    update, act = _measure(trainer)
    seconds = update * updates + act * steps
    lines.append(
        f"measured {update:.3g} s an update, {act * 1e3:.2g} ms a policy step: "
        f"about {timedelta(seconds=round(seconds))} besides the environment's own time"
    )
    if seconds > LONG:
        lines.append(
            "that is long for this device: --preset demo takes minutes; "
            "--size xs or --size debug and fewer --steps are quicker"
        )
    return "\n".join(lines)


def _served(ops: Ops) -> str:
    """Which backend serves how many of the operators."""
    counts = Counter(ops.served_by.values())
    return ", ".join(f"{backend} ({count} operators)" for backend, count in counts.items())


def _execution(trainer: Trainer) -> str:
    """How it is computed; where a checkpoint is of another precision, that too."""
    before, now = trainer.resumed_precision, trainer.execution.precision
    resumed = f" (until step {trainer.step:,} {before})" if before != now else ""
    return str(trainer.execution).replace(now, now + resumed, 1)


def _measure(trainer: Trainer) -> tuple[float, float]:
    """Seconds of one update and of one policy step, which leave nothing behind."""
    learner, config = trainer.learner, trainer.config
    rows = trainer.replay.allocate(config.learner.batch_size, window(config))
    del rows["step_id"]
    batch = {k: torch.zeros_like(v, device=trainer.device) for k, v in rows.items()}
    count = config.num_envs
    spaces = trainer.agent.obs_space
    obs = {k: batch[k][0, :1].expand(count, *batch[k].shape[2:]) for k in spaces}
    first = torch.ones(count, dtype=torch.bool, device=trainer.device)
    trainer.prefetcher.wait()  # beside a capture no batch should be on its way
    with preserved(learner.tensors, [learner.generator, trainer.generator]):
        act = _time(lambda: trainer.act(obs, first, None), trainer.device)
        return _time(lambda: trainer.update.run(batch), trainer.device), act


def _time(task: Callable[[], Any], device: torch.device) -> float:
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads"
