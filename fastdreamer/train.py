"""``python -m fastdreamer.train``: train an agent. See ``--help``."""

from __future__ import annotations

import sys

from fastdreamer.cli import parse_config, run


def main() -> None:
    """Parse the command line and train."""
    config = parse_config(sys.argv[1:])
    from fastdreamer.trainer import Trainer

    with Trainer(config) as trainer:
        trainer.run()


if __name__ == "__main__":
    run(main)
