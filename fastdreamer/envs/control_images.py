"""DeepMind Control from images, rendered by dm_control: the official code's `dmc_vision`.

dm_control draws by OpenGL. MUJOCO_GL chooses how: egl (the default here), osmesa or glfw.
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from fastdreamer.envs.base import EnvOptions, TaskError, fold, nearest
from fastdreamer.envs.control import suite_name
from fastdreamer.envs.gym import FRAMES, Factory

_CAMERAS = {"quadruped": 2}
"""Camera of a domain, where it is not the first."""
_RENDERING = "cannot draw by OpenGL; set MUJOCO_GL to egl, osmesa or glfw, whichever works here"


class ControlImages(gymnasium.Env[Any, Any]):
    """A task of dm_control's suite that shows only the picture of its camera.

    Args:
      suite: the module `dm_control.suite`.
      domain, task: its names, such as "walker" and "walk".
      size: height and width of the image in pixels.
      repeat: frames per step, whose rewards are summed; fewer where the episode ends.

    An episode has 1000 frames and ends in a truncation; a discount of 0 is a termination.

    Raises:
      TaskError: by reset and step, where there is no OpenGL to draw by.
    """

    def __init__(self, suite: Any, domain: str, task: str, size: int, repeat: int) -> None:
        self._suite, self._name = suite, (domain, task)
        self._size, self._repeat = size, repeat
        self.metadata = {FRAMES: repeat}
        self._camera = _CAMERAS.get(domain, 0)
        self._env = suite.load(domain, task)
        action = self._env.action_spec()
        self.action_space = spaces.Box(
            action.minimum.astype(np.float32), action.maximum.astype(np.float32)
        )
        image = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = spaces.Dict({"image": image})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:  # dm_control takes its seed where a task is made
            self.close()
            self._env = self._suite.load(*self._name, task_kwargs={"random": seed})
        self._env.reset()
        return self._observe(), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        reward = 0.0
        for _ in range(self._repeat):
            now = self._env.step(action)
            reward += now.reward
            if now.last():
                break
        terminated = bool(now.last() and now.discount == 0)
        return self._observe(), reward, terminated, bool(now.last()) and not terminated, {}

    def close(self) -> None:
        self._env.close()
        self._env.physics.free()  # in the thread that drew

    def _observe(self) -> dict[str, np.ndarray]:
        try:
            image = self._env.physics.render(self._size, self._size, camera_id=self._camera)
        except Exception as error:  # of the driver, the library or mujoco
            raise TaskError(f"dm_control {_RENDERING} ({_one_line(error)})") from error
        return {"image": np.ascontiguousarray(image)}


def control_images_factory(task: str, options: EnvOptions) -> Factory:
    """A factory of `dmc_NAME` or `dmc:NAME` from images, NAME by any spelling.

    Raises:
      TaskError: dm_control is not installed, finds no OpenGL, or its suite has no such task (names
        the nearest).
    """
    name = suite_name(task)
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from dm_control import suite
    except ImportError as error:
        raise TaskError(
            f"task '{task}' from images needs dm_control: pip install fastdreamer[dmc]"
            f" ({_one_line(error)})"
        ) from error
    except Exception as error:  # PyOpenGL fails in its own ways where a library is missing
        raise TaskError(f"dm_control {_RENDERING} ({_one_line(error)})") from error
    tasks = {f"{domain}_{of_it}": (domain, of_it) for domain, of_it in suite.ALL_TASKS}
    found = {fold(known): key for known, key in tasks.items()}.get(fold(name))
    if found is None:
        near = ", ".join(f"dmc_{known}" for known in nearest(name, tasks)) or "none"
        raise TaskError(f"dm_control has no task '{name}'; nearest: {near}")

    return lambda: ControlImages(suite, *found, options.image_size, options.dmc_repeat)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
