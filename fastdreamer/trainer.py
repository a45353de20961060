"""The training loop: act, store, learn, log, save.

Order (fixed; threads change time, never results): step t acts with the weights after all updates
due by step t - 1, its row is stored, the batches of the updates now due are drawn, and those run
while the environments step.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fastdreamer import checkpoint, replay
from fastdreamer.agent import Agent, Carry
from fastdreamer.checkpoint import Checkpoint, CheckpointError
from fastdreamer.config import Config
from fastdreamer.dream import replay_frames
from fastdreamer.envs import make_envs
from fastdreamer.envs.check import preflight
from fastdreamer.errors import UsageError
from fastdreamer.evaluation import Rows, agent_policy, play, random_policy, summarise
from fastdreamer.host import keep_freed_memory
from fastdreamer.learner import Learner
from fastdreamer.loading import check_same_run, choose_device, make_agent, to_json
from fastdreamer.logger import Logger, sync_wandb
from fastdreamer.plan import check, default_logdir, describe, is_atari, total_updates, window
from fastdreamer.recipe import RECIPES
from fastdreamer.replay import Column, Replay
from fastdreamer.rssm import State
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
        self.config, self.factory, self.recipe = config, factory, RECIPES[config.recipe]
        self.device = choose_device(config.device)
        keep_freed_memory()
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        seeds = np.random.SeedSequence(config.seed).generate_state(5)
        init, learner, act, replay_seed, env = (int(s) % 2**31 for s in seeds)
        # Environments live in one thread of their own, beside which updates run.
        self.worker = ThreadPoolExecutor(1, "fastdreamer-env")
        if not config.resume:
            for note in self._in_worker(lambda: preflight(factory or config.task, config.env)):
                print(f"note: {note}")
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
            window=window(config),
            online=self.recipe.joint,
        )
        self.prefetcher = Prefetcher(
            self.replay, config.learner.batch_size, window(config), self.device
        )
        self.logdir = config.logdir or default_logdir(config)
        saved = self._find_checkpoint()
        info = self._restore(saved) if saved else {}
        self._write_config()
        if config.log.wandb:
            sync_wandb(config.log.wandb, self.logdir, to_json(config), config.log.tensorboard)
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
            print(describe(self), flush=True)
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
            action, stored = self._act(rows)
            self.replay.add(rows | stored)
            self.step += self.config.num_envs
            due = self.due()
            if due:
                self.prefetcher.request()
            stepped = self.worker.submit(self.envs.step, action)
            self._learn(due)
            rows = self._end(stepped.result())
            self.logger.advance(self.config.num_envs)
            self._track(rows)
            self._film()
            if self._save_due():
                self.save()
        self.save()
        if self._stop is not None:
            self.logger.close()
            print(f"stopped at step {self.step:,}; the same command continues from there")
            raise SystemExit(128 + self._stop)

    def _end(self, rows: Rows) -> Rows:
        """The official code counts an Atari time-out as terminal."""
        if self.recipe.joint and is_atari(self.config.task):
            rows["is_terminal"] = rows["is_last"].copy()
        return rows

    def _act(self, rows: Rows) -> tuple[Any, Rows]:
        """Environment actions, and what the replay stores of this step besides its row."""
        count = self.config.num_envs
        if self.step < self.config.learner.prefill and not self.recipe.joint:
            action = self.action_space.sample()
            return action, {"action": self.agent.spec.encode(action)}
        obs = {k: torch.from_numpy(rows[k]).to(self.device) for k in self.agent.obs_space}
        first = torch.from_numpy(rows["is_first"]).to(self.device)
        if self.carry is None:  # the policy takes over in the middle of episodes
            self.carry = self.agent.initial_carry(count)
            first = torch.ones_like(first)
        noise = self.agent.act_noise(count, self.generator)
        self.carry = self.agent.act(obs, first, self.carry, noise)
        stored = {"action": self.carry.action.cpu().numpy()}
        if self.recipe.joint:
            state = self.carry.state
            stored["deter"] = state.deter.cpu().numpy()
            stored["stoch"] = state.stoch.argmax(-1).to(torch.uint8).cpu().numpy()
        return self.agent.spec.decode(stored["action"]), stored

    def due(self) -> int:
        """Updates that the train ratio owes at the current step."""
        return max(0, total_updates(self.config, self.step) - self.learner.updates)

    def _learn(self, due: int) -> None:
        for left in reversed(range(due)):
            batch = self.prefetcher.get()
            if left and not self.recipe.joint:
                self.prefetcher.request()
            metrics, states = self.learner.update(self.unpack(batch))
            if self.recipe.joint:
                self._write_back(batch["step_id"][:, 1:], states)
                if left:  # the next batch sees the latents of this one
                    self.prefetcher.request()
            for name, value in metrics.items():
                self._metrics[name] = self._metrics.get(name, 0) + value
            if self.learner.updates % self.config.log.every == 0:
                self._log()

    def unpack(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch as the learner takes it: stored classes of the latents become one-hot."""
        batch = dict(batch)
        if self.recipe.joint:
            stoch = F.one_hot(batch["stoch"].long(), self.config.model.classes)
            batch["stoch"] = stoch.to(self.agent.dtype)
        return batch

    def _write_back(self, step_ids: Tensor, states: State) -> None:
        self.replay.write("deter", step_ids, states.deter.detach().cpu())
        stoch = states.stoch.detach().argmax(-1).to(torch.uint8)
        self.replay.write("stoch", step_ids, stoch.cpu())

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

    def _film(self) -> None:
        """Now and then show in TensorBoard what the agent imagines of replayed sequences."""
        every, log = self.config.log.video_every, self.config.log
        crossed = every and self.step // every > (self.step - self.config.num_envs) // every
        if not (crossed and log.tensorboard and self.learner.updates):
            return
        if not self.agent.world_model.decoder.images:
            return
        rng = np.random.default_rng(self.step)
        length, names = self.config.learner.batch_length, self.envs.action_names
        frames = replay_frames(self.agent, self.replay, rng, length, action_names=names)
        if frames is not None:
            self.logger.video(self.step, "dream", frames)

    # What the run is made of

    def _build(self, init_seed: int, learner_seed: int) -> tuple[Agent, Learner]:
        torch.manual_seed(init_seed)
        agent = make_agent(self.config, self.envs, self.device)
        return agent, Learner.make(agent, self.config.learner, learner_seed)

    def _columns(self) -> dict[str, Column]:
        columns = {
            k: Column(space.shape, _torch_dtype(space.dtype))
            for k, space in self.envs.obs_space.spaces.items()
        }
        columns["action"] = Column((self.agent.spec.size,), torch.float32)
        columns["reward"] = Column((), torch.float32)
        if self.recipe.joint:
            model = self.config.model
            columns["deter"] = Column((model.deter,), torch.float32, mutable=True)
            columns["stoch"] = Column((model.stoch,), torch.uint8, mutable=True)
        return columns | {k: Column((), torch.bool) for k in FLAGS}

    def _capacity(self) -> int:
        needed = -(-self.config.steps // self.config.num_envs) * self.config.num_envs
        return min(self.config.capacity, needed)

    def _in_worker(self, task: Callable[[], Any]) -> Any:
        return self.worker.submit(task).result()

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
            check_same_run(self.logdir, self.config)
        return found[-1] if found else None

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
        make = partial(make_envs, task, config.num_envs, seed, config.env)
        agent = summarise(play(make, lambda e: agent_policy(self.agent, e.num_envs, seed), count))
        chance = summarise(play(make, lambda e: random_policy(e, seed), count))
        result = {"step": self.step, "agent": vars(agent), "random": vars(chance)}
        (self.logdir / "evaluation.json").write_text(json.dumps(result) + "\n")
        print(
            f"evaluation over {count} episodes: mean {agent.mean:.4g}; "
            f"random actions: {chance.mean:.4g}"
        )
        return result


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
