"""MineRL Navigate: actions, observations and ends, with an environment that speaks its API."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastdreamer.envs import TaskError, make_envs
from fastdreamer.envs.minerl import ACTIONS, MineRLEnv

KEYS = {"attack", "back", "camera", "forward", "jump", "left", "place", "right", "sneak", "sprint"}
INDEX = {name: i for i, name in enumerate(ACTIONS)}


def space(**entries: Any) -> SimpleNamespace:
    return SimpleNamespace(spaces=entries)


class FakeMineRL:
    """Old gym's API; notes every action; the goal is reached at step `goal`."""

    def __init__(self, goal: int = 1000, limit: int = 1000, life: bool = False) -> None:
        pov = SimpleNamespace(shape=(64, 64, 3))
        given = {"pov": pov, "compass": space(angle=None), "inventory": space(dirt=None)}
        if life:
            given["life_stats"] = space(life=None, food=None, air=None)
        self.observation_space = space(**given)
        self.goal, self.limit, self.life = goal, limit, life
        self.pressed: list[dict[str, Any]] = []
        self.dirt, self.t, self.closed = 0, 0, False

    def observe(self) -> dict[str, Any]:
        view = np.full((64, 64, 3), self.t % 256, np.uint8)
        obs = {"pov": view, "compass": {"angle": np.array(-90.0 + self.t)}}
        obs["inventory"] = {"dirt": np.array(self.dirt)}
        if self.life:
            obs["life_stats"] = {"life": 20.0, "food": 18.0, "air": 300.0}
        return obs

    def reset(self) -> dict[str, Any]:
        self.t = 0
        return self.observe()

    def step(self, action: dict[str, Any]) -> tuple[Any, float, bool, dict[str, Any]]:
        assert set(action) == KEYS
        self.pressed.append(action)
        self.t += 1
        found = self.t == self.goal
        late = self.t >= self.limit
        info = {"TimeLimit.truncated": True} if late and not found else {}
        return self.observe(), 100.0 * found, found or late, info

    def close(self) -> None:
        self.closed = True


def down(fake: FakeMineRL, i: int = -1) -> set[str]:
    """Keys held in a step."""
    return {k for k, v in fake.pressed[i].items() if k not in ("camera", "place") and v}


def play(env: MineRLEnv, *names: str) -> None:
    for name in names:
        env.step(INDEX[name])


def test_the_actions_are_one_discrete_space_of_14():
    env = MineRLEnv(FakeMineRL())
    env.reset()
    assert env.action_space.n == 14 == len(env.get_action_meanings())
    assert list(ACTIONS)[:4] == ["noop", "attack", "back", "look_up"]


@pytest.mark.parametrize(
    ("name", "keys", "camera", "place"),
    [
        ("noop", set(), (0, 0), "none"),
        ("forward", {"forward"}, (0, 0), "none"),
        ("back", {"back"}, (0, 0), "none"),
        ("left", {"left"}, (0, 0), "none"),
        ("right", {"right"}, (0, 0), "none"),
        ("jump", {"jump", "forward"}, (0, 0), "none"),
        ("sneak", {"sneak", "forward"}, (0, 0), "none"),
        ("sprint", {"sprint", "forward"}, (0, 0), "none"),
        ("attack", {"attack"}, (0, 0), "none"),
        ("place", set(), (0, 0), "dirt"),
        ("look_up", set(), (-15, 0), "none"),
        ("look_down", set(), (15, 0), "none"),
        ("turn_left", set(), (0, -15), "none"),
        ("turn_right", set(), (0, 15), "none"),
    ],
)
def test_what_each_action_presses(name, keys, camera, place):
    fake = FakeMineRL()
    env = MineRLEnv(fake)
    env.reset()
    play(env, name)
    assert down(fake) == keys
    assert tuple(fake.pressed[-1]["camera"]) == camera
    assert fake.pressed[-1]["place"] == place


def test_pitch_stays_within_60_degrees_and_yaw_turns_on():
    fake = FakeMineRL()
    env = MineRLEnv(fake)
    env.reset()
    play(env, *["look_up"] * 6, *["look_down"] * 10, *["turn_left"] * 30)
    pitch = np.cumsum([p["camera"][0] for p in fake.pressed])
    assert (pitch.min(), pitch.max(), pitch[-1]) == (-60, 60, 60)
    assert sum(p["camera"][1] for p in fake.pressed) == -450
    env.reset()
    play(env, "look_down")
    assert fake.pressed[-1]["camera"][0] == 15


def test_attack_sticks_for_30_steps_and_holds_jump_down():
    fake = FakeMineRL()
    env = MineRLEnv(fake)
    env.reset()
    play(env, "attack", *["right"] * 10, "jump", *["noop"] * 19)
    assert [("attack" in down(fake, i)) for i in range(31)] == [True] * 30 + [False]
    assert down(fake, 5) == {"attack", "right"}
    assert down(fake, 11) == {"attack", "forward"}
    assert down(fake, 12) == {"attack"}


def test_jump_sticks_for_10_steps_with_forward_and_goes_on_under_attack():
    fake = FakeMineRL()
    env = MineRLEnv(fake)
    env.reset()
    play(env, "jump", "noop", "attack", *["noop"] * 8)
    assert [("jump" in down(fake, i)) for i in range(11)] == [True] * 10 + [False]
    assert down(fake, 2) == {"attack", "jump", "forward"}
    env.reset()
    play(env, "noop")
    assert down(fake) == set()


def test_observations_and_the_most_dirt_of_an_episode():
    fake = FakeMineRL(life=True)
    env = MineRLEnv(fake)
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    assert obs["compass"] == -90 and obs["life_stats"].tolist() == [20, 18, 300]
    most = []
    for fake.dirt in (3, 1):
        obs = env.step(0)[0]
        most.append((obs["inventory"][0], obs["max_inventory"][0]))
    assert most == [(3, 3), (1, 3)] and env.observation_space.contains(obs)
    assert env.reset()[0]["max_inventory"] == 1
    assert "life_stats" not in MineRLEnv(FakeMineRL()).observation_space.spaces


def test_ends():
    env = MineRLEnv(FakeMineRL(goal=2))
    env.reset()
    assert env.step(0)[1:4] == (0, False, False)
    assert env.step(0)[1:4] == (100, True, False)
    env = MineRLEnv(FakeMineRL(limit=1))
    env.reset()
    assert env.step(0)[1:4] == (0, False, True)


def test_rows():
    fakes = [FakeMineRL(goal=3), FakeMineRL(goal=3)]
    made = iter(fakes)
    envs = make_envs(lambda: MineRLEnv(next(made)), 2, 0)
    assert envs.action_names == list(ACTIONS)
    rows = [envs.reset(), *(envs.step(np.zeros(2, np.int64)) for _ in range(4))]
    assert {k: v.shape for k, v in rows[0].items() if k in envs.obs_space.spaces} == {
        "image": (2, 64, 64, 3),
        "compass": (2, 1),
        "inventory": (2, 1),
        "max_inventory": (2, 1),
    }
    assert [row["is_terminal"][0] for row in rows] == [False, False, False, True, False]
    assert rows[3]["reward"].tolist() == [100, 100] and rows[4]["is_first"].all()
    envs.close()
    assert all(fake.closed for fake in fakes)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minerl", None)
    with pytest.raises(TaskError, match=r"minerl:navigate.*JDK 8.*pip install minerl==0\.4\.4"):
        make_envs("minerl:navigate", 1, 0)
    with pytest.raises(TaskError, match="nearest: navigate; there are navigate, navigate_dense"):
        make_envs("minerl:navigat", 1, 0)


def test_the_task_makes_the_package_s_navigate(monkeypatch):
    asked: list[dict[str, bool]] = []

    def navigate(**options: bool) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(make=FakeMineRL)

    parent = "minerl.herobraine.env_specs"
    for name in ("minerl", "minerl.herobraine", parent):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    specs = SimpleNamespace(Navigate=navigate)
    monkeypatch.setitem(sys.modules, f"{parent}.navigate_specs", specs)
    make_envs("minerl:navigate_extreme_dense", 1, 0).reset()
    assert asked == [{"dense": True, "extreme": True}]
    specs.Navigate = lambda **_: 1 / 0
    with pytest.raises(TaskError, match=r"does not start.*Java 8.*ZeroDivisionError"):
        make_envs("minerl:navigate", 1, 0)
