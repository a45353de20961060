"""What an environment is to the rest of the package: batched rows in Dreamer's convention.

Rows. `reset` and `step` return one dict with the observation keys of `obs_space` and
  reward       float32 (N,)  the raw reward, on the row of the observation that it arrived with
  is_first     bool    (N,)  the first row of an episode; its reward is 0
  is_last      bool    (N,)  the last row of an episode, however it ended
  is_terminal  bool    (N,)  the last row, and nothing follows: the state has no value

Auto-reset happens on the step after an is_last row. The action given there is discarded and the
row that comes back is the first of the next episode (is_first True, is_last False, reward 0).

Time-outs. An episode cut off by a time limit has is_last True and is_terminal False, so that its
last state is still bootstrapped: the convention of the 2023 recipe. The official 2025 code sets
is_terminal = is_last on Atari, which a caller gets by that very assignment.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any, Protocol

import gymnasium
import numpy as np

from fastdreamer.errors import UserError

FORMS = (
    "an Atari game (ms_pacman, atari:ms_pacman), dmc_NAME (dmc_walker_walk), crafter_reward,"
    " envpool:ID, gymnasium:ID, minerl:navigate or my.module:make_env"
)
"""What a task's name may be, for messages."""


class TaskError(UserError):
    """An environment cannot be made from what the user asked for."""


class StateError(Exception):
    """The state of environments cannot be saved or restored; the message says why."""


@dataclasses.dataclass(frozen=True)
class EnvOptions:
    """How environments are made. Fields marked with a suite do nothing for other tasks.

    Raises:
      TaskError: a value is out of range.
    """

    image_size: int = 64
    """Height and width in pixels that every image observation is resized to."""
    action_repeat: int = 4
    """Atari: emulator frames per step; the image is the maximum of the last two of them. ViZDoom:
    tics per step."""
    sticky: float = 0.0
    """Atari: probability that the emulator repeats the previous action instead of the given one."""
    noop_max: int = 30
    """Atari: an episode starts after 1 to this many no-op frames, drawn uniformly."""
    max_episode_frames: int = 108_000
    """Atari: emulator frames after which an episode is truncated. ViZDoom: tics, at most 2100."""
    full_action_space: bool = False
    """Atari: offer all 18 actions instead of those that the game uses."""
    episodic_life: bool = False
    """Atari: the loss of a life ends the episode, without restarting the game."""
    dmc_repeat: int = 2
    """DeepMind Control: frames per step, of which an episode has 1000; their rewards are summed."""
    dmc_images: bool = False
    """DeepMind Control: observe images, which need dm_control, instead of vectors."""
    num_threads: int = 0
    """Threads of the envpool engine; 0 lets it choose."""

    def __post_init__(self) -> None:
        for name in ("image_size", "action_repeat", "noop_max", "dmc_repeat"):
            if getattr(self, name) < 1:
                raise TaskError(f"env option {name} must be at least 1, got {getattr(self, name)}")
        if self.max_episode_frames < self.action_repeat:
            raise TaskError(
                f"env option max_episode_frames must be at least action_repeat"
                f" ({self.action_repeat}), got {self.max_episode_frames}"
            )
        if not 0.0 <= self.sticky <= 1.0:
            raise TaskError(f"env option sticky must lie in 0..1, got {self.sticky}")
        if self.num_threads < 0:
            raise TaskError(f"env option num_threads must not be negative, got {self.num_threads}")


class VectorEnv(Protocol):
    """N environments stepped together; see the module's docstring for the rows."""

    num_envs: int
    obs_space: gymnasium.spaces.Dict
    """Of one environment; its entries are Box: images uint8 (H, W, C), vectors float32 (D,)."""
    act_space: gymnasium.Space[Any]
    """Of one environment; a Discrete space starts at 0."""
    is_atari: bool
    """The environments are Atari games."""
    frames: int
    """Frames of the emulator or the simulation in a step."""
    logged: list[dict[str, float]]
    """What each environment tells of the episode that it has just ended, by name."""
    action_names: list[str] | None
    """Names of the discrete actions in order, where the environment has them."""

    def reset(self) -> dict[str, np.ndarray]:
        """Starts a new episode everywhere; seeds are not set again."""
        ...

    def step(self, action: Any) -> dict[str, np.ndarray]:
        """Steps every environment once.

        Args:
          action: int64 (N,) for Discrete, else (N, *act_space.shape); for a Dict space a dict.

        Raises:
          ValueError: the action's shape, type or range does not fit the action space.
        """
        ...

    def get_state(self) -> bytes:
        """Everything that decides how the environments go on.

        Raises:
          StateError: they do not give it.
        """
        ...

    def set_state(self, state: bytes) -> None:
        """Puts environments made as before into a state of `get_state`, which may be unpickled:
        only of one's own files.

        Raises:
          StateError: they cannot be; nothing is changed.
        """
        ...

    def close(self) -> None:
        """Frees the environments."""
        ...


def check_action(action: Any, space: gymnasium.Space[Any], num_envs: int) -> Any:
    """Checks a batched action against the space of one environment.

    Args:
      action: (N, *space.shape), or a dict of such for a Dict space.
      space: of one environment; a Discrete space starts at 0.

    Returns:
      The action as an array (or dict of arrays), integers for Discrete and MultiDiscrete.

    Raises:
      ValueError: wrong shape or keys, non-integers for a discrete space, or out of range.
    """
    if isinstance(space, gymnasium.spaces.Dict):
        if not isinstance(action, dict) or set(action) != set(space.spaces):
            raise ValueError(f"action must be a dict with the keys {sorted(space.spaces)}")
        return {k: check_action(action[k], sub, num_envs) for k, sub in space.spaces.items()}
    action = np.asarray(action)
    shape = (num_envs, *(space.shape or ()))
    if action.shape != shape:
        raise ValueError(f"action must have shape {shape}, got {action.shape}")
    if isinstance(space, gymnasium.spaces.Discrete | gymnasium.spaces.MultiDiscrete):
        if not np.issubdtype(action.dtype, np.integer):
            raise ValueError(f"action must hold integers, got {action.dtype}")
        count = space.n if isinstance(space, gymnasium.spaces.Discrete) else space.nvec
        if (action < 0).any() or (action >= count).any():
            raise ValueError(f"action must lie in 0..{np.asarray(count) - 1}, got {action}")
    return action


def from_zero(space: gymnasium.Space[Any]) -> gymnasium.Space[Any]:
    """The same space, but a Discrete one starts at 0; other spaces are returned as they are."""
    if isinstance(space, gymnasium.spaces.Discrete) and space.start != 0:
        return gymnasium.spaces.Discrete(space.n)
    return space


def fold(name: str) -> str:
    """A name in small letters without separators, to compare spellings by."""
    return re.sub(r"[_\s]", "", name).lower()


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` valid names that resemble `name`, prefixes and case aside, best first."""
    folded: dict[str, list[str]] = {}
    for full in valid:
        folded.setdefault(full.rpartition(":")[2].lower(), []).append(full)
    close = difflib.get_close_matches(name.rpartition(":")[2].lower(), folded, n=count)
    return [full for key in close for full in folded[key]][:count]
