"""Environments of the envpool package: Atari by the published protocol, and any other of its ids.

Facts of envpool 1.2.5 that this file relies on, each checked by a test:
- auto-reset happens on the step after the end and discards that action; its reward is 0;
- asked for 210 x 160 RGB, Atari frames (the maximum of the last two of a skip) and rewards equal
  ale-py's to the byte; only where a game ends before the last frame of a skip does the terminal
  row show an older frame;
- a reset plays 1 to noop_max no-op frames, which do not count towards the episode's length;
- environment i is seeded once, with seed + i, and rows come back in the order of environments.
Those of DeepMind Control are in `control`, of ViZDoom in `doom`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np

from fastdreamer.envs.base import (
    EnvOptions,
    StateError,
    TaskError,
    check_action,
    fold,
    from_zero,
    nearest,
)
from fastdreamer.envs.control import dmc_tasks, step_repeatedly
from fastdreamer.envs.doom import Workplace, doom_config, doom_reward, doom_terminal
from fastdreamer.envs.observe import Observer


class PoolEnv:
    """N environments of one envpool task; a `VectorEnv`.

    Args:
      task_id: an envpool id such as `MsPacman-v5` or `Catch-v0`; Atari gets the Atari protocol.
      num_envs: number of environments, N.
      seed: environment i is seeded with seed + i, once.
      options: see `EnvOptions`.

    Raises:
      TaskError: unknown id, missing package or asset, or a space that is not supported.
    """

    def __init__(self, task_id: str, num_envs: int, seed: int, options: EnvOptions) -> None:
        envpool = import_envpool(task_id)
        if task_id not in envpool.list_all_envs():
            hint = ", ".join(nearest(task_id, envpool.list_all_envs()))
            raise TaskError(f"envpool has no task '{task_id}'; nearest: {hint or 'none'}")
        self._task = task_id
        atari, self._doom = task_id in atari_games().values(), task_id in doom_tasks()
        self._control = task_id in dmc_tasks().values()
        emulated = options.action_repeat if atari or self._doom else 1
        self.frames = options.dmc_repeat if self._control else emulated
        config = {"num_envs": num_envs, "seed": seed, **_config(task_id, options)}
        self._place = Workplace() if self._doom else None
        try:
            with warnings.catch_warnings(), self._place or contextlib.nullcontext():
                # float64 bounds of a float32 space: harmless
                warnings.filterwarnings("ignore", ".*precision lowered by casting")
                self._pool = envpool.make(task_id, env_type="gymnasium", **config)
                self._space = self._pool.single_action_space
                obs_space = self._pool.single_observation_space
        except (ImportError, OSError, RuntimeError) as error:
            raise TaskError(f"envpool cannot make '{task_id}': {_one_line(error)}") from error
        if self._pool.config["max_num_players"] != 1:
            self._pool.close()
            raise TaskError(f"envpool task '{task_id}' has several players: not supported")
        self.num_envs, self.is_atari = num_envs, atari
        self.act_space = from_zero(self._space)
        self._observe = Observer(obs_space, options.image_size)
        self.obs_space = self._observe.space
        self._dtypes = {k: v.dtype for k, v in self._pool.spec.action_array_spec.items()}
        self.action_names = _atari_action_names(self._pool.config) if atari else None
        self._ended = np.zeros(num_envs, bool)
        self.logged: list[dict[str, float]] = [{}] * num_envs

    def reset(self) -> dict[str, np.ndarray]:
        obs, _ = self._pool.reset()
        zeros = np.zeros(self.num_envs, bool)
        self._ended = zeros
        return self._rows(obs, np.zeros(self.num_envs, np.float32), ~zeros, zeros, zeros)

    def step(self, action: Any) -> dict[str, np.ndarray]:
        action = check_action(action, self.act_space, self.num_envs)
        first = self._ended
        native = self._native(action)
        if self._control:
            result = step_repeatedly(self._pool, native, first, self.frames)
        else:
            result = self._pool.step(native)
        obs, reward, terminated, truncated, info = result
        self._ended = terminated | truncated
        terminal = terminated
        if "terminated" in info:  # a game may end on the very step of the time limit
            terminal = terminal | (truncated & info["terminated"].astype(bool))
        if self._doom:
            terminal = doom_terminal(self._task, terminated, truncated, info)
            reward = doom_reward(self._task, reward, terminal, self.frames)
        return self._rows(obs, np.where(first, 0.0, reward), first, self._ended, terminal)

    def get_state(self) -> bytes:
        raise StateError("envpool does not give that of its environments")

    def set_state(self, state: bytes) -> None:
        raise StateError("envpool cannot set that of its environments")

    def close(self) -> None:
        pool = self.__dict__.pop("_pool", None)
        if pool is not None:
            pool.close()
            del pool  # the games of ViZDoom end with it
        if self._place:
            self._place.remove()

    def _native(self, action: Any, prefix: str = "action") -> Any:
        if isinstance(action, dict):
            return {k: self._native(v, f"{prefix}.{k}") for k, v in action.items()}
        start = self._space.start if isinstance(self._space, gymnasium.spaces.Discrete) else 0
        dtype = self._dtypes.get(prefix, self._dtypes.get(f"players.{prefix}", action.dtype))
        return np.ascontiguousarray(action + start, dtype)

    def _rows(
        self,
        obs: Any,
        reward: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
        terminal: np.ndarray,
    ) -> dict[str, np.ndarray]:
        return {
            **self._observe(obs),
            "reward": reward.astype(np.float32),
            "is_first": first.copy(),
            "is_last": last.copy(),
            "is_terminal": terminal.copy(),
        }


def import_envpool(task: str) -> ModuleType:
    """The envpool module.

    Raises:
      TaskError: it or its assets are not installed; names the packages.
    """
    try:
        import envpool
    except (ImportError, OSError) as error:
        raise TaskError(
            f"task '{task}' needs the envpool package and its game files:"
            f" pip install envpool envpool-assets ({_one_line(error)})"
        ) from error
    return envpool


@functools.cache
def atari_games() -> dict[str, str]:
    """Every Atari game that envpool offers: snake-case name to envpool id."""
    import_envpool("atari")
    from envpool.registration import registry

    games = {
        spec[2]["task"]: task for task, spec in registry.specs.items() if spec[0] == "envpool.atari"
    }
    if not games:
        raise TaskError("envpool finds no Atari games: pip install envpool-assets")
    return games


@functools.cache
def doom_tasks() -> frozenset[str]:
    """Every ViZDoom id that envpool offers."""
    import_envpool("doom")
    from envpool.registration import registry

    return frozenset(task for task, spec in registry.specs.items() if spec[0] == "envpool.vizdoom")


def find_atari(name: str) -> str | None:
    """The envpool id of an Atari game by any spelling (ms_pacman, MsPacman, MsPacman-v5)."""
    games = {fold(snake): task for snake, task in atari_games().items()}
    return games.get(fold(re.sub(r"-v\d+$", "", name)))


def _config(task_id: str, options: EnvOptions) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if task_id in atari_games().values():
        config = _atari_config(options)
    elif task_id in doom_tasks():
        config = doom_config(task_id, options)
    return config | ({"num_threads": options.num_threads} if options.num_threads else {})


def _atari_config(options: EnvOptions) -> dict[str, Any]:
    return {
        "img_height": 210,
        "img_width": 160,
        "stack_num": 1,
        "gray_scale": False,
        "use_fire_reset": False,
        "reward_clip": False,
        "frame_skip": options.action_repeat,
        "repeat_action_probability": options.sticky,
        "noop_max": options.noop_max,
        "max_episode_steps": options.max_episode_frames // options.action_repeat,
        "full_action_space": options.full_action_space,
        "episodic_life": options.episodic_life,
    }


def _atari_action_names(config: dict[str, Any]) -> list[str] | None:
    """Action meanings, read from the game by ale-py where that is installed."""
    try:
        from ale_py import ALEInterface, LoggerMode
    except ImportError:
        return None
    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.loadROM(f"{config['base_path']}/atari/roms/{config['task']}.bin")
    full = config["full_action_space"]
    actions = ale.getLegalActionSet() if full else ale.getMinimalActionSet()
    return [action.name for action in actions]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
