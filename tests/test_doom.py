"""ViZDoom through envpool: options, rewards, seeds, and games that start together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces

from fastdreamer.cli import parse_config
from fastdreamer.envs import EnvOptions, TaskError, make_envs
from fastdreamer.envs.doom import doom_reward, doom_terminal
from fastdreamer.plan import total_updates
from fastdreamer.trainer import Trainer

HOME = "envpool:MyWayHome-v1"


def start(seed: int, num_envs: int, steps: int = 10) -> np.ndarray:
    env = make_envs(HOME, num_envs, seed)
    rows = [env.reset(), *(env.step(np.full(num_envs, 3)) for _ in range(steps))]
    env.close()
    return np.stack([row["image"] for row in rows])


def test_three_games_start_together_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = make_envs(HOME, 3, 0, EnvOptions(image_size=32))
    assert env.obs_space == spaces.Dict({"image": spaces.Box(0, 255, (32, 32, 3), np.uint8)})
    assert env.act_space == spaces.Discrete(18)
    row = env.reset()
    assert row["image"].shape == (3, 32, 32, 3) and row["image"].std() > 5
    env.close()
    env.close()
    assert not list(tmp_path.iterdir())


def test_a_truncated_episode_costs_its_tics():
    env = make_envs(HOME, 1, 0, EnvOptions(max_episode_frames=80, action_repeat=8))
    rows = [env.reset(), *(env.step(np.zeros(1, np.int64)) for _ in range(11))]
    assert [int(row["is_last"][0]) for row in rows] == [0] * 10 + [1, 0]
    assert not any(row["is_terminal"][0] for row in rows)
    np.testing.assert_allclose([row["reward"][0] for row in rows], [0] + [-8e-4] * 10 + [0])
    env.close()


def test_the_goal_is_worth_one():
    given, ended = np.array([0.5, 0.0]), np.array([True, False])
    np.testing.assert_allclose(doom_reward("MyWayHome-v1", given, ended, 4), [0.9996, -0.0004])
    assert doom_reward("D2Navigation-v1", given, ended, 4) is given


def test_the_goal_in_the_last_step_is_terminal():
    ends = np.array([True, False, False]), np.array([False, True, True])
    armour = {"ARMOR": np.array([0.0, 100.0, 0.0])}
    assert doom_terminal("MyWayHome-v1", *ends, armour).tolist() == [True, True, False]
    assert doom_terminal("D2Navigation-v1", *ends, armour) is ends[0]


def test_seeds():
    two = start(3, 2)
    np.testing.assert_array_equal(two, start(3, 2))
    np.testing.assert_array_equal(two[:, 1:], start(4, 1))
    assert (two[:, 0] != two[:, 1]).any()


@pytest.mark.parametrize("name", ["Cig-v1", "MultiDuel-v1", "VizdoomCustom-v1"])
def test_tasks_that_crash_are_refused(name):
    with pytest.raises(TaskError, match=f"'{name}' is not supported"):
        make_envs(f"envpool:{name}", 1, 0)


def test_preset_learns(tmp_path):
    short = "--num-envs 2 --steps 120 --learner.prefill 40 --learner.batch-length 20 --threads 1"
    options = ["--preset", "vizdoom", "--logdir", str(tmp_path), "--log.no-progress"]
    config = parse_config([*options, *short.split(), "--log.every", "1"])
    with Trainer(config) as trainer:
        trainer.run()
    losses = [
        x for x in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "entropy" in str(x)
    ]
    assert len(losses) == trainer.learner.updates == total_updates(config, 120)
    assert all(np.isfinite(value) for line in losses for value in line.values())
