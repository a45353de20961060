"""``python -m bench.curves``: learning curves of our runs over the official ones. See ``--help``.

Beside the figure stands a .json file of the same name: one line with both scores at equal steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from fastdreamer import plot
from fastdreamer.cli import parse, run
from fastdreamer.errors import UsageError
from fastdreamer.reference import Curve, official_curves, same_task
from fastdreamer.video import check_output, writing

Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Options:
    """Draw runs of one task over its official learning curve, and write both as numbers."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories, seeds of one setting (required)."""
    task: str = ""
    """Task that the runs must be of; default the first run's."""
    out: Path = Path("curves.png")
    """The .png or .svg file to write."""
    bins: int = 20
    """Parts of our steps that scores are averaged in."""


def main() -> None:
    """Parse the command line, draw, print the numbers."""
    options = parse(Options, sys.argv[1:], "python -m bench.curves", Options())
    print(json.dumps(compare(options)))


def compare(options: Options) -> dict[str, Any]:
    """Draw the figure and write the numbers.

    Returns:
        What the .json file holds: task, setting, runs, official (recipe and runs), and points: for
        the end of each part its step, frames, and mean, low and high over the runs of ours and of
        the official ones; null where no episode ended.

    Raises:
        UsageError, CheckpointError: in one line.
    """
    if options.bins < 1:
        raise UsageError(f"--bins must be at least 1, got {options.bins}")
    check_output("--out", options.out, plot.FORMATS)
    logs = _read(options)
    config = logs[0].config
    official = official_curves(config.task, config.env)
    if not official:
        raise UsageError(f"there is no official curve of {config.task} in bench/reference/scores")
    drawn = plot.Options(options.runs, options.out, "steps", options.bins, reference=True)
    with writing(options.out) as path:
        plot.score_figure(logs, drawn).savefig(path)
    ours = [log.series("episode/score", "steps") for log in logs]
    result = {
        "task": config.task,
        "setting": logs[0].setting,
        "runs": len(logs),
        "official": {"recipe": official[0].recipe, "runs": len(official)},
        "points": points(ours, official, options.bins),
    }
    with writing(options.out.with_suffix(".json")) as path:
        path.write_text(json.dumps(result) + "\n")
    return result


def points(ours: Sequence[Points], official: Sequence[Curve], bins: int) -> list[dict[str, Any]]:
    """Mean, lowest and highest run of both, in ``bins`` equal parts of our steps.

    Raises:
        UsageError: no episode has ended in any of our runs.
    """
    last = max((x.max() for x, _ in ours if len(x)), default=0)
    if not last:
        raise UsageError("no episode has ended in these runs")
    edges = np.linspace(0, last, bins + 1)
    frames = official[0].frames
    rows: list[dict[str, Any]] = [
        {"step": round(edge), "frames": round(edge * frames)} for edge in edges[1:]
    ]
    until = [c.steps <= last for c in official]
    theirs = [(c.steps[x], c.scores[x]) for c, x in zip(official, until, strict=True)]
    curves = {"ours": list(ours), "official": theirs}
    for name, group in curves.items():
        binned = plot.binned(group, edges)
        for row, values in zip(rows, binned.T, strict=True):
            known = values[~np.isnan(values)]
            summary = (known.mean(), known.min(), known.max()) if len(known) else (None,) * 3
            row[name] = [None if v is None else round(float(v), 4) for v in summary]
    return rows


def _read(options: Options) -> list[plot.RunLog]:
    if not options.runs:
        raise UsageError("give one or more run directories")
    logs = [plot.read_log(path) for path in options.runs]
    task = options.task or logs[0].config.task
    for path, log in zip(options.runs, logs, strict=True):
        if not same_task(log.config.task, task):
            raise UsageError(f"{path} is a run of {log.config.task}, not of {task}")
        if log.setting != logs[0].setting:
            raise UsageError(f"{path} has {log.setting}; {options.runs[0]} {logs[0].setting}")
    return logs


if __name__ == "__main__":
    run(main)
