"""``python -m fastdreamer.check``: try an environment before training on it. See ``--help``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from fastdreamer.cli import parse, run
from fastdreamer.envs import EnvOptions
from fastdreamer.errors import UsageError


@dataclass(frozen=True)
class Options:
    """Step one environment with random actions; report its spaces, rewards, episodes and speed."""

    task: str = ""
    """Task, such as my_module:make_env or gymnasium:CartPole-v1; --task may be left out."""
    steps: int = 300
    """Random steps at most."""
    seconds: float = 5.0
    """Time at most."""
    env: EnvOptions = field(default_factory=EnvOptions)


def main() -> None:
    """Parse the command line, examine, print."""
    args = sys.argv[1:]
    if args and not args[0].startswith("-"):
        args = ["--task", *args]
    options = parse(Options, args, "python -m fastdreamer.check", Options())
    if not options.task:
        raise UsageError("name a task: python -m fastdreamer.check my_module:make_env")
    from fastdreamer.envs.check import report

    print(report(options.task, options.env, options.steps, options.seconds))


if __name__ == "__main__":
    run(main)
