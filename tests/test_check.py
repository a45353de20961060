"""Environments of one's own: import paths, and what is said about those that are broken."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from fastdreamer.envs import TaskError, make_envs
from fastdreamer.envs.check import examine, preflight, report

OBS = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (8, 8, 3), np.uint8),
        "speed": spaces.Box(-1, 1, (2,), np.float32),
        "arm": spaces.Dict({"gear": spaces.Discrete(3)}),
    }
)


def good() -> dict[str, Any]:
    camera = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    return {"camera": camera, "speed": np.array([0.5, -1], np.float32), "arm": {"gear": 2}}


class Env(gymnasium.Env[Any, Any]):
    """Correct, with 5 steps an episode; `broken` replaces results from step 3 of an episode on."""

    observation_space, action_space = OBS, spaces.Discrete(2)

    def __init__(self, **broken: Any) -> None:
        self.broken, self.t = broken, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self.t = 0
        return self.broken.get("start", (good(), {}))

    def step(self, action: int) -> Any:
        self.t += 1
        result = (good(), 1.0 + self.t, self.t == 5, False, {})
        if self.t < 3:
            return result
        result[0].update(self.broken.get("obs", {}))
        for i, name in enumerate(("whole", "reward", "terminated")):
            if i and name in self.broken:
                result = (*result[:i], self.broken[name], *result[i + 1 :])
        return self.broken.get("result", result)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "image of floats": (
        {"obs": {"camera": np.zeros((8, 8, 3), np.float32)}},
        r"'camera' is float32, but its space says Box\(0, 255, \(8, 8, 3\), uint8\)",
    ),
    "image of integers": ({"obs": {"camera": np.zeros((8, 8, 3), int)}}, "'camera' is int64"),
    "image's shape": (
        {"obs": {"camera": np.zeros((3, 8, 8), np.uint8)}},
        r"'camera' has shape \(3, 8, 8\), but its space says",
    ),
    "vector's shape": ({"obs": {"speed": np.zeros(3)}}, r"'speed' has shape \(3,\)"),
    "ragged": ({"obs": {"speed": [[1], [1, 2]]}}, "'speed' is no array"),
    "text": ({"obs": {"speed": np.array(["a", "b"])}}, "'speed' is <U1"),
    "NaN": ({"obs": {"speed": np.array([0, np.nan])}}, "'speed' holds NaN"),
    "infinite": ({"obs": {"speed": np.array([0, np.inf])}}, "'speed' holds an infinite number"),
    "missing entry": (
        {"obs": {"arm": {"claw": 1}}},
        r"'arm' has no entry 'gear'; it is \['claw'\]",
    ),
    "no dict": ({"obs": {"arm": 3}}, "'arm' has no entry 'gear'; it is int"),
    "class out of range": (
        {"obs": {"arm": {"gear": 3}}},
        r"'arm/gear' is 3, but its space says Discrete\(3\)",
    ),
    "fractional class": ({"obs": {"arm": {"gear": 0.5}}}, "'arm/gear' is 0.5"),
    "reward's shape": (
        {"reward": np.zeros(1)},
        r"reward must be a single number, got an array of shape \(1,\)",
    ),
    "no reward": ({"reward": None}, "reward must be a single number, got NoneType"),
    "NaN reward": ({"reward": float("nan")}, "reward must be finite, got nan"),
    "infinite reward": ({"reward": np.float32("inf")}, "reward must be finite, got inf"),
    "a dict as an end": ({"terminated": {}}, "terminated must be a bool, got dict"),
    "old gym's step": (
        {"result": (good(), 0.0, False, {})},
        r"step must return \(observation, reward, terminated, truncated, info\), got a tuple of 4",
    ),
    "step of nothing": ({"result": None}, "step must return .* got NoneType"),
    "old gym's reset": ({"start": good()}, r"reset must return \(observation, info\), got dict"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_while_training_is_named(case):
    broken, message = BROKEN[case]
    env = make_envs(lambda: Env(**broken), 2, 0)

    def train() -> None:
        env.reset()
        for _ in range(5):
            env.step(np.zeros(2, np.int64))

    with pytest.raises(TaskError, match=message) as caught:
        train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_is_found_before_training(case):
    broken, message = BROKEN[case]
    with pytest.raises(TaskError, match=message):
        preflight(lambda: Env(**broken))


def test_only_the_check_compares_bounds_and_kinds():
    beyond = {"obs": {"speed": np.array([0, 1.5], np.float32)}}
    with pytest.raises(TaskError, match=r"'speed' holds 1\.5, but its space says Box\(-1\.0, 1\.0"):
        preflight(lambda: Env(**beyond))
    rounded = {"obs": {"speed": np.array([0, 1.00001], np.float32)}}
    assert preflight(lambda: Env(**rounded)) == []
    env = make_envs(lambda: Env(**beyond), 1, 0)
    env.reset()
    env.step(np.zeros(1, np.int64))


def test_what_raises_is_told_with_its_line():
    class Raises(Env):
        def step(self, action: int) -> Any:
            raise KeyError("gone")

    with pytest.raises(TaskError, match=r"step raised KeyError: 'gone' \(test_check.py:\d+\)"):
        examine(Raises)


def test_notes_are_no_errors():
    wide = {"obs": {"speed": np.array([0.0, 1.0])}}
    found = examine(lambda: Env(**wide, terminated=False, reward=0.0), steps=40)
    assert "'speed' is float64, but its space says float32: it is converted" in found.notes
    assert "no episode ended within 40 steps" in found.notes
    assert examine(lambda: Env(obs={"extra": 1})).notes[0] == (
        "the observation's ['extra'] are not in its space and not used"
    )


def test_what_never_changes_is_noted():
    class Still(Env):
        def step(self, action: int) -> Any:
            return self.reset()[0], 2.0, True, False, {}

        def reset(self, **_: Any) -> tuple[Any, dict]:
            return good() | {"speed": np.zeros(2, np.float32)}, {}

    assert examine(Env).notes == []
    assert examine(Still).notes == [
        "'speed' was 0 everywhere, in every step",
        "every reward was 2",
        "every episode ended after a single step",
    ]


def test_report():
    text = report(Env, steps=60)
    lines = text.splitlines()
    assert lines[0].startswith("Env: 60 random steps, ")
    assert (
        "  camera    image (64, 64, 3), seen 0 .. 191, from Box(0, 255, (8, 8, 3), uint8)" in lines
    )
    assert "  arm/gear  vector (3,), seen 0 .. 1, from Discrete(3)" in lines
    assert "  2 .. 6, mean 4, not 0 in 100.0% of the steps" in lines
    assert "  10 ended: 10 terminated, 0 truncated; 5 to 5 steps, mean 5.0; mean score 20" in lines


def test_a_slow_environment_stops_in_time():
    found = examine(Env, steps=10**9, seconds=0.05)
    assert 0 < found.steps < 10**6


def test_known_and_slow_tasks_are_not_run_before_training():
    assert preflight("ms_pacman") == preflight("envpool:Catch-v0") == []
    assert preflight("minerl:navigate") == []


# Import paths ----------------------------------------------------------------------------------

MODULE = """
import gymnasium
from gymnasium import spaces
import numpy as np

class Walk(gymnasium.Env):
    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    action_space = spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.ones(1, np.float32), 1.0, False, False, {}

def make_walk():
    return Walk()

def make_nothing():
    pass

def make_trouble():
    raise RuntimeError("no\\nsuch robot")

class Group:
    make = staticmethod(make_walk)

SPEED = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the modules `walks`, `deep.walks`, `torn` and `hungry`."""
    (tmp_path / "walks_here.py").write_text(MODULE)
    (tmp_path / "deep_here").mkdir()
    (tmp_path / "deep_here" / "walks.py").write_text(MODULE)
    (tmp_path / "torn_here.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "hungry_here.py").write_text("import not_installed_here\n")
    (tmp_path / "angry_here.py").write_text(textwrap.dedent("x = 1\nx / 0\n"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    return tmp_path


@pytest.mark.parametrize(
    "task",
    ["walks_here:make_walk", "walks_here:Walk", "walks_here:Group.make", "deep_here.walks:Walk"],
)
def test_import_paths(here, task):
    env = make_envs(task, 2, 0)
    assert env.reset()["vector"].tolist() == [[0], [0]]
    assert env.step(np.zeros(2, np.int64))["reward"].tolist() == [1, 1]


PATHS = {
    "wolks_here:Walk": r"unknown task 'wolks_here:Walk': there is no module 'wolks_here' in .*; a",
    "deep_here.wolks:Walk": "there is no module 'deep_here.wolks'",
    "walks_here:make_wallk": r"module 'walks_here' has no 'make_wallk'; nearest: make_walk",
    "walks_here:Group.mak": "class 'Group' has no 'mak'; nearest: make",
    "walks_here:SPEED": "'SPEED' is int, not a function or class",
    "walks_here:make_nothing": r"'make_nothing' must return a gymnasium\.Env, got NoneType",
    "walks_here:make_trouble": (
        r"cannot be made: RuntimeError: no such robot \(walks_here\.py:\d+\)"
    ),
    "torn_here:f": r"importing 'torn_here' raised SyntaxError: .*\(torn_here\.py:2\)",
    "hungry_here:f": "importing 'hungry_here' raised ModuleNotFoundError: .*'not_installed_here'",
    "angry_here:f": r"importing 'angry_here' raised ZeroDivisionError: .*\(angry_here\.py:2\)",
    "envpol:CartPole-v1": "unknown task 'envpol:CartPole-v1'; nearest: envpool:CartPole-v1",
    "envpol:make_walk": "unknown task 'envpol:make_walk'; nearest: .*envpool:make_walk",
    "gymnasum:Walk": "nearest: .*gymnasium:Walk",
    "walks_here:": "unknown task 'walks_here:'",
    "walks here:Walk": "unknown task 'walks here:Walk'",
}


@pytest.mark.parametrize("task", PATHS)
def test_wrong_import_paths(here, task):
    with pytest.raises(TaskError, match=PATHS[task]) as caught:
        make_envs(task, 1, 0)
    assert "\n" not in str(caught.value)
