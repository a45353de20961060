"""Runs that are cut and go on: environments, logs, kills, full disks."""

from __future__ import annotations

import pickle
import signal
import threading
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils import EzPickle
from test_train import RECIPE_2025, TINY, Counter, curve, lines, run, tiny

from fastdreamer import checkpoint
from fastdreamer.cli import parse_config
from fastdreamer.evaluate import Options, evaluate
from fastdreamer.learner import Learner
from fastdreamer.trainer import Trainer

CARTPOLE = {
    "2023": [*TINY, "--task", "gymnasium:CartPole-v1"],
    "2025": [*RECIPE_2025, "--task", "gymnasium:CartPole-v1", "--num-envs", "2"],
}


def losses(logdir: Path) -> list[tuple]:
    return [line for line in curve(logdir) if "episode/score" not in dict(line)]


def scores(logdir: Path) -> list[tuple]:
    """(step, score, length) of each episode."""
    names = ("step", "episode/score", "episode/length")
    return [tuple(x[k] for k in names) for x in lines(logdir) if "episode/score" in x]


@pytest.mark.parametrize("recipe", CARTPOLE)
@pytest.mark.parametrize("signalled", [False, True])
def test_a_run_cut_within_episodes_equals_the_uninterrupted_one(
    tmp_path, monkeypatch, capsys, recipe, signalled
):
    """Also where a signal leaves updates over, which an episode's line then has not counted."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*CARTPOLE[recipe], "--deterministic", "--learner.replay-ratio", "1.5"]
    options += ["--checkpoint-every", "50", "--log.every", "1", "--log.no-tensorboard"]
    ended = train(options, whole, 140)
    if signalled:
        monkeypatch.setattr(Learner, "update_target", interrupting(80, Learner.update_target))
        with pytest.raises(SystemExit):
            train(options, cut, 140)
        monkeypatch.undo()
        assert checkpoint.find_all(cut / "checkpoints")[-1].info["updates"] == 80
    else:
        assert train(options, cut, 102).episodes.lengths.any()
    capsys.readouterr()
    resumed = train(options, cut, 140)
    assert "environment state" not in capsys.readouterr().out
    assert losses(whole) == losses(cut)
    assert scores(whole) == scores(cut) and len(scores(whole)) >= 4
    assert signalled or curve(whole) == curve(cut)
    assert_same(ended.agent.state_dict(), resumed.agent.state_dict())
    assert_same(ended.episodes.rows, resumed.episodes.rows)


def train(options: list[str], logdir: Path, steps: int) -> Trainer:
    args = [*options, "--logdir", str(logdir), "--steps", str(steps)]
    with Trainer(parse_config(args)) as trainer:
        trainer.run()
    return trainer


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def interrupting(count: int, method):
    """A method of the learner, with a ctrl-C within that update."""

    def spied(self):
        if self.updates == count - 1:
            signal.raise_signal(signal.SIGINT)
        method(self)

    return spied


class Machine(Counter):
    """Its camera does not pickle."""

    def __init__(self):
        self.camera = threading.Lock()


class Careful(Machine):
    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "camera"}

    def __setstate__(self, state):
        self.__dict__.update(state, camera=threading.Lock())


class Forgetful(EzPickle, Counter):
    """Pickles what it was made with."""


class Changing(Counter):
    observation_space = Counter.observation_space

    def __setstate__(self, state):
        self.__dict__.update(state, observation_space=spaces.Discrete(3))


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (Careful, ""),
        (Machine, "the environment does not pickle: TypeError: cannot pickle '_thread.lock'"),
        (lambda: gymnasium.Wrapper(Forgetful()), "Forgetful pickles its arguments only (EzPickle)"),
        (Changing, "the environment's observation_space has changed"),
        (None, "envpool does not give that of its environments"),
    ],
)
def test_what_is_not_restored_is_said(tmp_path, capsys, make, note):
    for steps in ("66", "90"):
        task = ["--task", "custom:it"] if make else []
        with Trainer(parse_config(tiny(tmp_path, *task, "--steps", steps)), make) as trainer:
            cut = list(trainer.episodes.lengths)
            trainer.run()
    notes = [line for line in capsys.readouterr().out.splitlines() if "environment state" in line]
    if note:
        assert len(notes) == 1 and notes[0].startswith("note: environment state is not restored: ")
        assert note in notes[0] and notes[0].endswith("; new episodes begin")
    else:
        assert not notes and cut == [3, 3]  # of 33 rows, 6 are of an episode


def test_checkpoints_without_environments_resume(tmp_path, capsys):
    run(tmp_path, "--steps", "70")
    (saved,) = checkpoint.find_all(tmp_path / "checkpoints")
    state = saved.load()
    del state["episodes"]
    checkpoint.save(tmp_path / "checkpoints", 70, state, saved.info)
    assert run(tmp_path, "--steps", "90").step == 90
    assert "the checkpoint is of an older version; new episodes begin" in capsys.readouterr().out


class Trap:
    sprung = False

    def __setstate__(self, state):
        Trap.sprung = True


def test_only_a_resumed_run_unpickles(tmp_path):
    train(CARTPOLE["2023"], tmp_path, 70)
    (saved,) = checkpoint.find_all(tmp_path / "checkpoints")
    state, trap = saved.load(), Trap()
    trap.x = 1
    state["episodes"]["envs"] = torch.frombuffer(bytearray(pickle.dumps(trap)), dtype=torch.uint8)
    checkpoint.save(tmp_path / "checkpoints", 70, state, saved.info)
    evaluate(Options(tmp_path, episodes=1))
    assert not Trap.sprung
    train(CARTPOLE["2023"], tmp_path, 90)
    assert Trap.sprung
