"""The training loop: act, store, learn, log, save.

Order (fixed; threads change time, never results): step t acts with the weights after all updates
due by step t - 1, its row is stored, the batches of the updates now due are drawn, and those run
while the environments step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fastdreamer import checkpoint, replay
from fastdreamer.agent import Agent
from fastdreamer.checkpoint import Checkpoint, CheckpointError
from fastdreamer.config import Config
from fastdreamer.dream import replay_frames
from fastdreamer.envs import StateError, VectorEnv, make_envs
from fastdreamer.envs.check import preflight
from fastdreamer.episodes import Episodes, Rows
from fastdreamer.errors import UserError
from fastdreamer.evaluation import compare_with_random
from fastdreamer.execution import Act, Execution, Update
from fastdreamer.host import first_signal, locked, set_up_process
from fastdreamer.learner import Learner
from fastdreamer.loading import (
    check_same_run,
    check_weights,
    choose_device,
    make_agent,
    to_json,
    write_config,
)
from fastdreamer.logger import Logger
from fastdreamer.plan import capacity, check, default_logdir, describe, total_updates, window
from fastdreamer.recipe import RECIPES
from fastdreamer.replay import Replay
from fastdreamer.staging import Prefetcher, WriteBack
from fastdreamer.stored import columns, latents
from fastdreamer.video import writing


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
        choices = (config.precision, config.compile, config.graph)
        self.execution = Execution.choose(*choices, self.device)
        set_up_process(config.threads, config.deterministic)
        self.logdir = config.logdir or default_logdir(config)
        with ExitStack() as stack:
            stack.enter_context(locked(self.logdir))
            saved = self._find_checkpoint()
            self.step = saved.info["step"] if saved else 0
            self._make(stack, saved)
            self._resources = stack.pop_all()

    def _make(self, stack: ExitStack, saved: Checkpoint | None) -> None:
        """Everything that the run consists of; what must be closed goes on the stack."""
        config = self.config
        seeds = np.random.SeedSequence(config.seed).generate_state(4)
        init, learner, act, replay_seed = (int(s) % 2**31 for s in seeds)
        # Environments live in one thread of their own, beside which updates run.
        self.worker = stack.enter_context(ThreadPoolExecutor(1, "fastdreamer-env"))
        self.envs = self._make_envs(first=saved is None)
        stack.callback(self._in_worker, self.envs.close)
        self.action_space = batch_space(self.envs.act_space, config.num_envs)
        self.action_space.seed(act)
        torch.manual_seed(init)
        self.agent = make_agent(config, self.envs, self.device)
        self.learner = Learner.make(self.agent, config.learner, learner)
        self.generator = torch.Generator(self.device).manual_seed(act)
        self.update = Update(self.learner, self.execution)
        self.act = Act(self.agent, self.generator, self.execution.graph)
        self.resumed_precision = self.execution.precision
        """What the updates before a checkpoint ran in."""
        self.episodes = Episodes.none(config.num_envs)
        self.scores: list[float] = []
        self.replay = Replay(
            columns(self.agent),
            capacity(config),
            config.num_envs,
            replay_seed,
            pin_memory=self.device.type == "cuda",
            window=window(config),
            online=self.recipe.joint,
        )
        self.prefetcher = stack.enter_context(
            Prefetcher(self.replay, config.learner.batch_size, window(config), self.device)
        )
        self.write_back = WriteBack(self.replay)
        self._metrics: dict[str, Tensor] = {}
        self._stall: dict[str, float] = {}
        self._since_log = (0, self.step, time.monotonic())
        info = self._restore(saved) if saved else {}
        self.logger = stack.enter_context(
            Logger(
                self.logdir,
                config.steps,
                self.step,
                info.get("elapsed", 0.0),
                info.get("metrics_bytes", None if saved else 0),
                config.log,
                to_json(config),
            )
        )
        write_config(self.logdir, config)
        self._timed_from = self.learner.updates
        self._last_save = (self.step if saved else -1, time.monotonic())
        self._stop: int | None = None

    def _make_envs(self, first: bool) -> VectorEnv:
        """The run's environments; resumed ones do not repeat the first episodes."""
        config, task = self.config, self.factory or self.config.task
        seed = int(np.random.SeedSequence([config.seed, self.step]).generate_state(1)[0]) % 2**31
        if first:
            for note in self._in_worker(partial(preflight, task, config.env)):
                print(f"note: {note}")
        return self._in_worker(partial(make_envs, task, config.num_envs, seed, config.env))

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free threads, environments, files and the lock on the run directory."""
        self._resources.close()

    def run(self) -> Result:
        """Train to the configured step, save, evaluate. SIGINT and SIGTERM save and exit."""
        if self.step < self.config.steps:
            with first_signal(self._on_signal):
                print(describe(self), flush=True)
                self._since_log = (*self._since_log[:2], time.monotonic())
                self._loop()
        else:
            print(f"{self.logdir} is complete at step {self.step:,}: raise --steps to go on")
        evaluation = self._evaluate() if self.config.eval_episodes else None
        return Result(self.logdir, self.agent, self.scores, evaluation)

    def _loop(self) -> None:
        if self.episodes.rows is None:
            self.episodes.rows = self._in_worker(self.envs.reset)
        self._learn(self.due())  # what a signal cut off
        while self.step < self.config.steps and self._stop is None:
            action, stored = self._act(self.episodes.rows)
            self.replay.add(self.episodes.rows | stored)
            self.step += self.config.num_envs
            stepped = self.worker.submit(self.envs.step, action)
            self._learn(self.due())
            try:
                rows = self._end(stepped.result())
            except Exception:
                self.episodes.rows = None
                try:
                    self.save()  # what the environment broke is not the run
                except UserError as error:
                    print(f"note: {error}", flush=True)
                raise
            self.logger.advance(self.config.num_envs)
            self._track(rows)
            self._film()
            if self._save_due():
                self.save()
        if self._last_save[0] != self.step:
            self.save()
        if self._stop is not None:
            self.logger.close()
            print(f"stopped at step {self.step:,}; the same command continues from there")
            raise SystemExit(128 + self._stop)

    def _end(self, rows: Rows) -> Rows:
        """The official code counts an Atari time-out as terminal."""
        if self.recipe.joint and self.envs.is_atari:
            rows["is_terminal"] = rows["is_last"].copy()
        return rows

    def _act(self, rows: Rows) -> tuple[Any, Rows]:
        """Environment actions, and what the replay stores of this step besides its row."""
        if self.step < self.config.learner.prefill and not self.recipe.joint:
            action = self.action_space.sample()
            return action, {"action": self.agent.spec.encode(action)}
        obs = {k: torch.from_numpy(rows[k]).to(self.device) for k in self.agent.obs_space}
        first = torch.from_numpy(rows["is_first"]).to(self.device)
        self.episodes.carry = carry = self.act(obs, first, self.episodes.carry)
        stored = {"action": carry.action.cpu().numpy()}
        if self.recipe.joint:
            stored |= {k: v.cpu().numpy() for k, v in latents(carry.state).items()}
        return self.agent.spec.decode(stored["action"]), stored

    def due(self) -> int:
        """Updates that the train ratio owes at the current step."""
        return max(0, total_updates(self.config, self.step) - self.learner.updates)

    def _learn(self, due: int) -> None:
        """Run the updates that are due.

        In recipe 2023 the next batch is drawn before each update, so that it is assembled and
        copied meanwhile. In 2025 it is drawn when it is due, and holds the latents that the update
        before rewrites: of several updates in a row, the next batch is assembled while one runs,
        and what that one rewrites is amended.
        """
        joint = self.recipe.joint
        for left in reversed(range(due)):
            drawn = self.prefetcher.pending
            if self._stop is not None and not (joint and drawn):  # it may have to be amended
                break
            if not drawn:
                self.write_back.finish()
                self.prefetcher.request()
            batch = self.prefetcher.get()
            if joint:
                self.write_back.amend(batch)
            steps = batch.pop("step_id")
            if not joint:
                self.prefetcher.request()
            metrics, rewritten = self.update(batch)
            if joint:
                self.write_back.start(steps[:, 1:], rewritten)
                if left and self._stop is None:
                    self.write_back.finish(keep=1)
                    self.prefetcher.request()
            self._add_up(metrics)
            if self.learner.updates % self.config.log.every == 0:
                self._log()

    def _add_up(self, metrics: Mapping[str, Tensor]) -> None:
        if not self._metrics:  # a graph's results are overwritten by the next update
            self._metrics = {k: v.clone() for k, v in metrics.items()}
            return
        torch._foreach_add_(list(self._metrics.values()), [metrics[k] for k in self._metrics])

    def _log(self) -> None:
        """Means of the losses since the last line, with one transfer from the device."""
        updates, step, at = self._since_log
        count, now = self.learner.updates - updates, time.monotonic()
        metrics = {k: v / count for k, v in self._sums().items()} | self._stall
        metrics["updates_per_second"] = (self.learner.updates - self._timed_from) / (now - at)
        metrics["env_steps_per_second"] = (self.step - step) / (now - at)
        self.logger.write(self.step, self.learner.updates, metrics)
        self._metrics, self._stall = {}, {}
        self._since_log = (self.learner.updates, self.step, now)
        self._timed_from = self.learner.updates

    def _sums(self) -> dict[str, float]:
        """Sums of the metrics since the last line, with one transfer from the device.

        Raises:
            UserError: one is not finite; the checkpoints on disk are from before.
        """
        if not self._metrics:
            return {}
        sums = torch.stack([v.float() for v in self._metrics.values()]).tolist()
        for name, value in zip(self._metrics, sums, strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"{name} is {value} at update {self.learner.updates:,}: the run diverged; "
                    f"the checkpoints in {self.logdir} are from before"
                )
        return dict(zip(self._metrics, sums, strict=True))

    def _track(self, rows: Rows) -> None:
        for i, score, length in self.episodes.track(rows):
            self.scores.append(score)
            self.logger.episode(self.step, self.learner.updates, score, length, self.envs.logged[i])

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

    def _in_worker(self, task: Callable[[], Any]) -> Any:
        return self.worker.submit(task).result()

    # Saving and resuming

    def _on_signal(self, number: int) -> None:
        self._stop = number

    def _save_due(self) -> bool:
        amount, minutes = self.config.save_interval
        step, at = self._last_save
        if minutes:
            return time.monotonic() - at >= 60 * amount
        return self.step - step >= amount

    def save(self) -> None:
        """Write a checkpoint of the whole run; the next line of losses says how long it took.

        Raises:
            UserError: the run diverged, or the disk refused; older checkpoints stay as they are.
        """
        start = time.monotonic()
        self._sums()
        self.write_back.finish()
        state = {
            "agent": self.agent.state_dict(),
            "learner": self.learner.state_dict(),
            "device": self.device.type,
            "precision": self.execution.precision,
            "act_generator": self.generator.get_state(),
            "action_space": self.action_space.np_random.bit_generator.state,
            "prefetcher": self.prefetcher.state_dict(),
            "metrics": dict(self._metrics),
            "logged": self._since_log[0],
            "episodes": self._in_worker(partial(self.episodes.state_dict, self.envs)),
        }
        folder = self.logdir / "checkpoints"
        try:
            info = {
                "updates": self.learner.updates,
                "elapsed": self.logger.elapsed,
                "metrics_bytes": self.logger.sync(),
                "replay": self.replay.save(self.logdir / "replay"),
            }
            checkpoint.save(folder, self.step, state, info)
        except OSError as error:
            raise CheckpointError(
                f"cannot save to {self.logdir}: {error.strerror}; with room there, the same"
                " command goes on from the checkpoint before"
            ) from error
        finally:
            kept = [c.info["replay"] for c in checkpoint.find_all(folder)]
            replay.prune(self.logdir / "replay", kept)
        self._last_save = (self.step, time.monotonic())
        self._stall = {"checkpoint/stall_seconds": time.monotonic() - start}

    def _find_checkpoint(self) -> Checkpoint | None:
        found = checkpoint.find_all(self.logdir / "checkpoints")
        if not found and self.config.resume:
            raise CheckpointError(f"--resume: no checkpoint in {self.logdir / 'checkpoints'}")
        if found:
            check_same_run(self.logdir, self.config)
        return found[-1] if found else None

    def _restore(self, saved: Checkpoint) -> Mapping[str, Any]:
        state = saved.load(self.device)
        check_weights(saved.path, self.agent.state_dict(), state["agent"])
        if state["device"] != self.device.type:
            raise CheckpointError(
                f"{saved.path} is of a run on {state['device']}, not {self.device.type}, and its "
                f"random numbers go on only there: give --device {state['device']}"
            )
        self.resumed_precision = state.get("precision", "fp32")
        self.agent.load_state_dict(state["agent"])
        self.learner.load_state_dict(state["learner"])
        self.generator.set_state(state["act_generator"].cpu())
        self.action_space.np_random.bit_generator.state = state["action_space"]
        self.replay.load(self.logdir / "replay", saved.info["replay"])
        self.prefetcher.load_state_dict(state["prefetcher"])
        # The next line of losses also covers the updates between the last one and the checkpoint.
        self._metrics = state["metrics"]
        self._since_log = (state["logged"], self.step, time.monotonic())
        episodes = state.get("episodes", {"reason": "the checkpoint is of an older version"})
        try:
            self._in_worker(partial(self.episodes.load_state_dict, episodes, self.envs))
        except StateError as error:
            print(f"note: environment state is not restored: {error}; new episodes begin")
        return saved.info

    def _evaluate(self) -> dict[str, Any]:
        """Scores of the trained agent and of random actions, written to evaluation.json."""
        config, seed = self.config, self.config.seed + 1_000_000
        make = partial(make_envs, self.factory or config.task, config.num_envs, seed, config.env)
        graph = self.execution.graph
        found = compare_with_random(self.agent, make, config.eval_episodes, seed, graph)
        result = {"step": self.step, **{k: vars(v) for k, v in found.items()}}
        with writing(self.logdir / "evaluation.json") as path:
            checkpoint.write_json(path, result)
        print(
            f"evaluation over {config.eval_episodes} episodes: mean {found['agent'].mean:.4g}; "
            f"random actions: {found['random'].mean:.4g}"
        )
        return result
