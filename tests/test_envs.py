"""Environments: the Atari protocol to the byte, Dreamer's row conventions, names and seeds."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

from fastdreamer.envs import EnvOptions, TaskError, make_envs
from fastdreamer.envs.base import check_action
from fastdreamer.envs.control import dmc_tasks, find_dmc
from fastdreamer.envs.observe import Observer
from fastdreamer.envs.pool import find_atari
from fastdreamer.reference import FOLDER

FLAGS = ("is_first", "is_last", "is_terminal")


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


# Atari -----------------------------------------------------------------------------------------


class Emulator:
    """The published Atari protocol, spelled out with ale-py."""

    def __init__(self, game: str) -> None:
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(game))
        self.actions = self.ale.getMinimalActionSet()

    def reset(self, noops: int) -> np.ndarray:
        self.ale.reset_game()
        for _ in range(noops):
            self.ale.act(0)
        return self.ale.getScreenRGB()

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        reward, frames = 0.0, []
        for _ in range(4):
            reward += self.ale.act(self.actions[action])
            frames.append(self.ale.getScreenRGB())
            if self.ale.game_over():
                break
        return np.maximum(*frames[-2:]) if len(frames) > 1 else frames[0], reward, len(frames) < 4


@pytest.mark.parametrize("game", ["ms_pacman", "breakout"])
def test_atari_equals_ale_py(game: str) -> None:
    emulator, rng = Emulator(game), np.random.default_rng(0)
    env = make_envs(game, 1, 0, EnvOptions(noop_max=1))
    raw: list[np.ndarray] = []
    observe = env._observe
    env._observe = lambda obs: raw.append(obs[0].transpose(1, 2, 0)) or observe(obs)
    assert env.action_names == [action.name for action in emulator.actions]
    frame, total, cut = emulator.reset(1), 0.0, False
    row = env.reset()
    for _ in range(700):
        if not cut:  # a game that ends before the skip does leaves an older frame in envpool
            np.testing.assert_array_equal(raw[-1], frame)
            np.testing.assert_array_equal(row["image"][0], pillow(frame, 64, 64))
        action = int(rng.integers(len(emulator.actions)))
        if row["is_last"][0]:
            frame, reward, cut = emulator.reset(1), 0.0, False
        else:
            frame, reward, cut = emulator.step(action)
        row = env.step(np.array([action]))
        assert row["reward"][0] == reward
        total += reward
    assert total > 0
    env.close()


def test_atari_truncation_is_not_terminal() -> None:
    env = make_envs("pong", 2, 0, EnvOptions(max_episode_frames=40))
    rows = [env.reset(), *(env.step(np.zeros(2, np.int64)) for _ in range(22))]
    for key, expected in {"is_first": [0, 11, 22], "is_last": [10, 21], "is_terminal": []}.items():
        flags = np.stack([row[key] for row in rows])
        assert np.flatnonzero(flags[:, 0]).tolist() == expected, key
        assert (flags[:, 0] == flags[:, 1]).all()
    env.close()


def test_atari_game_over_is_terminal_and_rewards_are_raw() -> None:
    env = make_envs("ms_pacman", 1, 0, EnvOptions())
    rng, rows = np.random.default_rng(0), [env.reset()]
    while not rows[-1]["is_last"][0]:
        rows.append(env.step(rng.integers(0, 9, 1)))
    assert rows[-1]["is_terminal"][0]
    assert max(row["reward"][0] for row in rows) >= 10
    after = env.step(np.zeros(1, np.int64))
    assert after["is_first"][0] and not after["is_last"][0] and after["reward"][0] == 0
    env.close()


def test_noops_are_drawn_from_1_to_noop_max() -> None:
    emulator = Emulator("ms_pacman")
    count = {emulator.reset(n).tobytes(): n for n in range(40, -1, -1)}
    env = make_envs("ms_pacman", 16, 0, EnvOptions(noop_max=5, max_episode_frames=4))
    seen: set[int] = set()
    env._observe = lambda obs: seen.update(count[x.transpose(1, 2, 0).tobytes()] for x in obs) or {}
    for _ in range(4):
        env.reset()
    earliest = {count[emulator.reset(n).tobytes()] for n in range(1, 6)}
    assert seen == earliest
    env.close()


def test_full_action_space_and_life_loss() -> None:
    env = make_envs("breakout", 1, 0, EnvOptions(full_action_space=True, episodic_life=True))
    assert env.act_space == spaces.Discrete(18)
    assert env.action_names is not None and env.action_names[:3] == ["NOOP", "FIRE", "UP"]
    row, lengths, length = env.reset(), [], 0
    while len(lengths) < 3:
        row = env.step(np.array([1]))
        length += 1
        if row["is_last"][0]:
            assert row["is_terminal"][0]
            lengths.append(length)
            length = 0
    assert max(lengths) < 100
    env.close()


# DeepMind Control ------------------------------------------------------------------------------


def wander(env: Any, steps: int) -> list[dict[str, np.ndarray]]:
    rng, rows = np.random.default_rng(0), [env.reset()]
    for _ in range(steps):
        rows.append(env.step(rng.uniform(-1, 1, (env.num_envs, *env.act_space.shape))))
    return rows


def test_every_dmc_task_has_a_name() -> None:
    from envpool.registration import registry

    ids = {task for task, spec in registry.specs.items() if "dmc" in spec[0]}
    assert len(ids) >= 51 and set(dmc_tasks().values()) == ids
    for name, task in dmc_tasks().items():
        assert find_dmc(f"dmc_{name}") == find_dmc(f"dmc:{task}") == task
    assert dmc_tasks()["ball_in_cup_catch"] == find_dmc("dmc_cup_catch") == "BallInCupCatch-v1"
    assert find_dmc("dmc_humanoid_CMU_run") == "HumanoidCMURun-v1"
    assert find_dmc("walker_walk") is None


with gzip.open(FOLDER / "scores/dmc_proprio-dreamerv3.json.gz", "rt") as curves:
    WITH_CURVES = sorted({row["task"] for row in json.load(curves)})


@pytest.mark.parametrize("task", [*WITH_CURVES, "dmc_manipulator_bring_ball"])
def test_dmc_spaces(task: str) -> None:
    env = make_envs(task, 2, 0, EnvOptions())
    assert not env.is_atari and (env.act_space.low == -1).all() and (env.act_space.high == 1).all()
    env.reset()
    row = env.step(np.zeros((2, *env.act_space.shape)))
    for key, space in env.obs_space.spaces.items():
        assert len(space.shape) == 1 and row[key].dtype == space.dtype == np.float32
        assert row[key].shape == (2, *space.shape) and np.isfinite(row[key]).all()
    env.close()


@pytest.mark.parametrize(("repeat", "length"), [(1, 1000), (2, 500), (3, 334)])
def test_dmc_episodes_have_1000_frames_and_are_truncated(repeat: int, length: int) -> None:
    env = make_envs("dmc_reacher_easy", 2, 0, EnvOptions(dmc_repeat=repeat))
    rows = wander(env, length + 1)
    first, last = (np.stack([row[key] for row in rows]) for key in ("is_first", "is_last"))
    assert np.flatnonzero(first.all(1)).tolist() == [0, length + 1] and first.sum() == 4
    assert np.flatnonzero(last.all(1)).tolist() == [length] and last.sum() == 2
    assert not any(row["is_terminal"].any() for row in rows)
    assert (rows[-1]["reward"] == 0).all()
    env.close()


def test_dmc_rewards_are_summed_over_the_frames_of_a_step() -> None:
    single = make_envs("dmc_cartpole_balance", 3, 5, EnvOptions(dmc_repeat=1))
    double = make_envs("dmc:cartpole_balance", 3, 5, EnvOptions())
    ones, twos, rng = [single.reset()], [double.reset()], np.random.default_rng(0)
    for _ in range(505):
        action = rng.uniform(-1, 1, (3, 1))
        for _ in range(1 if ones[-1]["is_last"].any() else 2):
            ones.append(single.step(action))
        twos.append(double.step(action))
    frames = [*range(0, 1001, 2), *range(1001, 1010, 2)]  # the reset takes one frame of either
    for row, frame in zip(twos, frames, strict=True):
        for key in ("is_last", "is_first", *double.obs_space.spaces):
            np.testing.assert_array_equal(row[key], ones[frame][key])
        alone = ones[frame]["is_first"].any()
        both = ones[frame]["reward"] + (0 if alone else ones[frame - 1]["reward"])
        np.testing.assert_allclose(row["reward"], both)
    assert sum(row["reward"][0] for row in twos[:501]) > 100


def test_frame_skip_of_envpool_drops_rewards() -> None:
    """Why frames are stepped one by one; where this fails, envpool has learned to sum."""
    import envpool

    def score(skip: int) -> float:
        env = envpool.make("CartpoleBalance-v1", env_type="gymnasium", seed=0, frame_skip=skip)
        env.reset()
        return sum(float(env.step(np.zeros((1, 1)))[1][0]) for _ in range(60 // skip))

    assert score(1) > 30
    np.testing.assert_allclose(score(2), score(1) / 2, rtol=0.1)


def test_an_environment_that_ends_alone_does_not_hold_the_others_up() -> None:
    env = make_envs("dmc_reacher_easy", 2, 0, EnvOptions(dmc_repeat=7))
    pool, stepped = env._pool, []

    class Ending:
        """Environment 1 ends at the third frame; every reward is 1."""

        def step(self, action: np.ndarray, ids: np.ndarray | None = None) -> Any:
            stepped.append([0, 1] if ids is None else ids.tolist())
            obs, reward, terminated, truncated, info = pool.step(action, ids)
            reward[:] = 1.0
            terminated[:] = np.array(stepped[-1]) == (1 if len(stepped) == 3 else -1)
            return obs, reward, terminated, truncated, info

    env.reset()
    env._pool = Ending()
    row = env.step(np.zeros((2, 2)))
    assert stepped == [[0, 1]] * 3 + [[0]] * 4
    assert row["reward"].tolist() == [7, 3] and row["is_terminal"].tolist() == [False, True]
    stepped[:] = [[]] * 3
    row = env.step(np.zeros((2, 2)))  # the one resets by a frame, the other goes on
    assert stepped[3:] == [[0, 1]] + [[0]] * 6
    assert row["reward"].tolist() == [7, 0] and row["is_first"].tolist() == [False, True]
    pool.close()


def test_dmc_seeds() -> None:
    def start(task: str, count: int, seed: int) -> np.ndarray:
        return make_envs(task, count, seed, EnvOptions()).reset()["to_target"]

    one = start("dmc_reacher_easy", 2, 1)
    np.testing.assert_array_equal(one, start("envpool:ReacherEasy-v1", 2, 1))
    np.testing.assert_array_equal(one[1], start("dmc_reacher_easy", 1, 2)[0])
    assert (one[0] != one[1]).any()


os.environ.setdefault("MUJOCO_GL", "egl")  # before anything imports dm_control

STATES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "cartpole_swingup": lambda obs: (
        [obs["position"][0], np.arctan2(obs["position"][2], obs["position"][1])],
        obs["velocity"],
    ),
    "point_mass_easy": lambda obs: (obs["position"], obs["velocity"]),
    "cheetah_run": lambda obs: ([0.0, *obs["position"]], obs["velocity"]),
}
"""The simulation's positions and velocities from a first observation."""


@pytest.mark.parametrize("task", STATES)
def test_dmc_equals_dm_control(task: str) -> None:
    suite = pytest.importorskip("dm_control.suite")
    env = make_envs(f"dmc_{task}", 1, 0, EnvOptions(dmc_repeat=1))
    official, rng = suite.load(*task.rsplit("_", 1)), np.random.default_rng(0)
    row, now, total = env.reset(), official.reset(), 0.0
    with official.physics.reset_context():
        state = STATES[task]({key: row[key][0].astype(np.float64) for key in env.obs_space})
        official.physics.data.qpos[:], official.physics.data.qvel[:] = state
    for _ in range(100):
        action = rng.uniform(-1, 1, (1, *env.act_space.shape))
        row, now = env.step(action), official.step(action[0])
        np.testing.assert_allclose(row["reward"][0], now.reward, atol=1e-3)
        for key, value in now.observation.items():
            np.testing.assert_allclose(row[key][0], value, atol=1e-2, rtol=1e-2)
        total += now.reward
    assert total > 0


@pytest.fixture
def picture() -> None:
    """Skips where dm_control is not installed, or finds no OpenGL to draw by."""
    pytest.importorskip("dm_control")
    code = (
        "from dm_control import suite;"
        "suite.load('reacher', 'easy').physics.render(8, 8, camera_id=0)"
    )
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
        pytest.skip("dm_control cannot draw by OpenGL here")


@pytest.mark.usefixtures("picture")
def test_dmc_images() -> None:
    options = EnvOptions(dmc_images=True, image_size=32, dmc_repeat=50)
    env = make_envs("dmc_cup_catch", 2, 0, options)
    assert env.obs_space == spaces.Dict({"image": spaces.Box(0, 255, (32, 32, 3), np.uint8)})
    assert env.act_space == spaces.Box(-1, 1, (2,), np.float32) and env.frames == 50
    rows = wander(env, 21)
    last = [bool(row["is_last"].all()) for row in rows]
    assert last == [False] * 20 + [True, False] and rows[-1]["is_first"].all()
    assert not any(row["is_terminal"].any() for row in rows)
    assert rows[0]["image"].std() > 10 and (rows[0]["image"] != rows[10]["image"]).any()
    again = make_envs("dmc:ball_in_cup_catch", 2, 0, options).reset()["image"]
    np.testing.assert_array_equal(again, rows[0]["image"])
    assert (again[0] != again[1]).any()
    with pytest.raises(TaskError, match="no task 'cup_catsh'; nearest: dmc_ball_in_cup_catch"):
        make_envs("dmc_cup_catsh", 1, 0, options)
    env.close()


@pytest.mark.usefixtures("picture")
def test_dmc_images_sum_the_rewards_of_a_step() -> None:
    def score(repeat: int) -> float:
        options = EnvOptions(dmc_images=True, image_size=8, dmc_repeat=repeat)
        env = make_envs("dmc_cartpole_balance", 1, 0, options)
        env.reset()
        rows = [env.step(np.full((1, 1), 0.1)) for _ in range(20 // repeat)]
        return sum(row["reward"][0] for row in rows)

    assert score(1) > 5
    np.testing.assert_allclose(score(2), score(1), rtol=1e-6)


def test_crafter() -> None:
    pytest.importorskip("crafter")
    env = make_envs("crafter_reward", 2, 3, EnvOptions())
    assert env.obs_space == spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)})
    assert env.act_space == spaces.Discrete(17) and env.action_names is not None
    assert env.action_names[:2] == ["noop", "move_left"]
    rows = play(env, 400)
    for row in rows:
        assert (row["is_last"] == row["is_terminal"]).all()  # no time limit within 400 steps
    rewards = np.stack([row["reward"] for row in rows])
    assert rewards.max() > 0.8 and np.abs(10 * rewards - np.rint(10 * rewards)).max() < 1e-4
    again = play(make_envs("crafter:reward", 2, 3, EnvOptions()), 50)
    np.testing.assert_array_equal(again[-1]["image"], rows[50]["image"])
    assert (rows[0]["image"][0] != rows[0]["image"][1]).any()
    silent = play(make_envs("crafter_noreward", 1, 3, EnvOptions()), 300)
    assert not any(row["reward"].any() for row in silent)


def test_crafter_tells_its_achievements_where_an_episode_ends() -> None:
    pytest.importorskip("crafter")
    env, rng = make_envs("crafter_reward", 1, 0, EnvOptions()), np.random.default_rng(0)
    row, score = env.reset(), 0.0
    while not row["is_last"][0]:
        assert not env.logged[0]
        row = env.step(rng.integers(0, 17, 1))
        score += float(row["reward"][0])
    counts = env.logged[0]
    assert len(counts) == 22 and all(name.startswith("achievement_") for name in counts)
    # All that is rewarded: first times, and health, which ends at 0 of 9.
    np.testing.assert_allclose(sum(n > 0 for n in counts.values()) - 0.9, score, atol=1e-4)
    env.step(np.zeros(1, np.int64))
    env.step(np.zeros(1, np.int64))
    assert not env.logged[0]


# Row conventions, both engines -----------------------------------------------------------------


def play(env: Any, steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng, rows = np.random.default_rng(seed), [env.reset()]
    for _ in range(steps):
        rows.append(env.step(rng.integers(0, env.act_space.n, env.num_envs)))
    return rows


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    "task", ["envpool:CartPole-v1", "gymnasium:CartPole-v1", "envpool:Catch-v0"]
)
def test_row_conventions(task: str, num_envs: int) -> None:
    env = make_envs(task, num_envs, 0, EnvOptions())
    rows = play(env, 120)
    for row in rows:
        assert row["reward"].dtype == np.float32 and row["reward"].shape == (num_envs,)
        assert all(row[key].dtype == bool and row[key].shape == (num_envs,) for key in FLAGS)
        for key, space in env.obs_space.spaces.items():
            assert row[key].shape == (num_envs, *space.shape) and row[key].dtype == space.dtype
        assert (row["reward"][row["is_first"]] == 0).all()
        assert not (row["is_first"] & row["is_last"]).any()
        assert (row["is_last"] == row["is_terminal"]).all()  # no time limit within 120 steps
    first, last = (np.stack([row[key] for row in rows]) for key in ("is_first", "is_last"))
    assert first[0].all() and last.any(0).all()
    np.testing.assert_array_equal(first[1:], last[:-1])
    env.close()


def test_engines_agree_on_rewards_of_cartpole() -> None:
    for task in ("envpool:CartPole-v1", "gymnasium:CartPole-v1"):
        rows = play(make_envs(task, 1, 0, EnvOptions()), 60)
        assert all(row["reward"][0] == (0 if row["is_first"][0] else 1) for row in rows)


@pytest.mark.parametrize("task", ["envpool:CartPole-v1", "gymnasium:CartPole-v1", "ms_pacman"])
def test_seeds(task: str) -> None:
    def frames(seed: int) -> np.ndarray:
        env = make_envs(task, 2, seed, EnvOptions(max_episode_frames=80))
        (key,) = env.obs_space.spaces
        return np.stack([row[key] for row in play(env, 60)])

    one = frames(1)
    np.testing.assert_array_equal(one, frames(1))
    assert (one != frames(3)).any()
    assert (one[:, 0] != one[:, 1]).any()
    (key,) = make_envs(task, 1, 0, EnvOptions()).obs_space.spaces
    second, alone = make_envs(task, 2, 7, EnvOptions()), make_envs(task, 1, 8, EnvOptions())
    np.testing.assert_array_equal(second.reset()[key][1], alone.reset()[key][0])


@pytest.mark.parametrize("task", ["envpool:CartPole-v1", "gymnasium:CartPole-v1"])
def test_episodes_differ_and_rows_are_not_overwritten(task: str) -> None:
    env = make_envs(task, 1, 0, EnvOptions())
    rows = play(env, 100)
    starts = [row["vector"][0].tobytes() for row in rows if row["is_first"][0]]
    assert len(starts) >= 3 and len(set(starts)) == len(starts)
    again = env.reset()
    assert again["is_first"].all() and again["vector"][0].tobytes() not in starts
    assert starts == [row["vector"][0].tobytes() for row in rows if row["is_first"][0]]


def test_the_action_on_an_is_last_row_is_discarded() -> None:
    def start(task: str, action: int) -> bytes:
        env = make_envs(task, 1, 0, EnvOptions())
        row = env.reset()
        while not row["is_last"][0]:
            row = env.step(np.array([0]))
        return env.step(np.array([action]))["vector"].tobytes()

    for task in ("envpool:CartPole-v1", "gymnasium:CartPole-v1"):
        assert start(task, 0) == start(task, 1)


# Observations and actions ----------------------------------------------------------------------


class Robot(gymnasium.Env[dict[str, Any], int]):
    """A camera, a nested dict of sensors, actions from 1, and a time limit of 4 steps."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (20, 30, 3), np.uint8),
            "sensors": spaces.Dict(
                {
                    "speed": spaces.Box(-1, 1, (), np.float64),
                    "gear": spaces.Discrete(3, start=1),
                    "joints": spaces.Box(-1, 1, (2,), np.float64),
                }
            ),
        }
    )
    action_space = spaces.Discrete(2, start=1)
    t = 0

    def observe(self) -> dict[str, Any]:
        speed = np.float64(self.t / 10)
        camera = np.full((20, 30, 3), 10 * self.t, np.uint8)
        sensors = {"speed": speed, "gear": 1 + self.t % 3, "joints": np.array([speed, 1.0])}
        return {"camera": camera, "sensors": sensors}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.t += 1
        return self.observe(), float(action), False, self.t == 4, {}


@pytest.mark.parametrize("num_envs", [1, 3])
def test_dict_observations_from_a_factory(num_envs: int) -> None:
    env = make_envs(Robot, num_envs, 0, EnvOptions(image_size=32))
    shapes = {name: space.shape for name, space in env.obs_space.spaces.items()}
    assert list(shapes) == ["camera", "sensors/gear", "sensors/joints", "sensors/speed"]
    assert list(shapes.values()) == [(32, 32, 3), (3,), (2,), (1,)]
    assert env.act_space == spaces.Discrete(2)
    rows = [env.reset(), *(env.step(np.ones(num_envs, np.int64)) for _ in range(5))]
    assert (rows[2]["camera"] == 20).all() and rows[2]["camera"].shape == (num_envs, 32, 32, 3)
    assert rows[2]["sensors/gear"].tolist() == [[0.0, 0.0, 1.0]] * num_envs
    assert rows[2]["sensors/speed"].dtype == np.float32
    np.testing.assert_allclose(rows[2]["sensors/joints"], [[0.2, 1.0]] * num_envs)
    assert [row["reward"][0] for row in rows] == [0, 2, 2, 2, 2, 0]
    assert [bool(row["is_last"][0]) for row in rows] == [False] * 4 + [True, False]
    assert not any(row["is_terminal"].any() for row in rows)
    assert rows[5]["is_first"].all() and (rows[5]["camera"] == 0).all()


def test_catch_is_a_board_enlarged_to_an_image() -> None:
    env = make_envs("envpool:Catch-v0", 2, 0, EnvOptions())
    assert env.obs_space == spaces.Dict({"image": spaces.Box(0, 255, (64, 64, 1), np.uint8)})
    image = env.reset()["image"]
    assert set(np.unique(image)) == {0, 255}
    cells = image[0, ::7, ::13, 0]
    assert (cells == 255).sum() == 2  # the ball and the paddle


def test_grey_frames_are_resized_smoothly_and_boards_are_not() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 84, 84), np.uint8)
    image = Observer(spaces.Box(0, 255, (84, 84), np.uint8), 64)(frames)["image"]
    np.testing.assert_array_equal(image[1, ..., 0], pillow(frames[1], 64, 64))
    board = np.array([[[0, 4], [2, 0]]], np.uint8)
    image = Observer(spaces.Box(0, 4, (2, 2), np.uint8), 4)(board)["image"]
    assert image[0, ::2, ::2, 0].tolist() == [[0, 255], [128, 0]]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-1, 1, (4, 4, 3), np.float32), r"'observation' is not supported: Box\(-1.0"),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Text(5)})}), "'a/b' is not supported: Text"),
        (spaces.Box(0, 2, (4, 4), np.int64), "not supported"),
        (spaces.Tuple([spaces.Discrete(2)]), "not supported"),
        (spaces.Dict({"reward": spaces.Discrete(2)}), "'reward' is reserved"),
    ],
)
def test_unsupported_observations_are_named(space: gymnasium.Space[Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        Observer(space, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["envpool:CartPole-v1", "gymnasium:CartPole-v1"])
@pytest.mark.parametrize(
    "action",
    [np.array([0]), np.zeros((2, 1), int), np.zeros(2), np.array([0, 2]), np.array([-1, 0])],
)
def test_wrong_actions_are_refused(task: str, action: np.ndarray) -> None:
    env = make_envs(task, 2, 0, EnvOptions())
    env.reset()
    with pytest.raises(ValueError, match="action must"):
        env.step(action)


@pytest.mark.parametrize("task", ["envpool:Pendulum-v1", "gymnasium:Pendulum-v1"])
def test_continuous_actions_pass_through(task: str) -> None:
    env = make_envs(task, 2, 0, EnvOptions())
    assert env.act_space.shape == (1,) and env.action_names is None
    env.reset()
    assert env.step(np.ones((2, 1)))["vector"].shape == (2, 3)
    both = spaces.Dict({"move": env.act_space, "gear": spaces.MultiDiscrete([2, 3])})
    checked = check_action({"move": np.ones((2, 1)), "gear": np.ones((2, 2), int)}, both, 2)
    assert set(checked) == {"move", "gear"}


# Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ms_pacman", "MsPacman", "MsPacman-v5", "mspacman"])
def test_atari_names(name: str) -> None:
    assert find_atari(name) == "MsPacman-v5"


def test_every_spelling_makes_the_same_atari() -> None:
    spellings = ("ms_pacman", "atari:ms_pacman", "atari:MsPacman", "envpool:MsPacman-v5")
    envs = [make_envs(task, 1, 0, EnvOptions()) for task in spellings]
    first = [env.reset()["image"] for env in envs]
    assert all((image == first[0]).all() for image in first)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("ms_pacmann", "unknown task 'ms_pacmann'; nearest: ms_pacman, .*atari:.*envpool:ID"),
        ("CartPole-v1", "nearest: envpool:CartPole-v1, gymnasium:CartPole-v1"),
        ("atari:ponk", "nearest: pong"),
        ("dmc_walker_wlk", "no task 'walker_wlk'; nearest: dmc_walker_walk"),
        ("dmc:reachr_easy", "no task 'reachr_easy'; nearest: dmc_reacher_easy"),
        ("walker_walk", "unknown task 'walker_walk'; nearest: dmc_walker_walk"),
        ("envpool:CartPol-v1", "envpool has no task 'CartPol-v1'; nearest: CartPole-v1"),
        ("gymnasium:CartPol-v1", "gymnasium cannot make 'CartPol-v1'.*nearest: CartPole-v1"),
        ("dmlab:maze", "unknown task 'dmlab:maze'"),
        ("", "unknown task ''"),
    ],
)
def test_unknown_tasks_name_the_nearest(task: str, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        make_envs(task, 1, 0, EnvOptions())
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(TaskError, match="pip install envpool envpool-assets"):
        make_envs("envpool:CartPole-v1", 1, 0, EnvOptions())


def test_missing_game_files_are_named(tmp_path: Any) -> None:
    code = (
        "from fastdreamer.envs import TaskError, make_envs\n"
        "try: make_envs('pong', 1, 0)\n"
        "except TaskError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ENVPOOL_ASSETS_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install envpool envpool-assets" in done.stdout


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("action_repeat", 0),
        ("noop_max", 0),
        ("dmc_repeat", 0),
        ("sticky", 1.5),
        ("max_episode_frames", 3),
        ("num_threads", -1),
    ],
)
def test_options_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(TaskError, match=field):
        EnvOptions(**{field: value})


def test_bad_factories_and_counts() -> None:
    with pytest.raises(TaskError, match=r"must return a gymnasium\.Env, got int"):
        make_envs(lambda: 3, 1, 0, EnvOptions())  # type: ignore[arg-type,return-value]
    with pytest.raises(TaskError, match="at least 1"):
        make_envs("pong", 0, 0, EnvOptions())
