"""ViZDoom as envpool offers it: the options, the goal's reward, and a safe place to run in.

Facts of envpool 1.2.5, measured:
- Images come as (C, H, W) at the size asked for, shrunk from 320 x 240 by area averaging; C is 1
  where the scenario's configuration asks for grey (D1 to D4, SimplerBasic), else 3.
- An action is a combination of buttons, numbered. MyWayHome has 18: turn left, right or not, by
  forward or not, by step left, right or not. The first is to do nothing.
- Rewards are envpool's own: weighted changes of game variables (health, ammunition, kills ...).
  The scenario's rewards are dropped, so that of 125 ways to MyWayHome's goal 93 were worth 0 and
  the others 0.5. Here it gets its scenario's: 1 at the goal and -0.0001 a tic.
- Episodes end in a termination at the goal or at death, in a truncation after 525 steps of 4 tics.
- Each game writes to ./_vizdoom and ./_vizdoom.ini, and the whole process dies where that folder
  cannot be made, as when two games start at once. `Workplace` prevents it.
- Cig and MultiDuel wait for a network game and crash.

HealthGathering is what the preset `vizdoom` trains: a room whose floor is acid, and medkits; 6
actions, turn left, right or not, by forward or not. Its reward is envpool's, 0.005 a point of
health gained and -0.003 a point lost. Random actions score -0.21 in 125 steps; whoever always finds
the next medkit lives to the end of the time. D2Navigation is the same in a maze with poison among
the medkits, in grey; random actions score -0.24.

MyWayHome is a maze of rooms with a random start and one goal, found by chance or not at all.
Uniformly random actions reached it in 125 of 695 episodes (18 %) of 469 steps in the mean, a mean
score of -0.008; nothing done scores -0.21, the best possible is near 1. One thread of a server's
CPU makes 1,100 steps a second.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from fastdreamer.envs.base import EnvOptions, TaskError

EPISODE_TICS = 2100
"""Tics (35 a second) after which an episode is truncated, as in the scenarios that name one."""
_HOME = "MyWayHome-v1"
_GOAL, _LIVING = 1.0, -0.0001
_REFUSED = {
    "Cig-v1": "it is a network game",
    "MultiDuel-v1": "it is a network game",
    "VizdoomCustom-v1": "it has no scenario of its own",
}
_LOCK = threading.Lock()


def doom_config(task_id: str, options: EnvOptions) -> dict[str, Any]:
    """Options of `envpool.make` for a ViZDoom task.

    Raises:
      TaskError: a task that cannot be played alone.
    """
    if task_id in _REFUSED:
        raise TaskError(f"envpool task '{task_id}' is not supported: {_REFUSED[task_id]}")
    tics = min(EPISODE_TICS, options.max_episode_frames)
    return {
        "img_height": options.image_size,
        "img_width": options.image_size,
        "stack_num": 1,
        "frame_skip": options.action_repeat,
        "max_episode_steps": tics // options.action_repeat,
        "use_combined_action": True,
    }


def doom_terminal(
    task_id: str, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, np.ndarray]
) -> np.ndarray:
    """Which of N episodes ended other than by time, also where both came in the same step.

    MyWayHome's goal is an armour: whoever has it at the end of the time was there.
    """
    if task_id != _HOME:
        return terminated
    return terminated | (truncated & (info["ARMOR"] > 0))


def doom_reward(
    task_id: str, reward: np.ndarray, terminal: np.ndarray, action_repeat: int
) -> np.ndarray:
    """envpool's reward, but its scenario's for MyWayHome.

    Args:
      reward: (N,) from envpool.
      terminal: (N,) bool; in MyWayHome only the goal is.
      action_repeat: tics a step.
    """
    if task_id != _HOME:
        return reward
    return _GOAL * terminal + _LIVING * action_repeat


class Workplace:
    """A temporary folder to start games in: a context manager that stands in it meanwhile."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fastdreamer-doom-"))
        (self._folder / "_vizdoom").mkdir()

    def __enter__(self) -> None:
        _LOCK.acquire()
        self._before = os.getcwd()
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)
        _LOCK.release()

    def remove(self) -> None:
        """Removes the folder; the games must have ended, for they write to it as they do."""
        shutil.rmtree(self._folder, ignore_errors=True)
