"""MineRL Navigate: find a diamond block in Minecraft, about 64 metres away, by a compass.

MineRL 0.4 speaks the API of old gym; `MineRLEnv` turns it into Gymnasium's, with the actions and
observations that sheeprl trains on: one discrete action of 14, and an image beside vectors.

| actions          | press                                                                    |
|------------------|--------------------------------------------------------------------------|
| noop             | nothing                                                                  |
| attack, back, forward, left, right | that key                                               |
| look up, down    | the camera by 15 degrees of pitch, which stays within -60..60            |
| turn left, right | the camera by 15 degrees of yaw                                          |
| jump, sneak, sprint | that key and forward                                                  |
| place            | a block of dirt                                                          |

Attack sticks for 30 steps from its choice on, and holds jump down meanwhile; jump, with forward,
sticks for 10. The chosen action happens beside what sticks.

| observation   | is                                                                            |
|---------------|-------------------------------------------------------------------------------|
| image         | uint8 (H, W, 3), the view                                                     |
| compass       | float32 (1,), the goal's direction in degrees, -180..180                      |
| inventory     | float32 (items,), how many blocks of dirt                                     |
| max_inventory | float32 (items,), the most of them in this episode                            |
| life_stats    | float32 (3,), life, food and air, where the environment gives them            |

An episode ends in a termination at the goal or at MineRL's own limit of 6000 steps, as in sheeprl;
only where a gym wrapper says that it cut the episode off is it a truncation. Worlds are random and
not seeded. sheeprl also breaks blocks 100 times as fast, which takes its own environment; given to
`MineRLEnv`, that one works too.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fastdreamer.envs.base import TaskError, nearest
from fastdreamer.envs.gym import Factory

PITCH_LIMIT = 60.0
"""Degrees that the view may look up or down."""
STICKY_ATTACK, STICKY_JUMP = 30, 10
"""Steps for which these keys stay down, the step of the choice included."""
_KEYS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
_FORWARD = {"forward": 1}
ACTIONS: dict[str, dict[str, Any]] = {
    "noop": {},
    "attack": {"attack": 1},
    "back": {"back": 1},
    "look_up": {"camera": (-15.0, 0.0)},
    "look_down": {"camera": (15.0, 0.0)},
    "turn_left": {"camera": (0.0, -15.0)},
    "turn_right": {"camera": (0.0, 15.0)},
    "forward": {"forward": 1},
    "jump": {"jump": 1} | _FORWARD,
    "left": {"left": 1},
    "place": {"place": "dirt"},
    "right": {"right": 1},
    "sneak": {"sneak": 1} | _FORWARD,
    "sprint": {"sprint": 1} | _FORWARD,
}
"""The discrete actions in order, as what differs from doing nothing."""
_TASKS = {
    "navigate": {"dense": False, "extreme": False},
    "navigate_dense": {"dense": True, "extreme": False},
    "navigate_extreme": {"dense": False, "extreme": True},
    "navigate_extreme_dense": {"dense": True, "extreme": True},
}
_INSTALL = (
    "needs MineRL, whose Minecraft needs Java 8: install a JDK 8"
    " (openjdk-8-jdk), then pip install minerl==0.4.4; without a display run under xvfb-run"
)


class MineRLEnv(gymnasium.Env[Any, Any]):
    """A MineRL Navigate environment with Gymnasium's API, discrete actions and flat observations.

    Args:
      env: speaks old gym's API: `reset()` returns an observation, `step(action)` returns
        (observation, reward, done, info). Its `observation_space.spaces` has `pov`, `inventory`
        (a Dict of counts), `compass` (a Dict with `angle`) or `compassAngle`, and may have
        `life_stats` (a Dict of life, food and air). Actions are dicts: 0 or 1 for each key,
        `camera` (pitch, yaw) in degrees, `place` "none" or "dirt".
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        given = env.observation_space.spaces
        self._items = sorted(given["inventory"].spaces)
        self._has_life = "life_stats" in given
        self.observation_space = _observation_space(
            given["pov"].shape, len(self._items), self._has_life
        )
        self.action_space = spaces.Discrete(len(ACTIONS))
        self._start()

    def get_action_meanings(self) -> list[str]:
        """Names of the actions in order."""
        return list(ACTIONS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self._start()
        return self._observe(self._env.reset()), {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        obs, reward, done, info = self._env.step(self._press(int(action)))
        truncated = bool(done and info.get("TimeLimit.truncated", False))
        return self._observe(obs), float(reward), bool(done) and not truncated, truncated, {}

    def close(self) -> None:
        self._env.close()

    def _start(self) -> None:
        self._attacks = self._jumps = 0
        self._pitch = 0.0
        self._most = np.zeros(len(self._items), np.float32)

    def _press(self, action: int) -> dict[str, Any]:
        """MineRL's action of a chosen one, with what sticks and the pitch's limit."""
        keys: dict[str, Any] = dict.fromkeys(_KEYS, 0) | {"camera": (0.0, 0.0), "place": "none"}
        keys |= list(ACTIONS.values())[action]
        if keys["attack"]:
            self._attacks = STICKY_ATTACK
        if self._attacks:
            keys |= {"attack": 1, "jump": 0}
            self._attacks -= 1
        if keys["jump"]:
            self._jumps = STICKY_JUMP
        if self._jumps:
            keys |= {"jump": 1, "forward": 1}
            self._jumps -= 1
        pitch, yaw = keys["camera"]
        if abs(self._pitch + pitch) > PITCH_LIMIT:
            pitch = 0.0
        self._pitch += pitch
        return keys | {"camera": np.array([pitch, yaw], np.float32)}

    def _observe(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        counts = np.array([obs["inventory"][k] for k in self._items], np.float32)
        self._most = np.maximum(self._most, counts)
        angle = obs["compass"]["angle"] if "compass" in obs else obs["compassAngle"]
        out: dict[str, np.ndarray] = {
            "image": np.array(obs["pov"], np.uint8),
            "compass": np.array(angle, np.float32).reshape(1),
            "inventory": counts,
            "max_inventory": self._most,
        }
        if self._has_life:
            life = obs["life_stats"]
            out["life_stats"] = np.array([life["life"], life["food"], life["air"]], np.float32)
        return out


def minerl_factory(name: str) -> Factory:
    """A factory of `navigate`, `navigate_dense`, `navigate_extreme` or `navigate_extreme_dense`.

    Raises:
      TaskError: unknown name; when called: MineRL is not installed or does not start.
    """
    if name not in _TASKS:
        near = ", ".join(nearest(name, _TASKS, 1)) or "none"
        raise TaskError(
            f"MineRL has no task '{name}' here; nearest: {near}; there are {', '.join(_TASKS)}"
        )
    task = f"task 'minerl:{name}'"

    def make() -> gymnasium.Env[Any, Any]:
        try:
            from minerl.herobraine.env_specs.navigate_specs import Navigate
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise TaskError(f"{task} {_INSTALL} ({reason})") from error
        try:
            return MineRLEnv(Navigate(**_TASKS[name]).make())
        except Exception as error:  # Java, display, download: all kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TaskError(f"{task} does not start, and {_INSTALL} ({reason})") from error

    return make


def _observation_space(pov: tuple[int, ...], items: int, life: bool) -> spaces.Dict:
    found: dict[str, spaces.Space[Any]] = {
        "image": spaces.Box(0, 255, pov, np.uint8),
        "compass": spaces.Box(-180, 180, (1,), np.float32),
        "inventory": spaces.Box(0, np.inf, (items,), np.float32),
        "max_inventory": spaces.Box(0, np.inf, (items,), np.float32),
    }
    if life:
        high = np.array([20, 20, 300], np.float32)
        found["life_stats"] = spaces.Box(np.zeros(3, np.float32), high, (3,), np.float32)
    return spaces.Dict(found)
