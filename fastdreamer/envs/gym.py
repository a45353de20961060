"""Any Gymnasium environment, by id or by factory, N of them stepped in turn in this process.

Their state is their pickle, wrappers and random generators included. An environment that holds what
does not pickle can leave it out by `__getstate__` and make it anew in `__setstate__`; one that
inherits `EzPickle`'s, which remembers no more than the constructor's arguments, has no state.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle

from fastdreamer.envs.base import (
    EnvOptions,
    StateError,
    TaskError,
    check_action,
    from_zero,
    nearest,
)
from fastdreamer.envs.observe import Observer

Factory = Callable[[], gymnasium.Env[Any, Any]]
LOGGED = "fastdreamer/logged"
"""Key of an info's numbers by name, which are logged beside the score where an episode ends."""
FRAMES = "fastdreamer/frames"
"""Key of an environment's metadata: frames that one of its steps takes, 1 where it is absent."""


class GymEnv:
    """N environments made by one factory; a `VectorEnv`.

    Args:
      factory: makes one environment; called N times.
      num_envs: number of environments, N.
      seed: environment i gets seed + i at its first reset and no seed later.
      options: see `EnvOptions`; only image_size is used.

    Raises:
      TaskError: the factory makes no Gymnasium environment, or a space is not supported; later,
        what `reset` or `step` returned does not fit the API or the space, and what it was.
    """

    def __init__(self, factory: Factory, num_envs: int, seed: int, options: EnvOptions) -> None:
        self._envs = [factory() for _ in range(num_envs)]
        env = self._envs[0]
        check_env(env)
        self.num_envs, self.is_atari = num_envs, False
        self.frames: int = env.unwrapped.metadata.get(FRAMES, 1)
        self.logged: list[dict[str, float]] = [{} for _ in range(num_envs)]
        self._space = env.action_space
        self.act_space = from_zero(self._space)
        self._observe = Observer(env.observation_space, options.image_size)
        self.obs_space = self._observe.space
        meanings = getattr(env.unwrapped, "get_action_meanings", None)
        self.action_names = list(meanings()) if callable(meanings) else None
        self._seeds: list[int | None] = [seed + i for i in range(num_envs)]
        self._ended = np.zeros(num_envs, bool)

    def reset(self) -> dict[str, np.ndarray]:
        rows = [self._reset(i) for i in range(self.num_envs)]
        return self._stack(rows, np.ones(self.num_envs, bool))

    def step(self, action: Any) -> dict[str, np.ndarray]:
        action = check_action(action, self.act_space, self.num_envs)
        first = self._ended
        rows = [
            self._reset(i) if first[i] else self._step(i, self._native(action, i))
            for i in range(self.num_envs)
        ]
        return self._stack(rows, first)

    def get_state(self) -> bytes:
        for layer in _layers(self._envs[0]):
            if getattr(type(layer), "__getstate__", None) is EzPickle.__getstate__:
                raise StateError(f"{type(layer).__name__} pickles its arguments only (EzPickle)")
        try:
            return pickle.dumps((self._envs, self._seeds, self._ended))
        except Exception as error:  # of the environment's own code, too
            raise StateError(f"the environment does not pickle: {_reason(error)}") from error

    def set_state(self, state: bytes) -> None:
        try:
            envs, seeds, ended = pickle.loads(state)
        except Exception as error:
            raise StateError(f"the environment does not unpickle: {_reason(error)}") from error
        for name in ("observation_space", "action_space"):
            if getattr(envs[0], name) != getattr(self._envs[0], name):
                raise StateError(f"the environment's {name} has changed")
        self.close()
        self._envs, self._seeds, self._ended = envs, seeds, ended

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _reset(self, i: int) -> tuple[Any, float, bool, bool]:
        result = self._envs[i].reset(seed=self._seeds[i])
        self._seeds[i] = None
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
            raise TaskError(f"reset must return (observation, info), got {_shape_of(result)}")
        return result[0], 0.0, False, False

    def _step(self, i: int, action: Any) -> tuple[Any, float, bool, bool]:
        result = self._envs[i].step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise TaskError(
                "step must return (observation, reward, terminated, truncated, info),"
                f" got {_shape_of(result)}"
            )
        obs, reward, terminated, truncated, info = result
        self.logged[i] = info.get(LOGGED, {}) if isinstance(info, dict) else {}
        ended = _flag(terminated, "terminated"), _flag(truncated, "truncated")
        return obs, _reward(reward), *ended

    def _native(self, action: Any, i: int) -> Any:
        if isinstance(action, dict):
            return {k: self._native(v, i) for k, v in action.items()}
        if isinstance(self._space, gymnasium.spaces.Discrete):
            return action[i] + self._space.start
        return action[i]

    def _stack(
        self, rows: list[tuple[Any, Any, bool, bool]], first: np.ndarray
    ) -> dict[str, np.ndarray]:
        obs, reward, terminated, truncated = zip(*rows, strict=True)
        terminal = np.array(terminated, bool)
        self._ended = terminal | np.array(truncated, bool)
        return {
            **self._observe.stacked(list(obs)),
            "reward": np.array(reward, np.float32),
            "is_first": first.copy(),
            "is_last": self._ended.copy(),
            "is_terminal": terminal,
        }


def _layers(env: gymnasium.Env[Any, Any]) -> Iterator[gymnasium.Env[Any, Any]]:
    """An environment's wrappers from without, and itself."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_env(env: Any) -> None:
    """Raises a TaskError where a factory's result is no environment with spaces."""
    if not isinstance(env, gymnasium.Env):
        raise TaskError(f"the factory must return a gymnasium.Env, got {type(env).__name__}")
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), gymnasium.Space):
            raise TaskError(f"{type(env).__name__}.{name} is not set to a gymnasium space")


def _reward(value: Any) -> float:
    if type(value) is not float:
        array = np.asarray(value)
        if array.shape or array.dtype.kind not in "biuf":
            raise TaskError(f"the reward must be a single number, got {_shape_of(value)}")
    if not np.isfinite(value):
        raise TaskError(f"the reward must be finite, got {value}")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return bool(value)
    raise TaskError(f"{name} must be a bool, got {_shape_of(value)}")


def _shape_of(value: Any) -> str:
    """What a wrong value is, in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}"


def factory_by_id(task_id: str) -> Factory:
    """A factory of a registered Gymnasium id (`CartPole-v1`, or `module:Id-v0` to import first).

    Raises:
      TaskError: unknown id or a missing package, when the id is looked up or at the first call.
    """

    def make() -> gymnasium.Env[Any, Any]:
        try:
            return gymnasium.make(task_id, disable_env_checker=True)
        except (gymnasium.error.Error, ImportError) as error:
            known = task_id in gymnasium.registry
            hint = "" if known else ", ".join(nearest(task_id, gymnasium.registry))
            raise TaskError(
                f"gymnasium cannot make '{task_id}': {' '.join(str(error).split())}"
                + (f"; nearest: {hint}" if hint else "")
            ) from error

    return make
