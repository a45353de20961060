"""The training loop: act, store, learn, log, save.

Order (fixed; threads change time, never results): step t acts with the weights after all updates
due by step t - 1, its row is stored, the batches of the updates now due are drawn, and those run
while the environments step.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

import fastdreamer
from fastdreamer import checkpoint, replay
from fastdreamer.agent import Agent, Carry
from fastdreamer.checkpoint import Checkpoint, CheckpointError
from fastdreamer.cli import UsageError
from fastdreamer.config import Config
from fastdreamer.envs import make_envs
from fastdreamer.evaluation import Rows, agent_policy, random_policy, run_episodes
from fastdreamer.host import keep_freed_memory
from fastdreamer.kernels import resolve
from fastdreamer.learner import Learner
from fastdreamer.logger import Logger
from fastdreamer.replay import Column, Replay
from fastdreamer.staging import Prefetcher

FLAGS = ("is_first", "is_last", "is_terminal")


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    logdir: Path
    agent: Agent
    scores: list[float]
    """Scores of all training episodes of this process."""
    evaluation: dict[str, Any] | None
    """Evaluation after training, if asked for."""


class Trainer:
    """One run: builds everything from the configuration, resumes where there is a checkpoint.

    Args:
        config: the run.
        factory: makes one Gymnasium environment, instead of ``config.task``.

    Raises:
        UsageError, TaskError, CheckpointError: what the user can mend, in one line.
    """

    def __init__(self, config: Config, factory: Callable[[], gymnasium.Env] | None = None):
        check(config)
        self.config, self.factory = config, factory
        self.device = _device(config)
        keep_freed_memory()
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        seeds = np.random.SeedSequence(config.seed).generate_state(5)
        init, learner, act, replay_seed, env = (int(s) % 2**31 for s in seeds)
        # Environments live in one thread of their own, beside which updates run.
        self.worker = ThreadPoolExecutor(1, "fastdreamer-env")
        self.envs = self._in_worker(
            lambda: make_envs(factory or config.task, config.num_envs, env, config.env)
        )
        self.action_space = batch_space(self.envs.act_space, config.num_envs)
        self.action_space.seed(act)
        self.agent, self.learner = self._build(init, learner)
        self.generator = torch.Generator(self.device).manual_seed(act)
        self.carry: Carry | None = None
        self.step = 0
        self.scores: list[float] = []
        self.returns, self.lengths = np.zeros(config.num_envs), np.zeros(config.num_envs, int)
        self.replay = Replay(
            self._columns(),
            self._capacity(),
            config.num_envs,
            replay_seed,
            pin_memory=self.device.type == "cuda",
            window=config.learner.batch_length,
        )
        self.prefetcher = Prefetcher(
            self.replay, config.learner.batch_size, config.learner.batch_length, self.device
        )
        self.logdir = config.logdir or default_logdir(config)
        saved = self._find_checkpoint()
        self._write_config()
        info = self._restore(saved) if saved else {}
        self.logger = Logger(
            self.logdir,
            config.steps,
            self.step,
            info.get("elapsed", 0.0),
            info.get("metrics_bytes", 0),
            config.log.tensorboard,
            config.log.progress,
        )
        self._metrics: dict[str, Tensor] = {}
        self._since_log = (0, self.step, time.monotonic())
        self._last_save = (self.step, time.monotonic())
        self._stop: int | None = None

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free threads, environments and files."""
        self.prefetcher.close()
        self._in_worker(self.envs.close)
        self.worker.shutdown()
        self.logger.close()

    def run(self) -> Result:
        """Train to the configured step, save, evaluate. SIGINT and SIGTERM save and exit."""
        if self.step < self.config.steps:
            print(self.plan(), flush=True)
            handlers = {
                s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                self._loop()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        else:
            print(f"{self.logdir} is complete at step {self.step:,}: raise --steps to go on")
        evaluation = self._evaluate() if self.config.eval_episodes else None
        return Result(self.logdir, self.agent, self.scores, evaluation)

    def _loop(self) -> None:
        rows = self._in_worker(self.envs.reset)
        while self.step < self.config.steps and self._stop is None:
            action = self._act(rows)
            self.replay.add(self._row(rows, action))
            self.step += self.config.num_envs
            due = self.due()
            if due:
                self.prefetcher.request()
            stepped = self.worker.submit(self.envs.step, action)
            self._learn(due)
            rows = stepped.result()
            self.logger.advance(self.config.num_envs)
            self._track(rows)
            if self._save_due():
                self.save()
        self.save()
        if self._stop is not None:
            self.logger.close()
            print(f"stopped at step {self.step:,}; the same command continues from there")
            raise SystemExit(128 + self._stop)

    def _act(self, rows: Rows) -> np.ndarray:
        if self.step < self.config.learner.prefill:
            return self.action_space.sample()
        obs = {k: torch.from_numpy(rows[k]).to(self.device) for k in self.agent.obs_space}
        first = torch.from_numpy(rows["is_first"]).to(self.device)
        if self.carry is None:  # the policy takes over in the middle of episodes
            self.carry = self.agent.initial_carry(self.config.num_envs)
            first = torch.ones_like(first)
        noise = self.agent.act_noise(self.config.num_envs, self.generator)
        action, self.carry = self.agent.act(obs, first, self.carry, noise)
        return action.cpu().numpy()

    def due(self) -> int:
        """Updates that the train ratio owes at the current step."""
        learner = self.config.learner
        owed = math.floor(learner.replay_ratio * (self.step - learner.prefill) + 1e-9)
        return max(0, owed - self.learner.updates)

    def _learn(self, due: int) -> None:
        for left in reversed(range(due)):
            batch = self.prefetcher.get()
            if left:
                self.prefetcher.request()
            for name, value in self.learner.update(batch).items():
                self._metrics[name] = self._metrics.get(name, 0) + value
            if self.learner.updates % self.config.log.every == 0:
                self._log()

    def _log(self) -> None:
        """Means of the losses since the last line, with one transfer from the device."""
        updates, step, at = self._since_log
        count, now = self.config.log.every, time.monotonic()
        values = (torch.stack([v.float() for v in self._metrics.values()]) / count).tolist()
        metrics = dict(zip(self._metrics, values, strict=True))
        metrics["updates_per_second"] = (self.learner.updates - updates) / (now - at)
        metrics["env_steps_per_second"] = (self.step - step) / (now - at)
        self.logger.write(self.step, self.learner.updates, metrics)
        self._metrics, self._since_log = {}, (self.learner.updates, self.step, now)

    def _track(self, rows: Rows) -> None:
        self.returns += rows["reward"]
        self.lengths += ~rows["is_first"]
        for i in np.flatnonzero(rows["is_last"]):
            score, length = float(self.returns[i]), int(self.lengths[i])
            self.scores.append(score)
            self.logger.episode(self.step, self.learner.updates, score, length)
            self.returns[i] = self.lengths[i] = 0

    # What the run is made of

    def _build(self, init_seed: int, learner_seed: int) -> tuple[Agent, Learner]:
        try:
            ops = resolve(self.config.backend, self.device)
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        torch.manual_seed(init_seed)
        try:
            agent = Agent(self.envs.obs_space.spaces, self.envs.act_space, self.config.model, ops)
        except ValueError as error:
            raise UsageError(f"task {self.config.task}: {error}") from None
        agent.to(self.device)
        return agent, Learner(agent, self.config.learner, learner_seed)

    def _columns(self) -> dict[str, Column]:
        columns = {
            k: Column(space.shape, _torch_dtype(space.dtype))
            for k, space in self.envs.obs_space.spaces.items()
        }
        space = self.envs.act_space
        columns["action"] = Column(space.shape or (), _torch_dtype(space.dtype))
        columns["reward"] = Column((), torch.float32)
        return columns | {k: Column((), torch.bool) for k in FLAGS}

    def _row(self, rows: Rows, action: np.ndarray) -> Rows:
        return rows | {"action": np.asarray(action, self.envs.act_space.dtype)}

    def _capacity(self) -> int:
        needed = -(-self.config.steps // self.config.num_envs) * self.config.num_envs
        return min(self.config.capacity, needed)

    def _in_worker(self, task: Callable[[], Any]) -> Any:
        return self.worker.submit(task).result()

    # What it says at the start

    def plan(self) -> str:
        """What the run will do and, from a short measurement, how long it will take."""
        config, learner = self.config, self.config.learner
        size = sum(p.numel() for p in self.agent.parameters() if p.requires_grad)
        steps, updates = config.steps - self.step, self._updates_left()
        frames = f" of {config.env.action_repeat} frames" if self._is_atari() else ""
        lines = [
            f"fastdreamer {fastdreamer.__version__}: {config.task}, {steps:,} steps{frames}"
            + (f" from step {self.step:,} on" if self.step else "")
            + f", {config.num_envs} environment(s), seed {config.seed}",
            f"recipe {config.recipe}, size {config.size} ({size / 1e6:.1f} M parameters), "
            f"{updates:,} updates of {learner.batch_size} x {learner.batch_length} "
            f"(replay ratio {learner.replay_ratio:g} after {learner.prefill:,} random steps)",
            f"device {self.device} ({self._device_name()}), kernels {self.agent.ops.backend}, "
            f"log directory {self.logdir}",
        ]
        update, act = self._measure()
        seconds = update * updates + act * steps
        lines.append(
            f"measured {update:.3g} s an update, {act * 1e3:.2g} ms a policy step: "
            f"about {timedelta(seconds=round(seconds))} besides the environment's own time"
        )
        if seconds > 24 * 3600:
            lines.append(
                "that is long for this device: --preset demo takes minutes; "
                "--size xs or --size debug and fewer --steps are quicker"
            )
        return "\n".join(lines)

    def _updates_left(self) -> int:
        learner = self.config.learner
        total = math.floor(learner.replay_ratio * (self.config.steps - learner.prefill) + 1e-9)
        return max(0, total - self.learner.updates)

    def _measure(self) -> tuple[float, float]:
        """Seconds of one update and of one policy step, on a copy of the agent."""
        agent = copy.deepcopy(self.agent)
        learner, config = Learner(agent, self.config.learner), self.config.learner
        batch = self.replay.allocate(config.batch_size, config.batch_length)
        batch = {k: torch.zeros_like(v, device=self.device) for k, v in batch.items()}
        rows = self.config.num_envs
        obs = {k: batch[k].flatten(0, 1)[:rows] for k in agent.obs_space}
        if len(next(iter(obs.values()))) < rows:
            obs = {k: v[:1].expand(rows, *v.shape[1:]) for k, v in obs.items()}
        first = torch.ones(rows, dtype=torch.bool, device=self.device)
        noise = agent.act_noise(rows, learner.generator)
        carry = agent.initial_carry(rows)
        act = self._time(lambda: agent.act(obs, first, carry, noise))
        return self._time(lambda: learner.update(batch)), act

    def _time(self, task: Callable[[], Any]) -> float:
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            task()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _is_atari(self) -> bool:
        return ":" not in self.config.task or self.config.task.startswith("atari:")

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{torch.get_num_threads()} threads"

    # Saving and resuming

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = number

    def _save_due(self) -> bool:
        amount, minutes = self.config.save_interval
        step, at = self._last_save
        if minutes:
            return time.monotonic() - at >= 60 * amount
        return self.step - step >= amount

    def save(self) -> Checkpoint:
        """Write a checkpoint of the whole run; logs how long the loop stood still for it."""
        start = time.monotonic()
        manifest = self.replay.save(self.logdir / "replay")
        state = {
            "agent": self.agent.state_dict(),
            "learner": self.learner.state_dict(),
            "act_generator": self.generator.get_state(),
            "action_space": self.action_space.np_random.bit_generator.state,
            "prefetcher": self.prefetcher.state_dict(),
        }
        info = {
            "updates": self.learner.updates,
            "replay": manifest,
            "elapsed": self.logger.elapsed,
            "metrics_bytes": self.logger.bytes_written,
        }
        folder = self.logdir / "checkpoints"
        saved = checkpoint.save(folder, self.step, state, info)
        replay.prune(
            self.logdir / "replay", [c.info["replay"] for c in checkpoint.find_all(folder)]
        )
        self._last_save = (self.step, time.monotonic())
        stall = {"checkpoint/stall_seconds": time.monotonic() - start}
        self.logger.write(self.step, self.learner.updates, stall)
        return saved

    def _find_checkpoint(self) -> Checkpoint | None:
        found = checkpoint.find_all(self.logdir / "checkpoints")
        if not found and self.config.resume:
            raise CheckpointError(f"--resume: no checkpoint in {self.logdir / 'checkpoints'}")
        if found:
            self._check_same_run()
        return found[-1] if found else None

    def _check_same_run(self) -> None:
        """The log directory's run must have the same task and networks as this one."""
        path = self.logdir / "config.json"
        saved = json.loads(path.read_text()) if path.exists() else {}
        ours = to_json(self.config)
        for name in ("recipe", "task", "num_envs", "model", "env"):
            if name in saved and saved[name] != ours[name]:
                raise CheckpointError(
                    f"{self.logdir} holds another run: its {name} is {saved[name]}, not "
                    f"{ours[name]}; give a new --logdir or the same options"
                )

    def _restore(self, saved: Checkpoint) -> Mapping[str, Any]:
        state = saved.load(self.device)
        self.agent.load_state_dict(state["agent"])
        self.learner.load_state_dict(state["learner"])
        self.generator.set_state(state["act_generator"].cpu())
        self.action_space.np_random.bit_generator.state = state["action_space"]
        self.replay.load(self.logdir / "replay", saved.info["replay"])
        self.prefetcher.load_state_dict(state["prefetcher"])
        self.step = saved.info["step"]
        return saved.info

    def _write_config(self) -> None:
        try:
            self.logdir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(to_json(self.config), indent=2)
            (self.logdir / "config.json").write_text(text + "\n")
        except OSError as error:
            raise UsageError(f"--logdir {self.logdir}: {error.strerror}") from None

    def _evaluate(self) -> dict[str, Any]:
        """Scores of the trained agent and of random actions, written to evaluation.json."""
        config, count = self.config, self.config.eval_episodes
        task, seed = self.factory or config.task, config.seed + 1_000_000

        def scores(policy: Callable[..., Any]) -> list[float]:
            envs = make_envs(task, config.num_envs, seed, config.env)
            try:
                return run_episodes(envs, policy(envs), count)
            finally:
                envs.close()

        agent = scores(lambda envs: agent_policy(self.agent, envs.num_envs, seed))
        random = scores(lambda envs: random_policy(envs, seed))
        result = {"step": self.step, "scores": agent, "mean": float(np.mean(agent))}
        result |= {"random_scores": random, "random_mean": float(np.mean(random))}
        (self.logdir / "evaluation.json").write_text(json.dumps(result) + "\n")
        print(
            f"evaluation over {count} episodes: mean {result['mean']:.4g}, "
            f"standard deviation {np.std(agent):.3g}; random actions: {result['random_mean']:.4g}"
        )
        return result


def check(config: Config) -> None:
    """Refuse values that cannot work, naming the option and what is valid.

    Raises:
        UsageError: in one line.
    """
    learner = config.learner
    positive = {
        "--steps": config.steps,
        "--num-envs": config.num_envs,
        "--capacity": config.capacity,
        "--learner.batch-size": learner.batch_size,
        "--learner.batch-length": learner.batch_length,
        "--learner.horizon": learner.horizon,
        "--log.every": config.log.every,
        **{
            f"--model.{k.replace('_', '-')}": v
            for k, v in vars(config.model).items()
            if k != "unimix"
        },
    }
    for option, value in positive.items():
        if value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}")
    if learner.replay_ratio < 0:
        raise UsageError(f"--learner.replay-ratio must not be negative, got {learner.replay_ratio}")
    if config.model.bins % 2 == 0:
        raise UsageError(f"--model.bins must be odd, got {config.model.bins}")
    try:
        config.save_interval  # noqa: B018
    except ValueError:
        raise UsageError(
            f"--checkpoint-every {config.checkpoint_every}: give steps (5000) or minutes (30m)"
        ) from None
    window = learner.batch_length * config.num_envs
    if learner.replay_ratio and learner.prefill < window:
        raise UsageError(
            f"--learner.prefill must be at least batch length x environments = {window}, "
            f"got {learner.prefill}"
        )


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def default_logdir(config: Config) -> Path:
    """runs/<preset>-<task>-<size>-seed<seed>."""
    task = config.task.replace(":", "-").replace("/", "-")
    return Path("runs") / f"{config.preset}-{task}-{config.size}-seed{config.seed}"


def _device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch sees no GPU; use --device cpu or auto")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
