"""DreamerV3 in PyTorch with compiled kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import gymnasium

    from fastdreamer.trainer import Result

__version__ = "0.1.0"

# In a checkout fastdreamer.kernels is the folder kernels/ beside this package.
if ((_root := Path(__file__).resolve().parent.parent) / "csrc" / "fastdreamer.h").exists():
    __path__.append(str(_root))


def train(
    task: str | Callable[[], gymnasium.Env] | None = None, *args: str, **options: Any
) -> Result:
    """Train an agent; the same as ``python -m fastdreamer.train``.

    Args:
        task: a task's name, or a function that makes one Gymnasium environment.
        args: further command line arguments, such as "--learner.horizon", "10".
        options: command line options by name, such as ``size="xs", steps=5000, num_envs=4``.

    Returns:
        The run's directory, agent and scores.

    Raises:
        fastdreamer.cli.UsageError: for an invalid option.
        fastdreamer.envs.TaskError: for an unknown task or an unsupported space.
    """
    from fastdreamer.cli import parse_config
    from fastdreamer.trainer import Trainer

    name = task if task is None or isinstance(task, str) else _factory_name(task)
    argv = [] if name is None else ["--task", name]
    for key, value in options.items():
        option = key.replace("_", "-")
        argv += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else []
        argv += [] if isinstance(value, bool) else [f"--{option}", str(value)]
    factory = None if task is None or isinstance(task, str) else task
    with Trainer(parse_config([*argv, *args]), factory) as trainer:
        return trainer.run()


def _factory_name(factory: Callable[[], gymnasium.Env]) -> str:
    """How a run on the environments of a Python function is called."""
    module, name = getattr(factory, "__module__", ""), getattr(factory, "__qualname__", "")
    return f"custom:{module}.{name or type(factory).__qualname__}"
