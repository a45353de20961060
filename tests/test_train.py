"""Whole runs: files, repeatability, resume, signals."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastdreamer
from fastdreamer import checkpoint, plan
from fastdreamer.cli import parse_config
from fastdreamer.config import PRESETS, SIZES
from fastdreamer.errors import UsageError, UserError
from fastdreamer.kernels import library
from fastdreamer.loading import load_agent
from fastdreamer.replay import Replay
from fastdreamer.staging import WriteBack
from fastdreamer.trainer import Trainer

# 8 x 8 windows of 16 x 16 pictures, an update every other step after 64.
TINY = [
    *("--preset", "demo", "--size", "debug", "--env.image-size", "16", "--num-envs", "2"),
    *("--learner.batch-size", "8", "--learner.batch-length", "8", "--learner.horizon", "5"),
    *("--learner.prefill", "64", "--learner.replay-ratio", "0.5", "--eval-episodes", "0"),
    *("--log.every", "1", "--log.no-progress", "--log.no-tensorboard"),
]


def tiny(logdir: Path, *args: str) -> list[str]:
    return [*TINY, "--logdir", str(logdir), *args]


def lines(logdir: Path) -> list[dict]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


def curve(logdir: Path) -> list[tuple]:
    """Every logged number that does not depend on the clock."""
    clock = ("time", "updates_per_second", "env_steps_per_second", "checkpoint/stall_seconds")
    found = ({k: v for k, v in line.items() if k not in clock} for line in lines(logdir))
    return [tuple(sorted(line.items())) for line in found if len(line) > 2]


def run(logdir: Path, *args: str) -> Trainer:
    with Trainer(parse_config(tiny(logdir, *args))) as trainer:
        trainer.run()
    return trainer


def test_same_seed_same_curve(tmp_path):
    """Over 50 updates, and another seed gives another curve."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, "--steps", "164", "--seed", str(seed))
    a, b, c = (curve(tmp_path / name) for name in "abc")
    assert sum("loss/world_model" in dict(line) for line in a) == 50
    assert a == b
    assert a != c


def test_run_directory(tmp_path):
    trainer = run(tmp_path, "--steps", "100", "--log.tensorboard", "--log.video-every", "90")
    names = {p.name for p in tmp_path.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "replay"} <= names
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "loss/world_model" in events.Tags()["scalars"]
    (dream,) = events.Images("dream")
    assert dream.step == 90
    assert len(iio.imread(dream.encoded_image_string)) >= 8
    assert len(checkpoint.find_all(tmp_path / "checkpoints")) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["learner"]["horizon"] == 5
    losses = [line for line in lines(tmp_path) if "loss/world_model" in line]
    assert {"step", "updates", "time", "env_steps_per_second", "updates_per_second"} <= set(
        losses[-1]
    )
    assert losses[-1]["updates"] == trainer.learner.updates == 18  # (100 - 64) / 2
    assert {"episode/score", "episode/length"} <= set().union(*lines(tmp_path))
    assert all(np.isfinite(v) for line in losses for v in line.values())


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_train_ratio_is_exact(tmp_path, ratio):
    trainer = run(tmp_path, "--steps", "84", "--learner.replay-ratio", str(ratio))
    assert trainer.learner.updates == int(ratio * 20)
    steps = [line for line in lines(tmp_path) if "loss/world_model" in line]
    for line in steps:
        assert line["updates"] <= ratio * (line["step"] - 64) < line["updates"] + 2 * ratio + 1


class Counter(gymnasium.Env):
    """Deterministic and restorable: its state is a function of the number of resets and steps."""

    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (16, 16, 3), np.uint8), "vector": spaces.Box(-9, 9, (2,))}
    )
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        return self._observe(), float(action == 1), False, self.t >= 5, {}

    def _observe(self):
        image = np.full((16, 16, 3), 40 * self.t, np.uint8)
        return {"image": image, "vector": np.array([self.t, -self.t], np.float32)}


def test_own_environment_with_dict_observations(tmp_path):
    result = fastdreamer.train(Counter, *tiny(tmp_path), steps=100)
    assert result.scores
    assert lines(tmp_path)[-1]["step"] == 100


RECIPE_2025 = [
    *("--preset", "atari100k-2025", "--size", "debug", "--learner.batch-size", "4"),
    *("--learner.batch-length", "8", "--learner.horizon", "5", "--learner.prefill", "40"),
    *("--learner.replay-ratio", "0.5", "--log.every", "1", "--log.no-progress"),
]


@pytest.mark.parametrize("task", ["gymnasium:CartPole-v1", "gymnasium:Pendulum-v1"])
def test_recipe_2025_runs_rewrites_latents_and_resumes(tmp_path, monkeypatch, task):
    written = []
    write = Replay.write

    def spy(self, name, step_ids, values):
        written.append((name, tuple(step_ids.shape)))
        index = np.array([[0, int(step_ids[-1, 0])]])  # where rows overlap the last one stays
        before = self.gather(index, 8)[name][0]
        write(self, name, step_ids, values)
        after = self.gather(index, 8)[name][0]
        assert torch.equal(after, values[-1])
        assert name == "stoch" or not torch.equal(after, before)

    monkeypatch.setattr(Replay, "write", spy)
    for steps, updates in ((56, 8), (64, 12)):
        args = [*RECIPE_2025, "--logdir", str(tmp_path), "--task", task, "--steps", str(steps)]
        with Trainer(parse_config(args)) as trainer:
            trainer.run()
        assert trainer.learner.updates == updates
    assert written == [("deter", (4, 8)), ("stoch", (4, 8))] * 12
    losses = [line for line in lines(tmp_path) if "loss/total" in line]
    assert [line["updates"] for line in losses] == list(range(1, 13))
    assert all(np.isfinite(v) for line in losses for v in line.values())


def test_updates_in_a_row_see_what_the_one_before_rewrote(tmp_path, monkeypatch):
    """As if each were written before the next batch is drawn, and not so without the amendment."""
    options = [*RECIPE_2025, "--task", "gymnasium:CartPole-v1", "--learner.replay-ratio", "3"]
    options += ["--steps", "50", "--seed", "2", "--learner.warmup", "0", "--learner.lr", "1e-2"]
    curves, finish = [], WriteBack.finish
    for name in ("overlapped", "strict", "stale"):
        if name != "overlapped":
            monkeypatch.setattr(WriteBack, "amend", lambda self, batch: None)
        written_at_once = lambda self, keep=0: finish(self)  # noqa: E731
        monkeypatch.setattr(WriteBack, "finish", written_at_once if name == "strict" else finish)
        with Trainer(parse_config([*options, "--logdir", str(tmp_path / name)])) as trainer:
            trainer.run()
        assert trainer.learner.updates == 30
        curves.append(curve(tmp_path / name))
    overlapped, strict, stale = curves
    assert overlapped == strict != stale


# What the official code's presets say: recipe, train ratio (replayed steps a step), environments.
OFFICIAL = {
    "atari100k-2025": ("2025", 256, 1),
    "dmc_proprio": ("2025", 512, 16),
    "dmc_vision": ("2025", 512, 16),
    "crafter": ("2025", 512, 1),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = parse_config(["--preset", name])
    plan.check(config)
    assert config == PRESETS[name]
    if name != "vizdoom":  # its networks are its own
        assert config.model == SIZES[config.recipe][config.size]
    learner = config.learner
    ratio = learner.replay_ratio * learner.batch_size * learner.batch_length
    if name in OFFICIAL:
        assert (config.recipe, ratio, config.num_envs) == OFFICIAL[name]


class Mixed(gymnasium.Env):
    """Two vectors and an image to see; a choice, two choices and two continuous values to make."""

    observation_space = spaces.Dict(
        {
            "eye": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "joints": spaces.Box(-9, 9, (3,), np.float32),
            "touch": spaces.Box(0, 1, (2,), np.float32),
        }
    )
    action_space = spaces.Dict(
        {
            "gears": spaces.MultiDiscrete([2, 3]),
            "jump": spaces.Discrete(4),
            "move": spaces.Box(np.float32([-1, 0]), np.float32([1, 5])),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert set(action) == {"gears", "jump", "move"}
        assert all(x in range(n) for x, n in zip(action["gears"], (2, 3), strict=True))
        assert action["jump"] in range(4)
        assert -1 <= action["move"][0] <= 1 and 0 <= action["move"][1] <= 5
        self.t += 1
        return self.observation_space.sample(), float(action["jump"] == 2), False, self.t >= 7, {}


def test_recipe_2025_learns_from_mixed_observations_and_actions(tmp_path):
    args = [*RECIPE_2025, "--env.image-size", "16", "--steps", "48", "--logdir", str(tmp_path)]
    with Trainer(parse_config(args), Mixed) as trainer:
        before = {k: v.clone() for k, v in trainer.agent.named_parameters() if v.requires_grad}
        trainer.run()
        after = dict(trainer.agent.named_parameters())
    assert trainer.learner.updates == 4
    losses = [line for line in lines(tmp_path) if "loss/total" in line]
    for name in ("eye", "joints", "touch"):
        assert all(line[f"loss/{name}"] > 0 for line in losses)
    assert all(np.isfinite(v) for line in losses for v in line.values())
    heads = [k for k in before if k.startswith(("actor", "world_model.decoder"))]
    assert heads and not [k for k in heads if torch.equal(before[k], after[k])]


@pytest.mark.parametrize("side", [16, 48, 96, 128])
def test_recipe_2025_takes_images_of_many_sizes(tmp_path, side):
    args = [*RECIPE_2025, "--env.image-size", str(side), "--logdir", str(tmp_path)]
    # The first update has a learning rate of 0.
    with Trainer(parse_config([*args, "--steps", "44"]), Counter) as trainer:
        weight = next(iter(trainer.agent.world_model.encoder.parameters()))
        before = weight.clone()
        trainer.run()
    assert trainer.learner.updates == 2 and not torch.equal(weight, before)
    assert trainer.agent.obs_space["image"].shape == (side, side, 3)
    losses = [line["loss/image"] for line in lines(tmp_path) if "loss/image" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_the_function_survives_an_import_of_its_module(tmp_path):
    importlib.import_module("fastdreamer.train")
    result = fastdreamer.train("envpool:Catch-v0", *tiny(tmp_path), steps=70)
    assert result.logdir == tmp_path


def test_one_run_at_a_time_in_a_directory(tmp_path):
    with (
        Trainer(parse_config(tiny(tmp_path))),
        pytest.raises(UsageError, match="another run writes there"),
    ):
        Trainer(parse_config(tiny(tmp_path)))


@pytest.mark.parametrize("diverged", [False, True])
def test_a_broken_environment_loses_nothing(tmp_path, capsys, diverged):
    """Its error is what is reported, also where the run cannot be saved."""

    class Broken(Counter):
        def step(self, action):
            Broken.steps += 1
            if Broken.steps > 300:  # the check at the start takes 100 of them
                if diverged:
                    trainer._metrics["loss/policy"] = torch.tensor(float("nan"))
                raise OSError("the robot fell over")
            return super().step(action)

    Broken.steps = 0
    config = parse_config(tiny(tmp_path, "--steps", "500", "--log.every", "1000"))
    with Trainer(config, Broken) as trainer, pytest.raises(OSError, match="fell over"):
        trainer.run()
    saved = checkpoint.find_all(tmp_path / "checkpoints")
    assert ("note: loss/" in capsys.readouterr().out) == diverged
    assert [c.info["step"] > 150 and c.info["updates"] > 40 for c in saved] == [True] * (
        not diverged
    )


def test_a_diverged_run_keeps_its_checkpoints(tmp_path):
    run(tmp_path, "--steps", "80")
    with Trainer(parse_config(tiny(tmp_path, "--steps", "200"))) as trainer:
        trainer.agent.critic.out.bias.data.fill_(float("nan"))
        with pytest.raises(UserError, match="the run diverged"):
            trainer.run()
    (saved,) = checkpoint.find_all(tmp_path / "checkpoints")
    assert saved.info["step"] == 80


@pytest.mark.parametrize("every", ["1", "7"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, every):
    """Curve for curve, with episodes that end where the run is cut (a reset restores Counter)."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # 5 steps and 1 reset row an episode, 2 environments: an episode ends every 12 steps.
    options = ["--deterministic", "--checkpoint-every", "48", "--task", "custom:Counter"]
    options += ["--log.every", every]
    for logdir, totals in ((whole, ["192"]), (cut, ["96", "192"])):
        for steps in totals:
            config = parse_config(
                tiny(logdir, *options, "--steps", steps, "--task", "custom:Counter")
            )
            with Trainer(config, Counter) as trainer:
                trainer.run()
    assert curve(whole) == curve(cut)
    ours, theirs = (
        checkpoint.find_all(d / "checkpoints")[-1].load()["agent"] for d in (whole, cut)
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_goes_on_in_another_precision(tmp_path, capsys, monkeypatch):
    """Checkpoints hold float32, and say what the updates before them ran in."""
    monkeypatch.setattr(library, "isa", lambda: "avx512")  # where "auto" is fp32
    run(tmp_path, "--steps", "70", "--precision", "bf16")
    said = capsys.readouterr().out
    assert "\nprecision bf16, compile off, graph off\n" in said
    (saved,) = checkpoint.find_all(tmp_path / "checkpoints")
    assert all(v.dtype == torch.float32 for v in saved.load()["agent"].values())
    assert load_agent(tmp_path).bf16
    trainer = run(tmp_path, "--steps", "80")
    said = capsys.readouterr().out
    assert "precision fp32 (until step 70 bf16), compile off" in said
    assert not trainer.agent.bf16 and not load_agent(tmp_path).bf16
    assert [line["updates"] for line in lines(tmp_path) if "kl" in line] == list(range(1, 9))


def test_resume_does_not_burst(tmp_path):
    run(tmp_path, "--steps", "100")
    trainer = run(tmp_path, "--steps", "140", "--resume")
    assert trainer.learner.updates == 38
    losses = [line for line in lines(tmp_path) if "loss/world_model" in line]
    assert [line["updates"] for line in losses] == list(range(1, 39))
    for line in losses:
        assert line["updates"] in (int((line["step"] - 64) / 2), int((line["step"] - 64) / 2) + 1)


def test_other_networks_are_refused(tmp_path):
    run(tmp_path, "--steps", "70")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(checkpoint.CheckpointError, match="its model"):
        run(tmp_path, "--steps", "90", "--model.units", "32")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_capacity_below_the_run(tmp_path):
    trainer = run(tmp_path, "--steps", "160", "--capacity", "64")
    assert len(trainer.replay) == 64
    config = parse_config(tiny(tmp_path / "x", "--learner.prefill", "8"))
    with pytest.raises(UsageError, match="prefill"):
        Trainer(config)


def start(logdir: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastdreamer.train", *tiny(logdir, *args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    wait_until(lambda: list(path.parent.glob(path.name)), process)


def wait_until(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.stdout.read().decode())
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits(tmp_path, number):
    process = start(tmp_path, "--steps", "100000", "--checkpoint-every", "1000000")
    wait_for(tmp_path / "metrics.jsonl", process)
    wait_until(partial(longer, tmp_path / "metrics.jsonl", 5000), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    (saved,) = checkpoint.find_all(tmp_path / "checkpoints")
    updates = [line["updates"] for line in lines(tmp_path) if "loss/world_model" in line]
    assert updates == list(range(1, saved.info["updates"] + 1))


def longer(path: Path, size: int) -> bool:
    return path.stat().st_size > size


def newer(folder: Path, step: int) -> bool:
    return any(int(path.stem[11:]) > step for path in folder.glob("checkpoint-*.json"))
