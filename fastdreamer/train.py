"""``python -m fastdreamer.train``: train an agent. See ``--help``.

The module may be called like the function ``fastdreamer.train``, whose name it takes when it is
imported.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import fastdreamer
from fastdreamer.cli import parse_config, run

_train = fastdreamer.train  # the function, until the import system replaces it


def main() -> None:
    """Parse the command line and train."""
    config = parse_config(sys.argv[1:])
    from fastdreamer.trainer import Trainer

    with Trainer(config) as trainer:
        trainer.run()


class _Module(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return _train(*args, **options)


sys.modules[__name__].__class__ = _Module

if __name__ == "__main__":
    run(main)
