"""DeepMind Control as envpool offers it: names of its tasks, and the action repeat.

Facts of envpool 1.2.5, each checked by a test:
- Its ids are those of dm_control's suite run together: ReacherEasy-v1 is reacher_easy.
- Its own `frame_skip` gives the reward of a step's last frame alone. The published protocol is the
  sum over the frames of a step, so frames are stepped one by one here.
- An episode is 1000 frames and ends in a truncation.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from fastdreamer.envs.base import TaskError, fold, nearest

PREFIX = re.compile(r"dmc[_:]")
"""What a task's name begins with: dmc_reacher_easy, as in the official code, or dmc:..."""
_ALIASES = {"cup_catch": "ball_in_cup_catch"}
"""Names of the official code that are not the suite's."""


@functools.cache
def dmc_tasks() -> dict[str, str]:
    """Every task of DeepMind Control that envpool offers: dm_control's name to envpool id."""
    from envpool.registration import registry

    found = {}
    for task, (path, spec, config) in registry.specs.items():
        if path == "envpool.mujoco.dmc":
            domain = _snake(spec.removeprefix("Dmc").removesuffix("EnvSpec"))
            found[f"{domain}_{config['task_name']}"] = task
    return found


def find_dmc(task: str) -> str | None:
    """The envpool id of `dmc_NAME` or `dmc:NAME`, NAME by any spelling; None for other tasks.

    Raises:
      TaskError: it is such a task, but there is none of this name; names the nearest.
    """
    if not PREFIX.match(task):
        return None
    name = suite_name(task)
    tasks = {fold(known): found for known, found in dmc_tasks().items()}
    folded = fold(re.sub(r"-v\d+$", "", name))
    if folded not in tasks:
        near = ", ".join(f"dmc_{known}" for known in nearest(name, dmc_tasks())) or "none"
        raise TaskError(f"DeepMind Control has no task '{name}'; nearest: {near}")
    return tasks[folded]


def suite_name(task: str) -> str:
    """What dm_control calls `dmc_NAME` or `dmc:NAME`."""
    name = PREFIX.sub("", task, count=1)
    return _ALIASES.get(name, name)


def step_repeatedly(pool: Any, action: np.ndarray, resetting: np.ndarray, repeat: int) -> Any:
    """Steps an envpool of dict observations `repeat` times by the same action.

    An environment stops early where its episode ends, and resets by a single frame.

    Args:
      action: (N, A).
      resetting: bool (N,), whether its step is a reset.
      repeat: frames per step, at least 1.

    Returns:
      As `pool.step`: each environment's last observation, rewards summed over the frames.
    """
    obs, reward, terminated, truncated, info = pool.step(action)
    for _ in range(repeat - 1):
        going = np.flatnonzero(~(resetting | terminated | truncated))
        if not len(going):
            break
        later = pool.step(action[going], going.astype(np.int32))
        if len(going) == len(action):
            obs, (terminated, truncated, info) = later[0], later[2:]
            reward = reward + later[1]
            continue
        for kept, new in zip((terminated, truncated), later[2:4], strict=True):
            kept[going] = new
        for key, value in later[0].items():
            obs[key][going] = value
        reward[going] += later[1]
    return obs, reward, terminated, truncated, info


def _snake(name: str) -> str:
    """BallInCup -> ball_in_cup, HumanoidCMU -> humanoid_cmu."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
