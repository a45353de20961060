"""Configuration: frozen dataclasses with a line on each field; sizes and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from fastdreamer.envs.base import EnvOptions


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the networks; ``--size`` sets all of them."""

    deter: int = 512
    """Units of the recurrent state."""
    hidden: int = 512
    """Units of the recurrent model's input block, the prior and the posterior."""
    stoch: int = 32
    """Categorical latents."""
    classes: int = 32
    """Classes of each latent."""
    units: int = 512
    """Units of the hidden layers of every head and of the vector encoder and decoder."""
    layers: int = 2
    """Hidden layers of each of those."""
    cnn_depth: int = 32
    """Channels of the first convolution; they double at each of the following."""
    bins: int = 255
    """Bins of the reward and value distributions (odd)."""
    unimix: float = 0.01
    """Weight of the uniform distribution mixed into latents and policy."""


@dataclass(frozen=True)
class LearnerConfig:
    """Losses and optimisers."""

    batch_size: int = 16
    """Sequences in a batch."""
    batch_length: int = 64
    """Steps of each sequence."""
    horizon: int = 15
    """Imagined steps."""
    replay_ratio: float = 1.0
    """Updates per environment step, exact over a run."""
    prefill: int = 1024
    """Environment steps of uniformly random actions before the first update."""
    gamma: float = 1 - 1 / 333
    """Discount factor."""
    lam: float = 0.95
    """Lambda of the lambda-return."""
    kl_dynamics: float = 0.5
    """Scale of the dynamics KL, which trains the prior."""
    kl_representation: float = 0.1
    """Scale of the representation KL, which trains the posterior."""
    free_nats: float = 1.0
    """KL in nats below which neither is penalised."""
    cont_scale: float = 1.0
    """Scale of the continue loss."""
    entropy_scale: float = 3e-4
    """Entropy bonus of the policy."""
    target_rate: float = 0.02
    """Rate of the target critic's moving average."""
    return_decay: float = 0.99
    """Decay of the running return percentiles."""
    return_low: float = 0.05
    """Lower percentile of the returns."""
    return_high: float = 0.95
    """Upper percentile of the returns."""
    return_limit: float = 1.0
    """Smallest return range that advantages are divided by."""
    lr_world_model: float = 1e-4
    """Adam learning rate of the world model."""
    lr_actor: float = 3e-5
    """Adam learning rate of the actor."""
    lr_critic: float = 3e-5
    """Adam learning rate of the critic."""
    eps_world_model: float = 1e-8
    """Adam epsilon of the world model."""
    eps_actor: float = 1e-5
    """Adam epsilon of the actor."""
    eps_critic: float = 1e-5
    """Adam epsilon of the critic."""
    clip_world_model: float = 1000.0
    """Largest global gradient norm of the world model."""
    clip_actor: float = 100.0
    """Largest global gradient norm of the actor."""
    clip_critic: float = 100.0
    """Largest global gradient norm of the critic."""


@dataclass(frozen=True)
class LogConfig:
    """What is written to the run directory, and how often."""

    every: int = 50
    """Updates between two lines of loss metrics."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = True
    """Write TensorBoard events."""


@dataclass(frozen=True)
class Config:
    """A training run of DreamerV3."""

    preset: str = "atari100k"
    """Named set of defaults: atari100k or demo."""
    recipe: Literal["2023"] = "2023"
    """Which DreamerV3: 2023 (arXiv v1, as sheeprl trains it)."""
    task: str = "ms_pacman"
    """Atari game by name, envpool:<id> or gymnasium:<id>."""
    size: Literal["xs", "s", "m", "l", "xl", "debug"] = "s"
    """Sizes of the networks; single fields can be set by --model.*."""
    steps: int = 100_000
    """Environment steps (of action-repeat frames each) over all environments."""
    num_envs: int = 1
    """Environments stepped together."""
    seed: int = 0
    """Seed of weights, environments, replay and sampling."""
    logdir: Path | None = None
    """Run directory; default runs/<preset>-<task>-<size>-seed<seed>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to learn and act; auto takes a GPU if there is one."""
    backend: Literal["auto", "reference", "cpp"] = "auto"
    """Kernels: auto takes the best available, an explicit choice fails if it is not."""
    threads: int = 0
    """CPU threads of PyTorch; 0 keeps its default."""
    deterministic: bool = False
    """Only deterministic algorithms, so that the same seed gives the same curve."""
    resume: bool = False
    """Continue the run in the log directory from its checkpoint."""
    checkpoint_every: str = "30m"
    """Between checkpoints: environment steps (5000) or minutes (30m)."""
    capacity: int = 1_000_000
    """Steps the replay holds (at most the run's steps are allocated)."""
    eval_episodes: int = 0
    """Episodes to evaluate after training; their mean score is printed and logged."""
    env: EnvOptions = field(default_factory=EnvOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def save_interval(self) -> tuple[float, bool]:
        """Amount and whether it is minutes (else environment steps); ValueError if malformed."""
        minutes = self.checkpoint_every.endswith("m")
        amount = float(self.checkpoint_every.removesuffix("m"))
        if amount <= 0:
            raise ValueError(self.checkpoint_every)
        return amount, minutes


SIZES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "debug": ModelConfig(
            deter=64, hidden=64, stoch=8, classes=8, units=64, layers=1, cnn_depth=4
        ),
        "xs": ModelConfig(deter=256, hidden=256, units=256, layers=1, cnn_depth=24),
        "s": ModelConfig(),
        "m": ModelConfig(deter=1024, hidden=640, units=640, layers=3, cnn_depth=48),
        "l": ModelConfig(deter=2048, hidden=768, units=768, layers=4, cnn_depth=64),
        "xl": ModelConfig(deter=4096, hidden=1024, units=1024, layers=5, cnn_depth=96),
    }
)
"""Model sizes of DreamerV3 v1 (appendix), S = 18 M parameters; "debug" is ours."""

PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "atari100k": Config(),
        "demo": Config(
            preset="demo",
            task="envpool:Catch-v0",
            size="debug",
            steps=4_000,
            num_envs=4,
            eval_episodes=50,
            learner=replace(LearnerConfig(), batch_length=16, prefill=512, replay_ratio=0.5),
        ),
    }
)
"""Defaults by name."""
