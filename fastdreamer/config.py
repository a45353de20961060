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
    """Hidden layers of the vector encoder and decoder, the actor and the critic."""
    head_layers: int = 2
    """Hidden layers of the reward and continue heads."""
    cnn_depth: int = 32
    """Channels of the convolutions, times their multipliers."""
    cnn_mults: tuple[int, ...] = ()
    """Multiplier of each convolution; empty: 1, 2, 4, ... down to 4 x 4 pixels."""
    blocks: int = 8
    """Blocks of the block-GRU and of the block-linear decoder stem (recipe 2025)."""
    bins: int = 255
    """Bins of the reward and value distributions (odd)."""
    unimix: float = 0.01
    """Weight of the uniform distribution mixed into the latents (2023: and the policy)."""

    def channels(self, stages: int) -> list[int]:
        """Channels of each of the encoder's convolutions."""
        return [self.cnn_depth * m for m in self.cnn_mults or (2**i for i in range(stages))]


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
    """Environment steps before the first update; recipe 2023 acts uniformly at random in them."""
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
    """Adam learning rate of the world model (recipe 2023)."""
    lr_actor: float = 3e-5
    """Adam learning rate of the actor (recipe 2023)."""
    lr_critic: float = 3e-5
    """Adam learning rate of the critic (recipe 2023)."""
    eps_world_model: float = 1e-8
    """Adam epsilon of the world model (recipe 2023)."""
    eps_actor: float = 1e-5
    """Adam epsilon of the actor (recipe 2023)."""
    eps_critic: float = 1e-5
    """Adam epsilon of the critic (recipe 2023)."""
    clip_world_model: float = 1000.0
    """Largest global gradient norm of the world model (recipe 2023)."""
    clip_actor: float = 100.0
    """Largest global gradient norm of the actor (recipe 2023)."""
    clip_critic: float = 100.0
    """Largest global gradient norm of the critic (recipe 2023)."""
    lr: float = 4e-5
    """Learning rate of everything (recipe 2025)."""
    eps: float = 1e-20
    """LaProp epsilon (recipe 2025)."""
    warmup: int = 1000
    """Updates over which the learning rate rises from 0 (recipe 2025)."""
    clip_adaptive: float = 0.3
    """Largest ratio of a tensor's gradient norm to its own norm (recipe 2025)."""
    replay_value_scale: float = 0.3
    """Scale of the critic's loss on replayed states (recipe 2025)."""


@dataclass(frozen=True)
class LogConfig:
    """What is written to the run directory, and how often."""

    every: int = 50
    """Updates between two lines of loss metrics."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    video_every: int = 5_000
    """Environment steps between two videos of imagined, true and reconstructed frames in
    TensorBoard; 0: none."""
    wandb: str = ""
    """Weights & Biases project that TensorBoard events are synced to; needs the wandb package."""


@dataclass(frozen=True)
class Config:
    """A training run of DreamerV3."""

    preset: str = "atari100k"
    """Named set of defaults: atari100k, atari100k-2025, dmc_proprio, dmc_vision, crafter, custom,
    vizdoom or demo."""
    recipe: Literal["2023", "2025"] = "2023"
    """Which DreamerV3: 2023 (arXiv v1, as sheeprl trains it) or 2025 (Nature, official code)."""
    task: str = "ms_pacman"
    """Atari game by name, dmc_<name>, crafter_reward, envpool:<id>, gymnasium:<id>,
    minerl:navigate or my.module:make_env."""
    size: str = "s"
    """Sizes of the networks: xs, s, m, l, xl (recipe 2023), 1m to 400m (recipe 2025), or debug;
    single fields can be set by --model.*."""
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
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    """Kernels: auto takes the best available, an explicit choice fails if it is not."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products and convolutions; auto takes bf16 on a GPU and on a CPU with AMX, fp32 on
    another. Weights, optimiser, losses and statistics are fp32 either way."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the losses by torch.compile; auto does on a GPU."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay updates and policy steps as CUDA graphs; auto does on a GPU."""
    threads: int = 0
    """CPU threads of PyTorch; 0 keeps its default."""
    deterministic: bool = False
    """Only deterministic algorithms, so that the same seed gives the same curve."""
    resume: bool = False
    """Insist on a checkpoint in the log directory; where there is one, a run always continues."""
    checkpoint_every: str = "30m"
    """Between checkpoints: environment steps (5000) or minutes (30m)."""
    capacity: int = 1_000_000
    """Steps the replay holds (at most the run's steps are allocated)."""
    eval_episodes: int = 0
    """Episodes to evaluate after training, of the agent and of random actions: evaluation.json."""
    env: EnvOptions = field(default_factory=EnvOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def save_interval(self) -> tuple[float, bool]:
        """Amount and whether it is minutes (else environment steps); ValueError if malformed."""
        minutes = self.checkpoint_every.endswith("m")
        amount = float(self.checkpoint_every.removesuffix("m"))
        if not 0 < amount < float("inf"):
            raise ValueError(self.checkpoint_every)
        return amount, minutes


def _size(width: int, deter: int) -> ModelConfig:
    """A size of recipe 2025: everything but deter follows from the width of the layers."""
    depth = width // 16
    return ModelConfig(
        deter=deter,
        hidden=width,
        classes=depth,
        units=width,
        layers=3,
        head_layers=1,
        cnn_depth=depth,
        cnn_mults=(2, 3, 4, 4),
    )


SIZES: Mapping[str, Mapping[str, ModelConfig]] = MappingProxyType(
    {
        "2023": {
            "debug": ModelConfig(
                deter=64,
                hidden=64,
                stoch=8,
                classes=8,
                units=64,
                layers=1,
                head_layers=1,
                cnn_depth=4,
            ),
            "xs": ModelConfig(
                deter=256, hidden=256, units=256, layers=1, head_layers=1, cnn_depth=24
            ),
            "s": ModelConfig(),
            "m": ModelConfig(
                deter=1024, hidden=640, units=640, layers=3, head_layers=3, cnn_depth=48
            ),
            "l": ModelConfig(
                deter=2048, hidden=768, units=768, layers=4, head_layers=4, cnn_depth=64
            ),
            "xl": ModelConfig(
                deter=4096, hidden=1024, units=1024, layers=5, head_layers=5, cnn_depth=96
            ),
        },
        "2025": {
            "debug": replace(_size(64, 64), hidden=32, stoch=8, classes=8, layers=1),
            "1m": _size(64, 512),
            "12m": _size(256, 2048),
            "25m": _size(384, 3072),
            "50m": _size(512, 4096),
            "100m": _size(768, 6144),
            "200m": _size(1024, 8192),
            "400m": _size(1536, 12288),
        },
    }
)
"""Model sizes by recipe, from the papers' appendices; "debug" is ours."""

# The Nature recipe's differences in numbers; those in kind are in ``recipe``.
_LEARNER_2025 = LearnerConfig(kl_dynamics=1.0, replay_ratio=0.25, prefill=1024)

PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "atari100k": Config(),
        "atari100k-2025": Config(
            preset="atari100k-2025",
            recipe="2025",
            size="12m",
            model=SIZES["2025"]["12m"],
            learner=_LEARNER_2025,
        ),
        # Size, repeat, environments and train ratio 512 as in the official code when it turned to
        # this recipe (2411f7d); since f8817c4 it has size 1m, no repeat and train ratio 1024. A
        # train ratio is replayed steps per agent step, whatever the repeat: 512 / (16 * 64).
        "dmc_proprio": Config(
            preset="dmc_proprio",
            recipe="2025",
            task="dmc_walker_walk",
            size="12m",
            model=SIZES["2025"]["12m"],
            steps=250_000,
            num_envs=16,
            learner=replace(_LEARNER_2025, replay_ratio=0.5, prefill=1040),
        ),
        # The same for images; the official curves have twice the frames.
        "dmc_vision": Config(
            preset="dmc_vision",
            recipe="2025",
            task="dmc_walker_walk",
            size="12m",
            model=SIZES["2025"]["12m"],
            steps=500_000,
            num_envs=16,
            env=EnvOptions(dmc_images=True),
            learner=replace(_LEARNER_2025, replay_ratio=0.5, prefill=1040),
        ),
        # The official code's: train ratio 512, one environment, its default size.
        "crafter": Config(
            preset="crafter",
            recipe="2025",
            task="crafter_reward",
            size="200m",
            model=SIZES["2025"]["200m"],
            steps=1_000_000,
            learner=replace(_LEARNER_2025, replay_ratio=0.5),
        ),
        # For any environment of one's own: ours, between what the official code has for others.
        "custom": Config(
            preset="custom",
            recipe="2025",
            task="gymnasium:CartPole-v1",
            size="12m",
            model=SIZES["2025"]["12m"],
            steps=500_000,
            num_envs=4,
            learner=replace(_LEARNER_2025, replay_ratio=0.5),
        ),
        "demo": Config(
            preset="demo",
            task="envpool:Catch-v0",
            size="debug",
            steps=7_000,
            num_envs=4,
            eval_episodes=50,
            env=EnvOptions(image_size=16),
            model=SIZES["2023"]["debug"],
            learner=LearnerConfig(
                batch_length=16,
                horizon=10,
                prefill=512,
                replay_ratio=0.5,
                lr_world_model=1e-3,
                lr_actor=1e-3,
                lr_critic=1e-3,
            ),
        ),
        "vizdoom": Config(
            preset="vizdoom",
            task="envpool:HealthGathering-v1",
            size="debug",
            steps=20_000,
            num_envs=8,
            env=EnvOptions(image_size=32),
            model=replace(
                SIZES["2023"]["debug"],
                deter=256,
                hidden=128,
                units=128,
                stoch=16,
                classes=16,
                cnn_depth=8,
                layers=2,
            ),
            learner=LearnerConfig(
                batch_length=32,
                horizon=10,
                prefill=2000,
                replay_ratio=0.1,
                lr_world_model=1e-3,
                lr_actor=3e-4,
                lr_critic=3e-4,
            ),
        ),
    }
)
"""Defaults by name."""
