"""Runs that are cut and go on: environments, logs, kills, full disks."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from execution_common import replayed, tiny_learner
from gymnasium import spaces
from gymnasium.utils import EzPickle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import RECIPE_2025, TINY, Counter, curve, lines, newer, run, start, tiny, wait_until

from fastdreamer import checkpoint, kernels
from fastdreamer.checkpoint import Checkpoint
from fastdreamer.cli import parse_config
from fastdreamer.evaluate import Options, evaluate
from fastdreamer.learner import Learner
from fastdreamer.logger import _wait_for_later_name
from fastdreamer.plan import total_updates
from fastdreamer.stored import unpack
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


def test_a_checkpoint_with_adams_of_pytorch_loads():
    """As 2023 had them until it had an operator: a state for each network, by number."""
    ops = kernels.resolve("reference")
    old, new = (tiny_learner("2023", ops, lr_actor=1e-2) for _ in range(2))
    networks = {k: getattr(old.agent, k) for k in ("world_model", "actor", "critic")}
    adams = {k: torch.optim.Adam(x.parameters()) for k, x in networks.items()}
    state = old.state_dict() | {"optimizer": {k: x.state_dict() for k, x in adams.items()}}
    new.load_state_dict(state)
    assert all(not x.any() for x in (*new.nu.values(), *new.mu.values()))
    old.update(unpack(replayed(old), old.agent))
    for network, adam in adams.items():
        for name, parameter in networks[network].named_parameters():
            nu, mu = old.nu[f"{network}.{name}"], old.mu[f"{network}.{name}"]
            adam.state[parameter] = {"step": torch.tensor(1.0), "exp_avg_sq": nu, "exp_avg": mu}
    state = old.state_dict() | {"optimizer": {k: x.state_dict() for k, x in adams.items()}}
    new.load_state_dict(state)
    new.agent.load_state_dict(old.agent.state_dict())
    for learner in (old, new):
        learner.update(unpack(replayed(learner, 1), learner.agent))
    for ours, theirs in zip(new.tensors(), old.tensors(), strict=True):
        assert torch.equal(ours, theirs)


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


def logged(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by name, (step, value) in the order of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines(logdir):
        for name in line.keys() - {"step", "updates", "time"}:
            found.setdefault(name, []).append((line["step"], line[name]))
    return found


def shown(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    """The same as TensorBoard reads it from the event files."""
    events = EventAccumulator(str(logdir), size_guidance={"scalars": 0}).Reload()
    found = {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}
    return {name: values for name, values in found.items() if values}  # some are hidden wholly


def test_logs_have_neither_gaps_nor_duplicates(tmp_path):
    """After a kill before the first checkpoint, another well after one, and a cut by --steps."""
    options = ["--num-envs", "1", "--log.tensorboard", "--checkpoint-every", "1000000"]
    for condition in (partial(logs, tmp_path, 5), partial(logs_after_checkpoint, tmp_path, 5)):
        process = start(tmp_path, *options, "--steps", "100000")
        wait_until(condition, process)
        process.kill()
        process.wait()
        assert bool(checkpoint.find_all(tmp_path / "checkpoints")) == (options[-1] == "80")
        options[-1] = "80"
    assert len(list(tmp_path.glob("events*"))) == 2
    last = checkpoint.find_all(tmp_path / "checkpoints")[-1].info["step"]
    for steps in (last + 11, last + 30):
        run(tmp_path, *options, "--steps", str(steps))
    ours, theirs = logged(tmp_path), shown(tmp_path)
    assert ours.keys() == theirs.keys() and "episode/score" in ours
    for name, values in ours.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), name
        assert steps == [step for step, _ in theirs[name]], name
        np.testing.assert_allclose([v for _, v in values], [v for _, v in theirs[name]], rtol=1e-6)
    assert [step for step, _ in ours["loss/world_model"]] == list(range(66, last + 31, 2))


def test_event_files_of_one_run_have_names_of_different_seconds(tmp_path):
    """Else TensorBoard would read them in the order of the processes' numbers."""
    made = int(time.time())
    (tmp_path / f"events.out.tfevents.{made}.host.99999.0").touch()
    _wait_for_later_name(tmp_path)
    assert int(time.time()) > made


def logs(logdir: Path, count: int, after: int = 0) -> bool:
    """Whether so many whole lines are of later steps."""
    path = logdir / "metrics.jsonl"
    text = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return sum(json.loads(line)["step"] > after for line in text.splitlines()) >= count


def logs_after_checkpoint(logdir: Path, count: int) -> bool:
    found = checkpoint.find_all(logdir / "checkpoints")
    return bool(found) and logs(logdir, count, found[-1].info["step"])


@pytest.mark.parametrize("ratio", ["0.3", "1.7"])
def test_updates_per_step_are_exact_over_many_resumes(tmp_path, ratio):
    """None is lost at a cut, and none is made up for later."""
    options = [*TINY, "--learner.replay-ratio", ratio]
    for steps in (68, 70, 82, 84, 106):
        trainer = train(options, tmp_path, steps)
    found = [(x["step"], x["updates"]) for x in lines(tmp_path) if "loss/world_model" in x]
    assert [updates for _, updates in found] == list(range(1, int(float(ratio) * 42) + 1))
    assert all(n == total_updates(trainer.config, step) for step, n in dict(found).items())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CARTPOLE)
def test_killed_again_and_again_equals_the_uninterrupted_one(tmp_path, monkeypatch, recipe):
    """With -9 at random moments, also while it saves, which it does after every step."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*CARTPOLE[recipe], "--deterministic", "--checkpoint-every", "2", "--log.every", "1"]
    options += ["--threads", "1"]  # on which the rounding of products depends
    command = ["train", *options, "--logdir", str(cut), "--steps", "100000"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastdreamer.trainer"])
    rng, last, kills, torn = random.Random(0), 0, 0, 0
    while kills < 15 or torn < 2:  # of the kills, so many within a save
        assert kills < 60
        process = context.Process(
            target=runpy.run_module, args=("fastdreamer.train", None, "__main__")
        )
        process.start()
        try:
            wait_until_newer(cut / "checkpoints", last, process)
            time.sleep(rng.random() * 0.2)
        finally:
            process.kill()
            process.join()
        found = checkpoint.find_all(cut / "checkpoints")
        kills, last, torn = kills + 1, found[-1].info["step"], torn + bool(leftovers(cut, found))
    for logdir in (whole, cut):
        ended = train(options, logdir, last + 20)
    assert curve(whole) == curve(cut)
    saved = checkpoint.find_all(whole / "checkpoints")[-1].load()
    assert_same(saved["agent"], ended.agent.state_dict())
    assert not leftovers(cut, checkpoint.find_all(cut / "checkpoints"))


def wait_until_newer(folder: Path, step: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 300
    while not newer(folder, step):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def leftovers(logdir: Path, found: Sequence[Checkpoint]) -> set[str]:
    """Names of files that belong to no checkpoint."""
    names = {p.name for name in ("checkpoints", "replay") for p in (logdir / name).iterdir()}
    whole = {c.path.with_suffix(suffix).name for c in found for suffix in (".pt", ".json")}
    return names - whole - {name for c in found for name in files(c.info["replay"])}


# What is refused: the options, the pattern of a file and how much larger a file may get than that.
FULL = {
    "metrics": (["--log.every", "1"], "metrics.jsonl", 2000),
    "events": (["--log.every", "1", "--log.tensorboard"], "events*", 1000),
    "weights": (["--log.every", "1000000"], "checkpoints/*.pt", -1000),
    "replay": (["--log.every", "1000000"], "replay/*.bin", -1000),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_costs_no_checkpoint(tmp_path, what):
    """As seen by the process: files may not grow past a limit."""
    options, pattern, more = FULL[what]
    options = [*options, "--checkpoint-every", "80"]
    process = start(tmp_path, *options, "--steps", "100000")
    wait_until(partial(newer, tmp_path / "checkpoints", 79), process)
    limit = next(tmp_path.glob(pattern)).stat().st_size + more
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 2, output
    assert "Traceback" not in output
    message = output.splitlines()[-1]
    subject = "write the log" if what in ("metrics", "events") else "save"
    assert message.startswith(f"error: cannot {subject} to {tmp_path}: File too large; with room")
    found = checkpoint.find_all(tmp_path / "checkpoints")
    assert not leftovers(tmp_path, found)
    last = found[-1].info["step"]
    resumed = run(tmp_path, *options, "--steps", str(last + 20), "--resume")
    assert resumed.learner.updates == (last + 20 - 64) // 2


def files(manifest: Mapping) -> set[str]:
    """Names of a replay's files."""
    mutable = [manifest["mutable"]] if manifest["mutable"] else []
    return {entry["file"] for entry in [*manifest["segments"], *mutable]}
