"""Wrong inputs: each costs one line that says what is wrong, status 2, and nothing in the run."""

from __future__ import annotations

import importlib
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastdreamer
from fastdreamer import cli
from fastdreamer.train import main

CATCH = "envpool:Catch-v0"
TINY = shlex.split(
    """--preset demo --size debug --env.image-size 16 --num-envs 2 --learner.batch-size 4
    --learner.batch-length 8 --learner.horizon 3 --learner.prefill 32 --learner.replay-ratio 0.1
    --log.no-progress --log.no-tensorboard --eval-episodes 0 --device cpu --steps 64"""
)

ROBOTS = """
import gymnasium
import numpy as np
from gymnasium import spaces

class Robot(gymnasium.Env):
    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Discrete(2)
    reward = 1.0

    def observe(self):
        return np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), self.reward, self.t == 40, False, {}

class Spoken(Robot):
    action_space = spaces.Text(3)

class Wordy(Robot):
    observation_space = spaces.Dict({"eye": Robot.observation_space, "ear": spaces.Text(3)})

class Reserved(Robot):
    observation_space = spaces.Dict({"reward": spaces.Discrete(2)})

class Film(Robot):
    observation_space = spaces.Box(0, 1, (5, 8, 8, 3), np.float32)

class Bare(gymnasium.Env):
    pass

class Greedy(Robot):
    reward = float("nan")

class Loud(Robot):
    reward = (1.0, 2.0)

class Blind(Robot):
    def observe(self):
        return np.zeros(3, np.float32) if self.t > 20 else np.zeros(2, np.float32)

class Dizzy(Robot):
    def observe(self):
        return np.full(2, np.nan, np.float32)

class Old(Robot):
    def step(self, action):
        return super().step(action)[:4]

class Older(Robot):
    def reset(self, **_):
        return super().reset()[0]

def broken():
    raise OSError("no robot on the port")

def nothing():
    pass

SPEED = 3
"""

Fail = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with the modules `robots_here`, `torn_here` and `hungry_here`."""
    (tmp_path / "robots_here.py").write_text(ROBOTS)
    (tmp_path / "torn_here.py").write_text("def f(:\n")
    (tmp_path / "hungry_here.py").write_text("import not_installed_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("robots_here", None)


@pytest.fixture
def fail(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs the command, which must fail as it should, and returns its line."""

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastdreamer.train", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return one_line(capsys.readouterr().err, stop.value.code)

    return run


def one_line(text: str, status: object) -> str:
    """The message, which must be one line, and the status 2."""
    assert status == 2, text
    assert text.startswith("error: "), text
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text.strip()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which a refused run may have made."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


OPTIONS = {
    "--presett demo": "unknown option --presett: did you mean --preset",
    "--preset atari100": "unknown --preset 'atari100': did you mean 'atari100k'?",
    "--size huge": "unknown --size 'huge': did you mean 'debug'? valid are",
    "--recipe 2024": "unknown --recipe '2024'",
    "--stpes 10": "unknown option --stpes: did you mean --steps",
    "--horizon 3": "did you mean --learner.horizon",
    "--learner.horizn 3": "unknown option --learner.horizn: did you mean --learner.horizon",
    "train": "unexpected argument 'train'",
    "--log.progress maybe": "unexpected argument 'maybe'",
    "--steps": "Missing value for argument '--steps'",
    "--steps ten": "Error parsing --steps: invalid literal for int() with base 10: 'ten'",
    "--learner.gamma much": "Error parsing --learner.gamma",
    "--steps 0": "--steps must be at least 1, got 0",
    "--steps -5": "--steps must be at least 1, got -5",
    "--num-envs 0": "--num-envs must be at least 1, got 0",
    "--capacity 0": "--capacity must be at least 1, got 0",
    "--log.every 0": "--log.every must be at least 1, got 0",
    "--learner.batch-size 0": "--learner.batch-size must be at least 1, got 0",
    "--learner.batch-length -1": "--learner.batch-length must be at least 1, got -1",
    "--learner.horizon 0": "--learner.horizon must be at least 1, got 0",
    "--learner.replay-ratio -1": "--learner.replay-ratio must be at least 0 and finite, got -1",
    "--learner.replay-ratio nan": "--learner.replay-ratio must be at least 0 and finite, got nan",
    "--learner.prefill 8": "must be at least sequence length x environments = 16",
    "--learner.gamma 1.5": "--learner.gamma must be in 0..1, got 1.5",
    "--learner.lr-actor nan": "--learner.lr-actor must be positive and finite, got nan",
    "--learner.clip-critic 0": "--learner.clip-critic must be positive and finite, got 0",
    "--learner.free-nats -1": "--learner.free-nats must be at least 0 and finite, got -1",
    "--learner.return-low 0.99": "--learner.return-low must be below --learner.return-high",
    "--seed -1": "--seed must be at least 0",
    "--threads -2": "--threads must be at least 0",
    "--eval-episodes -1": "--eval-episodes must be at least 0",
    "--capacity 9": "--steps and --capacity must be at least sequence length",
    "--model.classes 1": "--model.classes must be at least 2, got 1",
    "--model.unimix 2": "--model.unimix must be in 0..1, got 2",
    "--recipe 2025": "preset demo is of recipe 2023; of recipe 2025 are atari100k-2025",
    "--model.units 0": "--model.units must be at least 1, got 0",
    "--model.bins 254": "--model.bins must be odd, got 254",
    "--checkpoint-every 5h": "--checkpoint-every 5h: give steps (5000) or minutes (30m)",
    "--checkpoint-every 0": "--checkpoint-every 0: give steps (5000) or minutes (30m)",
    "--device tpu": "'tpu' for argument '--device'. Expected one of ('auto', 'cpu', 'cuda')",
    "--backend fastest": "'fastest' for argument '--backend'. Expected one of ('auto'",
    "--precision fp16": "'fp16' for argument '--precision'. Expected one of ('auto', 'fp32', 'bf16",
    "--compile yes": "'yes' for argument '--compile'. Expected one of ('auto', 'on', 'off')",
    "--graph always": "'always' for argument '--graph'. Expected one of ('auto', 'on', 'off')",
    "--graph on": "--graph on: it needs a GPU with CUDA; use --graph auto or off",
    "--env.image-size 0": "env option image_size must be at least 1, got 0",
    "--env.image-size 17": "a side of 16, 32, 64 or 128 pixels, not 17 x 17",
    "--env.action-repeat 0": "env option action_repeat must be at least 1, got 0",
    "--env.sticky 2": "env option sticky must lie in 0..1, got 2.0",
    "--env.noop-max 0": "env option noop_max must be at least 1, got 0",
    "--env.max-episode-frames 3": "must be at least action_repeat (4), got 3",
    "--env.dmc-repeat 0": "env option dmc_repeat must be at least 1, got 0",
    "--preset dmc_propio": "unknown --preset 'dmc_propio': did you mean 'dmc_proprio'?",
    "--preset dmc_proprio --recipe 2023": "of recipe 2025; of recipe 2023 are atari100k, demo",
    "--env.num-threads -1": "env option num_threads must not be negative, got -1",
    "--resume": "--resume: no checkpoint in run/checkpoints",
    "--logdir robots_here.py": "--logdir robots_here.py: File exists",
    "--logdir robots_here.py/run": "--logdir robots_here.py/run: Not a directory",
}

TASKS = {
    "ms_pacmann": "unknown task 'ms_pacmann'; nearest: ms_pacman",
    "": "unknown task ''",
    "envpool:CatchX-v0": "envpool has no task 'CatchX-v0'; nearest: Catch-v0",
    "envpol:Catch-v0": "unknown task 'envpol:Catch-v0'; nearest: envpool:Catch-v0",
    "envpool:Cig-v1": "envpool task 'Cig-v1' is not supported: it is a network game",
    "gymnasium:CartPol-v1": "gymnasium cannot make 'CartPol-v1'",
    "gymnasium:CartPole-v99": "nearest: CartPole-v1",
    "gymnasium:Blackjack-v1": "the space of 'observation' is not supported: Tuple(Discrete(32)",
    "dmc_reacher_eas": "DeepMind Control has no task 'reacher_eas'; nearest: dmc_reacher_easy",
    "dmc_walker_walk": "recipe 2023 supports one Discrete action, not Box(-1.0, 1.0, (6,),",
    "crafter_rewrd": "Crafter has no task 'rewrd'; nearest: crafter_reward",
    "dmc:": "DeepMind Control has no task ''; nearest: none",
    "minerl:navgate": "MineRL has no task 'navgate' here; nearest: navigate",
    "robts_here:Robot": "there is no module 'robts_here' in",
    "robots_here:Robt": "module 'robots_here' has no 'Robt'; nearest: Robot",
    "robots_here:SPEED": "'SPEED' is int, not a function or class",
    "robots_here:nothing": "'nothing' must return a gymnasium.Env, got NoneType",
    "robots_here:broken": "cannot be made: OSError: no robot on the port (robots_here.py:",
    "torn_here:f": "importing 'torn_here' raised SyntaxError",
    "hungry_here:f": "importing 'hungry_here' raised ModuleNotFoundError",
    "robots_here:Spoken": "Text(1, 3,",
    "robots_here:Wordy": "the space of 'ear' is not supported: Text(1, 3,",
    "robots_here:Reserved": "the observation name 'reward' is reserved",
    "robots_here:Film": "the space of 'observation' is not supported: Box(0.0, 1.0, (5, 8, 8, 3)",
    "robots_here:Bare": "Bare.observation_space is not set to a gymnasium space",
}

EXTRAS = {
    "envpool:Catch-v0": ("envpool", "needs the envpool package and its game files: pip install"),
    "ms_pacman": ("envpool", "pip install envpool envpool-assets"),
    "dmc_walker_walk": ("envpool", "pip install envpool envpool-assets"),
    "dmc_walker_walk --env.dmc-images": ("dm_control", "pip install fastdreamer[dmc]"),
    "crafter_reward": ("crafter", "pip install fastdreamer[crafter]"),
    "gymnasium:LunarLander-v3": ("Box2D", 'pip install "gymnasium[box2d]"'),
    "minerl:navigate": (
        "minerl",
        "install a JDK 8 (openjdk-8-jdk), then pip install minerl==0.4.4",
    ),
}

WHILE_TRAINING = {
    "Greedy": "the reward must be finite, got nan",
    "Loud": "the reward must be a single number, got a tuple of 2",
    "Blind": "'observation' has shape (3,), but its space says Box(-9.0, 9.0, (2,), float32)",
    "Dizzy": "'observation' holds NaN",
    "Older": "reset must return (observation, info), got an array of shape (2,)",
    "Old": "step must return (observation, reward, terminated, truncated, info)",
}


@pytest.mark.parametrize("args", OPTIONS)
def test_options(fail: Fail, here: Path, args: str) -> None:
    before = contents(here)
    assert OPTIONS[args] in fail(*TINY, "--logdir", "run", *args.split())
    assert contents(here) == before


@pytest.mark.parametrize("task", TASKS)
def test_tasks(fail: Fail, task: str) -> None:
    assert TASKS[task] in fail(*TINY, "--logdir", "run", "--task", task)
    assert not Path("run").exists()


@pytest.mark.parametrize("task", EXTRAS)
def test_missing_packages(fail: Fail, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    package, message = EXTRAS[task]
    monkeypatch.setitem(sys.modules, package, None)
    forget("gymnasium.envs.box2d", monkeypatch)
    assert message in fail(*TINY, "--logdir", "run", "--task", *task.split())


def test_wandb_that_is_not_installed(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    args = ["--task", CATCH, "--logdir", "run", "--log.wandb", "robots"]
    assert "--log.wandb needs the wandb package: pip install wandb" in fail(*TINY, *args)
    assert not Path("run").exists()


def forget(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a package be imported anew, and find what it needs missing."""
    for name in [n for n in sys.modules if n.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(fail: Fail) -> None:
    line = fail(*TINY, "--logdir", "run", "--device", "cuda")
    assert "--device cuda: this PyTorch sees no GPU; use --device cpu or auto" in line


@pytest.mark.parametrize("name", WHILE_TRAINING)
def test_environments_that_break_while_training(fail: Fail, name: str) -> None:
    assert WHILE_TRAINING[name] in fail(*TINY, "--logdir", "run", "--task", f"robots_here:{name}")


# Runs that cannot go on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log directory of a run of 64 steps."""
    logdir = tmp_path_factory.mktemp("finished") / "run"
    fastdreamer.train(CATCH, *TINY, "--logdir", str(logdir))
    return logdir


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, here / "run")


ANOTHER_RUN = {
    "--task envpool:CartPole-v1": "its task is envpool:Catch-v0, not envpool:CartPole-v1",
    "--num-envs 1": "holds another run: its num_envs is 2, not 1; give a new --logdir",
    "--size xs": "holds another run: its model",
    "--model.units 32": "holds another run: its model",
    "--env.image-size 32": "holds another run: its env",
    "--learner.horizon 0": "--learner.horizon must be at least 1",
    "--stpes 128": "unknown option --stpes",
}


@pytest.mark.parametrize("args", ANOTHER_RUN)
def test_a_log_directory_of_another_run(fail: Fail, run: Path, args: str) -> None:
    before = contents(run)
    line = fail(*TINY, "--task", CATCH, "--logdir", "run", "--steps", "96", *args.split())
    assert ANOTHER_RUN[args] in line
    assert contents(run) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights cut": ("checkpoints/*.pt", cut, ".pt is damaged: its checksum does not match"),
    "weights flipped": ("checkpoints/*.pt", flip, ".pt is damaged: its checksum does not match"),
    "weights empty": ("checkpoints/*.pt", empty, ".pt is damaged: its checksum does not match"),
    "weights gone": ("checkpoints/*.pt", Path.unlink, "--resume: no checkpoint in run/checkpoints"),
    "info cut": ("checkpoints/*.json", cut, "checkpoint-0000000064.json is damaged"),
    "info empty": ("checkpoints/*.json", empty, "checkpoint-0000000064.json is damaged"),
    "info a list": ("checkpoints/*.json", replace("[]"), "checkpoint-0000000064.json is damaged"),
    "info without keys": ("checkpoints/*.json", replace("{}"), "0000000064.json is damaged"),
    "info gone": ("checkpoints/*.json", Path.unlink, "--resume: no checkpoint in run/checkpoints"),
    "replay cut": ("replay/*.bin", cut, ".bin: replay file has"),
    "replay flipped": ("replay/*.bin", flip, ".bin: replay file is corrupted"),
    "replay empty": ("replay/*.bin", empty, ".bin: replay file has 0 bytes, expected"),
    "replay gone": ("replay/*.bin", Path.unlink, ".bin: replay file is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_runs(fail: Fail, run: Path, case: str) -> None:
    pattern, damage, message = DAMAGE[case]
    (path,) = run.glob(pattern)
    damage(path)
    before = contents(run)
    args = [*TINY, "--task", CATCH, "--logdir", "run", "--steps", "96", "--resume"]
    assert message in fail(*args)
    assert contents(run) == before


# As commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--preset atari100", "did you mean 'atari100k'?"),
        ("--preset demo --task robots_here:Old --logdir run --log.no-progress", "step must return"),
        ("--preset demo --task robots_here:broken --logdir run", "no robot on the port"),
        ("--preset demo --resume --logdir run", "no checkpoint in run/checkpoints"),
    ],
)
def test_commands(here: Path, args: str, message: str) -> None:
    root = str(Path(fastdreamer.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "fastdreamer.train", *args.split()],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert message in one_line(done.stderr, done.returncode)


WRITERS = {
    "evaluate --checkpoint run --episodes 4 --json out.json": "out.json",
    "evaluate --checkpoint run --episodes 4 --video out.gif": "out.gif",
    "evaluate --checkpoint run --episodes 4 --video out.mp4": "out.mp4",
    "dream --checkpoint run --out out.gif": "out.gif",
    "plot run --out out.png": "out.png",
    "plot run --out out.svg": "out.svg",
}


@pytest.mark.parametrize("command", WRITERS)
def test_commands_on_a_full_disk(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """As a process sees it: files may not grow past 50 bytes."""
    name, *args = command.split()
    module = importlib.import_module(f"fastdreamer.{name}")
    monkeypatch.setattr(sys, "argv", [name, *args])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        with pytest.raises(SystemExit) as stop:
            cli.run(module.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = one_line(capsys.readouterr().err.rpartition("\r")[2], stop.value.code)
    assert f"{WRITERS[command]}: File too large" in line
