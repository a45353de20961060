"""Crafter: survival in a small world of blocks, seen from above, with 22 achievements to unlock.

Crafter 1.8 speaks the API of old gym; `CrafterEnv` turns it into Gymnasium's. An episode ends in a
termination at death and in a truncation after 10,000 steps.
"""

from __future__ import annotations

import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fastdreamer.envs.base import EnvOptions, TaskError, nearest
from fastdreamer.envs.gym import LOGGED, Factory

PREFIX = re.compile(r"crafter[_:]")
"""What a task's name begins with: crafter_reward, as in the official code, or crafter:reward."""
TASKS = {"reward": True, "noreward": False}
"""Whether the achievements of a task are rewarded."""


class CrafterEnv(gymnasium.Env[Any, Any]):
    """Crafter with Gymnasium's API.

    Args:
      crafter: the module.
      size: height and width of the image in pixels.
      reward: 1 for each achievement's first time, and 0.1 for each point of health; else 0.

    The last step's info tells how often each achievement was reached in the episode.
    """

    def __init__(self, crafter: Any, size: int, reward: bool) -> None:
        self._make = lambda seed: crafter.Env(size=(size, size), reward=reward, seed=seed)
        self._env = self._make(0)
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Discrete(len(self._env.action_names))

    def get_action_meanings(self) -> list[str]:
        """Names of the actions in order."""
        return list(self._env.action_names)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:  # Crafter takes its seed where it is made
            self._env = self._make(seed)
        return self._env.reset(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        image, reward, done, info = self._env.step(int(action))
        dead = info["discount"] == 0
        counts = {f"achievement_{name}": count for name, count in info["achievements"].items()}
        logged = {LOGGED: counts} if done else {}
        return image, float(reward), dead, bool(done) and not dead, logged


def crafter_factory(task: str, options: EnvOptions) -> Factory:
    """A factory of `crafter_reward` or `crafter_noreward`.

    Raises:
      TaskError: unknown name, or Crafter is not installed.
    """
    name = PREFIX.sub("", task, count=1)
    if name not in TASKS:
        near = ", ".join(f"crafter_{known}" for known in nearest(name, TASKS)) or "none"
        raise TaskError(
            f"Crafter has no task '{name}'; nearest: {near}; there are crafter_reward and"
            " crafter_noreward"
        )
    try:
        import crafter
    except ImportError as error:
        raise TaskError(
            f"task '{task}' needs Crafter: pip install fastdreamer[crafter]"
            f" ({' '.join(str(error).split())})"
        ) from error
    return lambda: CrafterEnv(crafter, options.image_size, TASKS[name])
