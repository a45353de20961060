"""Tries an environment with random actions before anything is trained on it.

`report` is for people: spaces, what was seen, speed, and notes on what looks odd. `preflight` is
for the start of a run: it is short, and skips what is known (envpool) or slow to start (MineRL).
Both raise a TaskError that names the field where an environment breaks Gymnasium's API or its own
observation space.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from fastdreamer.envs import find_factory, make_envs
from fastdreamer.envs.base import EnvOptions, TaskError, VectorEnv
from fastdreamer.envs.gym import Factory, check_env
from fastdreamer.envs.observe import Observer, describe
from fastdreamer.envs.own import explain

_TOLERANCE = 1e-4
"""Share of a bounded entry's range by which it may be exceeded: rounding."""


@dataclasses.dataclass
class Range:
    """Smallest and largest value seen of an entry."""

    low: float = np.inf
    high: float = -np.inf

    def add(self, values: np.ndarray) -> None:
        if values.size:
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))

    def __str__(self) -> str:
        return f"{self.low:.4g} .. {self.high:.4g}"


@dataclasses.dataclass
class Findings:
    """What a number of random steps in one environment showed."""

    obs_space: spaces.Dict
    """After conversion: images uint8 (H, W, C), vectors float32 (D,)."""
    act_space: gymnasium.Space[Any]
    raw: dict[str, str] = dataclasses.field(default_factory=dict)
    """The environment's own spaces by the names of obs_space, in words; empty for envpool."""
    steps: int = 0
    seconds: float = 0.0
    """Time spent in `step`."""
    seen: dict[str, Range] = dataclasses.field(default_factory=dict)
    """By the names of obs_space, after conversion."""
    rewards: list[float] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    """Of the episodes that ended, in steps."""
    scores: list[float] = dataclasses.field(default_factory=list)
    """Their returns."""
    terminated: int = 0
    truncated: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    """What is allowed but looks odd, a sentence each."""


def examine(
    task: str | Factory,
    options: EnvOptions | None = None,
    steps: int = 300,
    seconds: float = 5.0,
    seed: int = 0,
) -> Findings:
    """Steps one new environment of the task with uniformly random actions.

    Args:
      task: as for `make_envs`.
      steps: at most this many, at least 1.
      seconds: stops after this time, but not within a step.

    Raises:
      TaskError: as `make_envs`; or the environment raised, broke Gymnasium's API, or returned an
        observation outside its space or a reward that is no finite number.
    """
    if steps < 1:
        raise TaskError(f"the number of steps must be at least 1, got {steps}")
    options = options or EnvOptions()
    factory = find_factory(task, options)
    odd: dict[str, None] = {}  # an ordered set
    made: list[Checked] = []

    def checked() -> gymnasium.Env[Any, Any]:
        assert factory is not None
        made.append(Checked(factory(), odd))
        return made[-1]

    env = make_envs(task if factory is None else checked, 1, seed, options)
    try:
        found = _play(env, steps, seconds, seed)
    finally:
        env.close()
    if made:
        found.raw = made[0].observer.given
    found.notes = [*odd, *_notes(found)]
    return found


def preflight(
    task: str | Factory, options: EnvOptions | None = None, steps: int = 100, seconds: float = 2.0
) -> list[str]:
    """Notes on an environment of one's own, from a few random steps on a copy of it.

    Returns:
      What looks odd, a sentence each; nothing for tasks of envpool and MineRL, which are not run.

    Raises:
      TaskError: as `examine`.
    """
    options = options or EnvOptions()
    if isinstance(task, str) and task.startswith("minerl:"):
        return []
    if find_factory(task, options) is None:
        return []
    found = examine(task, options, steps, seconds)
    return [note for note in found.notes if not note.startswith("no episode ended")]


def report(
    task: str | Factory, options: EnvOptions | None = None, steps: int = 300, seconds: float = 5.0
) -> str:
    """A page on an environment: spaces, ranges, rewards, episodes, speed and notes.

    Raises:
      TaskError: as `examine`.
    """
    found = examine(task, options, steps, seconds)
    name = task if isinstance(task, str) else getattr(task, "__name__", "environment")
    speed = found.steps / max(found.seconds, 1e-9)
    lines = [f"{name}: {found.steps} random steps, {speed:,.0f} a second in one environment", ""]
    width = max(map(len, found.obs_space.spaces))
    lines.append("observations")
    for key, space in found.obs_space.spaces.items():
        raw = f", from {found.raw[key]}" if key in found.raw else ""
        kind = "image" if space.dtype == np.uint8 else "vector"
        lines.append(f"  {key:{width}}  {kind} {space.shape}, seen {found.seen[key]}{raw}")
    lines += ["action", f"  {describe(found.act_space)}", "reward", f"  {_rewards(found.rewards)}"]
    lines += ["episodes", f"  {_episodes(found)}"]
    lines += ["notes", *(f"  {note}" for note in found.notes or ["nothing looks odd"])]
    return "\n".join(lines)


class Checked(gymnasium.Env[Any, Any]):
    """An environment whose every observation is compared with its space.

    Args:
      env: any Gymnasium environment.
      odd: gets a sentence for what is allowed but unusual.

    Raises:
      TaskError: from `reset` and `step`, where they raise or an observation leaves its space.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], odd: dict[str, None]) -> None:
        check_env(env)
        self._env, self._odd = env, odd
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.observer = Observer(self.observation_space, 64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = self._call("reset", lambda: self._env.reset(seed=seed))
        if isinstance(result, tuple) and result:
            self._check(result[0])
        return result

    def step(self, action: Any) -> Any:
        result = self._call("step", lambda: self._env.step(action))
        if isinstance(result, tuple) and result:
            self._check(result[0])
        return result

    def close(self) -> None:
        self._env.close()

    def _call(self, name: str, call: Any) -> Any:
        try:
            return call()
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(f"{name} raised {explain(error)}") from error

    def _check(self, obs: Any) -> None:
        if isinstance(self.observation_space, spaces.Dict) and isinstance(obs, dict):
            extra = sorted(set(map(str, obs)) - set(self.observation_space.spaces))
            if extra:
                self._odd[f"the observation's {extra} are not in its space and not used"] = None
        for name, space, value in self.observer.read(obs):
            if isinstance(space, spaces.Box):
                self._check_box(name, space, value)

    def _check_box(self, name: str, space: spaces.Box, value: np.ndarray) -> None:
        """Bounds and type; the rest was checked when it was read."""
        if not np.can_cast(value.dtype, space.dtype, "same_kind"):
            raise TaskError(f"'{name}' is {value.dtype}, but its space says {describe(space)}")
        if value.dtype != space.dtype:
            note = f"'{name}' is {value.dtype}, but its space says {space.dtype}: it is converted"
            self._odd[note] = None
        wide = np.asarray(space.high, np.float64) - space.low
        slack = _TOLERANCE * np.where(np.isfinite(wide), wide, 0)
        out = (value < space.low - slack) | (value > space.high + slack)
        if out.any():
            raise TaskError(
                f"'{name}' holds {value[out].flat[0]:g}, but its space says {describe(space)}"
            )


def _play(env: VectorEnv, steps: int, seconds: float, seed: int) -> Findings:
    actions = batch_space(env.act_space, 1)
    actions.seed(seed)
    found = Findings(env.obs_space, env.act_space, seen={k: Range() for k in env.obs_space.spaces})
    rows, length, score = env.reset(), 0, 0.0
    _see(found, rows)
    end = time.perf_counter() + seconds
    while found.steps < steps and time.perf_counter() < end:
        action, start = actions.sample(), time.perf_counter()
        rows = env.step(action)
        found.seconds += time.perf_counter() - start
        found.steps += 1
        _see(found, rows)
        if rows["is_first"][0]:
            length, score = 0, 0.0
            continue
        found.rewards.append(float(rows["reward"][0]))
        length, score = length + 1, score + found.rewards[-1]
        if rows["is_last"][0]:
            found.lengths.append(length)
            found.scores.append(score)
            found.terminated += bool(rows["is_terminal"][0])
            found.truncated += not rows["is_terminal"][0]
    return found


def _see(found: Findings, rows: dict[str, np.ndarray]) -> None:
    for key, seen in found.seen.items():
        seen.add(rows[key])


def _notes(found: Findings) -> list[str]:
    notes = []
    for key, seen in found.seen.items():
        if seen.low == seen.high:
            notes.append(f"'{key}' was {seen.low:g} everywhere, in every step")
    if found.rewards and min(found.rewards) == max(found.rewards):
        notes.append(f"every reward was {found.rewards[0]:g}")
    if not found.lengths:
        notes.append(f"no episode ended within {found.steps} steps")
    elif max(found.lengths) == 1:
        notes.append("every episode ended after a single step")
    return notes


def _rewards(rewards: list[float]) -> str:
    if not rewards:
        return "none seen"
    share = np.mean(np.array(rewards) != 0)
    return (
        f"{min(rewards):.4g} .. {max(rewards):.4g}, mean {np.mean(rewards):.4g},"
        f" not 0 in {share:.1%} of the steps"
    )


def _episodes(found: Findings) -> str:
    if not found.lengths:
        return f"none ended within {found.steps} steps"
    low, mean, high = min(found.lengths), np.mean(found.lengths), max(found.lengths)
    return (
        f"{len(found.lengths)} ended: {found.terminated} terminated, {found.truncated} truncated;"
        f" {low} to {high} steps, mean {mean:.1f}; mean score {np.mean(found.scores):.4g}"
    )
