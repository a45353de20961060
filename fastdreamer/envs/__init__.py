"""Environments: `make_envs` turns a task's name into N environments stepped together."""

from __future__ import annotations

import gymnasium

from fastdreamer.envs import control, crafter
from fastdreamer.envs.base import FORMS, EnvOptions, StateError, TaskError, VectorEnv, nearest
from fastdreamer.envs.control import dmc_tasks, find_dmc
from fastdreamer.envs.control_images import control_images_factory
from fastdreamer.envs.gym import Factory, GymEnv, factory_by_id
from fastdreamer.envs.minerl import minerl_factory
from fastdreamer.envs.own import factory_by_path, is_import_path, module_exists
from fastdreamer.envs.pool import PoolEnv, atari_games, find_atari, import_envpool

__all__ = ["EnvOptions", "StateError", "TaskError", "VectorEnv", "find_factory", "make_envs"]

PREFIXES = ("atari", "crafter", "dmc", "envpool", "gymnasium", "minerl")


def make_envs(
    task: str | Factory, num_envs: int, seed: int, options: EnvOptions | None = None
) -> VectorEnv:
    """Makes N environments of a task.

    Args:
      task: an Atari game by any spelling (`ms_pacman`, `MsPacman-v5`, `atari:ms_pacman`),
        DeepMind Control by dm_control's name (`dmc_reacher_easy`, `dmc:reacher_easy`),
        `crafter_reward`, `envpool:ID`, `gymnasium:ID`, `minerl:navigate`, `my.module:make_env` (a
        function or class that makes one `gymnasium.Env`, importable from the current directory),
        or such a function.
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
    factory = find_factory(task, options)
    if factory is not None:
        return GymEnv(factory, num_envs, seed, options)
    assert isinstance(task, str)
    prefix, colon, name = task.partition(":")
    if colon and prefix == "envpool":
        return PoolEnv(name, num_envs, seed, options)
    if control.PREFIX.match(task):
        import_envpool(task)
        found = find_dmc(task)
    else:
        found = find_atari(name if prefix == "atari" else task)
    if found is None:
        raise TaskError(_unknown(task))
    return PoolEnv(found, num_envs, seed, options)


def find_factory(task: str | Factory, options: EnvOptions) -> Factory | None:
    """What makes one `gymnasium.Env` of the task; None for a task of envpool.

    Raises:
      TaskError: as `make_envs`, for tasks that are not envpool's.
    """
    if callable(task):
        return task
    prefix, colon, name = task.partition(":")
    if prefix == "gymnasium" and name:
        return factory_by_id(name)
    if colon and prefix == "minerl":
        return minerl_factory(name)
    if prefix not in PREFIXES and is_import_path(task):
        if not module_exists(task) and nearest(prefix, PREFIXES, 1):
            raise TaskError(_unknown(task))  # a misspelt prefix, more likely than a module
        return factory_by_path(task)
    if crafter.PREFIX.match(task):
        return crafter.crafter_factory(task, options)
    if options.dmc_images and control.PREFIX.match(task):
        return control_images_factory(task, options)
    return None


def _unknown(task: str) -> str:
    prefix, colon, name = task.partition(":")
    valid = list(atari_games())
    if prefix != "atari":
        valid += [f"dmc_{name}" for name in dmc_tasks()]
        valid += [f"crafter_{name}" for name in crafter.TASKS]
        valid += [f"envpool:{name}" for name in import_envpool(task).list_all_envs()]
        valid += [f"gymnasium:{name}" for name in gymnasium.registry]
    near = nearest(task, valid)
    if colon and prefix not in PREFIXES:
        near += [f"{p}:{name}" for p in nearest(prefix, PREFIXES, 1) if f"{p}:{name}" not in near]
    hint = ", ".join(near) or "none"
    return f"unknown task '{task}'; nearest: {hint}; a task is {FORMS}"
