"""Trained agents from disk: a run's configuration, its weights, and environments of its task."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import gymnasium
import torch
from torch import Tensor

from fastdreamer import checkpoint
from fastdreamer.agent import Agent
from fastdreamer.checkpoint import Checkpoint, CheckpointError
from fastdreamer.config import Config
from fastdreamer.envs import VectorEnv, make_envs
from fastdreamer.errors import UsageError
from fastdreamer.execution import choose_precision
from fastdreamer.kernels import resolve
from fastdreamer.recipe import RECIPES

T = TypeVar("T")
Factory = Callable[[], gymnasium.Env]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a training run."""

    path: Path
    """The .pt file."""
    config: Config
    """What the run was trained with."""
    step: int
    """Environment steps done at the checkpoint."""
    weights: Mapping[str, Tensor]
    """Parameters of the agent by name."""

    def envs(self, num_envs: int, seed: int, factory: Factory | None = None) -> VectorEnv:
        """Environments of the run's task, or of ``factory``.

        Raises:
            TaskError: they cannot be made.
        """
        if factory is None and self.config.task.startswith("custom:"):
            raise CheckpointError(
                f"{self.path} was trained on environments of a Python function: "
                "load it from Python with that factory"
            )
        return make_envs(factory or self.config.task, num_envs, seed, self.config.env)

    def agent(self, envs: VectorEnv, device: torch.device | str = "cpu") -> Agent:
        """The agent for the spaces of ``envs``, in evaluation mode.

        Raises:
            CheckpointError: the weights are of other networks or of another task's spaces.
            UsageError: the action space or the device is not supported.
        """
        agent = make_agent(self.config, envs, device, backend="auto")
        check_weights(self.path, agent.state_dict(), self.weights)
        agent.load_state_dict(dict(self.weights))
        return agent.eval().requires_grad_(False)


def make_agent(
    config: Config, envs: VectorEnv, device: torch.device | str, backend: str | None = None
) -> Agent:
    """A new agent for the spaces of ``envs``; ``backend`` replaces the configuration's.

    Raises:
        UsageError: the spaces or the backend are not supported.
    """
    try:
        ops = resolve(backend or config.backend, device)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--backend: {error}") from None
    try:
        boxes: Any = envs.obs_space.spaces
        agent = Agent(boxes, envs.act_space, config.model, RECIPES[config.recipe], ops)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"task {config.task}: {error}") from None
    agent.bf16 = choose_precision(config.precision, torch.device(device)) == "bf16"
    return agent.to(device)


def load_run(path: Path) -> SavedRun:
    """Read a checkpoint.

    Args:
        path: a run directory or its checkpoints folder (the newest is taken), or one .pt file.

    Raises:
        CheckpointError: there is none, it is damaged, or its config.json is missing or unknown.
    """
    try:
        saved = _find(path)
        folder = saved.path.parent
        config = read_config(folder if (folder / "config.json").exists() else folder.parent)
        return SavedRun(saved.path, config, saved.info["step"], saved.load()["agent"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error!r}") from None


def load_agent(
    path: Path | str, factory: Factory | None = None, device: torch.device | str = "cpu"
) -> Agent:
    """The agent of a run directory, of its checkpoints folder or of one .pt file.

    Args:
        path: as in :func:`load_run`.
        factory: makes one environment, for a run that was trained on a Python function.
        device: where the agent shall act.

    Raises:
        CheckpointError, TaskError, UsageError: in one line.
    """
    run = load_run(Path(path))
    envs = run.envs(1, 0, factory)
    try:
        return run.agent(envs, device)
    finally:
        envs.close()


def read_config(logdir: Path) -> Config:
    """The configuration of a run directory.

    Raises:
        CheckpointError: config.json is missing, is no JSON, or has unknown fields or values.
    """
    path = logdir / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: it belongs to every run") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return from_json(Config, values, str(path))


def write_config(logdir: Path, config: Config) -> None:
    """Write the config.json of a run directory.

    Raises:
        UsageError: the directory cannot be written to.
    """
    try:
        checkpoint.write_json(logdir / "config.json", to_json(config))
    except OSError as error:
        raise UsageError(f"--logdir {logdir}: {error.strerror}") from None


def _difference(name: str, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs in one field, or in the first differing field of a group."""
    a, b = saved[name], ours[name]
    if isinstance(a, dict):
        key = next(k for k in b if a[k] != b[k])
        name, a, b = f"{name}.{key}", a[key], b[key]
    return f"{name} is {a}, not {b}"


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def check_same_run(logdir: Path, config: Config) -> None:
    """The run in ``logdir`` must have the same task and networks as ``config``.

    Raises:
        CheckpointError: it has not; the message names the first difference.
    """
    saved, ours = to_json(read_config(logdir)), to_json(config)
    for values in (saved, ours):
        learner = values["learner"]
        values |= {k: learner[k] for k in ("replay_ratio", "prefill")}
        del values["env"]["num_threads"]
    for name in ("recipe", "task", "num_envs", "model", "env", "replay_ratio", "prefill"):
        if saved[name] != ours[name]:
            raise CheckpointError(
                f"{logdir} holds another run: its {_difference(name, saved, ours)}; "
                "give a new --logdir or the same options"
            )


def from_json(kind: type[T], values: Any, source: str) -> T:
    """A dataclass from the plain values of its fields; absent fields keep their defaults.

    Args:
        kind: a dataclass, whose fields may be dataclasses.
        source: what to call the values in an error.

    Raises:
        CheckpointError: an unknown field, or a value of another type.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} must hold fields by name, not {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = [k for k in values if k not in hints]
    if unknown:
        raise CheckpointError(
            f"{source} has unknown fields: {', '.join(unknown)} (written by another version?)"
        )
    fields = {k: _convert(hints[k], v, f"{source}: {k}") for k, v in values.items()}
    return kind(**fields)


def choose_device(name: Device) -> torch.device:
    """The device of an option; "auto" takes a GPU if there is one.

    Raises:
        UsageError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch sees no GPU; use --device cpu or auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _convert(hint: Any, value: Any, source: str) -> Any:
    """``value`` of JSON as the annotated type ``hint``."""
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, source)
    if typing.get_origin(hint) is Literal:
        valid: tuple[Any, ...] = typing.get_args(hint)
        if value not in valid:
            names = ", ".join(map(str, valid))
            raise CheckpointError(f"{source} is {value!r}, valid are {names}")
        return value
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]  # only tuple[X, ...] occurs
        return tuple(_convert(item, v, source) for v in value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise CheckpointError(f"{source} is {value!r}, which is not of type {names}")
    return value


def _find(path: Path) -> Checkpoint:
    if path.suffix == ".pt" and path.is_file():
        info = path.with_suffix(".json")
        if not info.exists():
            raise CheckpointError(f"{path} is incomplete: {info.name} belongs beside it")
        return Checkpoint(path, json.loads(info.read_text()))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a run directory or a .pt file")
    found = checkpoint.find_all(path / "checkpoints") or checkpoint.find_all(path)
    if not found:
        raise CheckpointError(f"no checkpoint in {path} nor in {path / 'checkpoints'}")
    return found[-1]


def check_weights(path: Path, ours: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Saved parameters must have our names and shapes; CheckpointError if not."""
    reason = ""
    if unlike := sorted(ours.keys() ^ saved.keys()):
        reason = f"it {'also has' if unlike[0] in saved else 'lacks'} {unlike[0]}"
    else:
        for name, weight in ours.items():
            if weight.shape != saved[name].shape:
                shapes = f"{tuple(saved[name].shape)}, not {tuple(weight.shape)}"
                reason = f"{name} has the shape {shapes}"
                break
    if reason:
        raise CheckpointError(f"{path} holds other networks than its task and config: {reason}")
