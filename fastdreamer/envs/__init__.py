"""Environments: `make_envs` turns a task's name into N environments stepped together."""

from __future__ import annotations

import gymnasium

from fastdreamer.envs.base import EnvOptions, TaskError, VectorEnv, nearest
from fastdreamer.envs.gym import Factory, GymEnv, factory_by_id
from fastdreamer.envs.pool import PoolEnv, atari_games, find_atari, import_envpool

__all__ = ["EnvOptions", "TaskError", "VectorEnv", "make_envs"]

_FORMS = "an Atari game (ms_pacman, atari:ms_pacman), envpool:ID or gymnasium:ID"


def make_envs(
    task: str | Factory, num_envs: int, seed: int, options: EnvOptions | None = None
) -> VectorEnv:
    """Makes N environments of a task.

    Args:
      task: an Atari game by any spelling (`ms_pacman`, `MsPacman-v5`, `atari:ms_pacman`),
        `envpool:ID`, `gymnasium:ID`, or a function that makes one `gymnasium.Env`.
      num_envs: number of environments, N, at least 1.
      seed: environment i is seeded with seed + i, once.
      options: see `EnvOptions`; its defaults where None.

    Raises:
      TaskError: the task is unknown (the message names the nearest ones), needs a package that is
        not installed (the message names it), or has a space that is not supported.
    """
    if num_envs < 1:
        raise TaskError(f"the number of environments must be at least 1, got {num_envs}")
    options = options or EnvOptions()
    if callable(task):
        return GymEnv(task, num_envs, seed, options)
    prefix, colon, name = task.partition(":")
    if colon and prefix == "gymnasium":
        return GymEnv(factory_by_id(name), num_envs, seed, options)
    if colon and prefix == "envpool":
        return PoolEnv(name, num_envs, seed, options)
    found = find_atari(name if prefix == "atari" else task)
    if found is None:
        raise TaskError(_unknown(task))
    return PoolEnv(found, num_envs, seed, options)


def _unknown(task: str) -> str:
    valid = list(atari_games())
    if not task.startswith("atari:"):
        valid += [f"envpool:{name}" for name in import_envpool(task).list_all_envs()]
        valid += [f"gymnasium:{name}" for name in gymnasium.registry]
    hint = ", ".join(nearest(task, valid)) or "none"
    return f"unknown task '{task}'; nearest: {hint}; a task is {_FORMS}"
