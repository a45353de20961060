"""``python -m fastdreamer.plot``: learning curves of runs. See ``--help``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from fastdreamer.cli import parse, run
from fastdreamer.config import Config
from fastdreamer.errors import UsageError
from fastdreamer.reference import official_curves
from fastdreamer.video import check_output, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
Axis = Literal["steps", "time"]
_LABELS = {"steps": "environment steps", "time": "wall-clock hours"}
_REFERENCE = "black"


@dataclass(frozen=True)
class Options:
    """Draw scores over environment steps and over time; seeds of one setting become one curve."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories (required)."""
    out: Path = Path("curves.png")
    """The .png or .svg file to write."""
    x: Literal["both", "steps", "time"] = "both"
    """What scores are drawn over."""
    bins: int = 40
    """Bins that the x-axis is divided into; a curve is the mean of each bin's episodes."""
    reference: bool = False
    """Add the official curve of the same task; it comes with the source checkout."""
    losses: bool = False
    """Draw the losses too, into a second file of the same name with -losses."""


@dataclass(frozen=True)
class RunLog:
    """What a run has logged."""

    config: Config
    lines: Sequence[dict[str, float]]
    """The lines of metrics.jsonl."""

    @property
    def setting(self) -> str:
        """What seeds of one experiment have in common, as a curve's label."""
        config = self.config
        ratio = config.learner.replay_ratio
        return f"recipe {config.recipe}, size {config.size}, {ratio:g} updates a step"

    def series(self, name: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
        """A metric's (x, y) in steps or in hours."""
        unit, key = (1.0, "step") if axis == "steps" else (3600.0, "time")
        rows = [(line[key] / unit, line[name]) for line in self.lines if name in line]
        x, y = np.array(rows, float).reshape(-1, 2).T
        return x, y


def main() -> None:
    """Parse the command line and draw."""
    options = parse(Options, sys.argv[1:], "python -m fastdreamer.plot", Options())
    for path in plot(options):
        print(f"wrote {path}")


def plot(options: Options) -> list[Path]:
    """Draw and write the figures; returns their files.

    Raises:
        UsageError, CheckpointError: in one line.
    """
    if not options.runs:
        raise UsageError("give one or more run directories")
    if options.bins < 1:
        raise UsageError(f"--bins must be at least 1, got {options.bins}")
    check_output("--out", options.out, FORMATS)
    logs = [read_log(path) for path in options.runs]
    figures = {options.out: score_figure(logs, options)}
    if options.losses:
        beside = options.out.with_stem(options.out.stem + "-losses")
        figures[beside] = loss_figure(logs, options.bins)
    for path, figure in figures.items():
        with writing(path):
            figure.savefig(path)
    return list(figures)


def read_log(logdir: Path) -> RunLog:
    """Read the configuration and metrics of a run directory; a half-written last line is left out.

    Raises:
        UsageError: it is no run directory, or its metrics are damaged.
        CheckpointError: its config.json is missing or unknown.
    """
    from fastdreamer.loading import read_config

    path = logdir / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{logdir} is no run directory: it has no metrics.jsonl")
    lines = path.read_text().split("\n")[:-1]
    try:
        return RunLog(read_config(logdir), [json.loads(line) for line in lines])
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def binned(curves: Sequence[tuple[np.ndarray, np.ndarray]], edges: np.ndarray) -> np.ndarray:
    """Mean of each bin for each curve: (curves, bins), NaN where a bin is empty.

    Where there are several curves, empty bins between full ones are interpolated, so that every
    curve counts in the mean over them.
    """
    centres = (edges[1:] + edges[:-1]) / 2
    rows = np.full((len(curves), len(centres)), np.nan)
    for row, (x, y) in zip(rows, curves, strict=True):
        index = np.clip(np.digitize(x, edges) - 1, 0, len(centres) - 1)
        count = np.bincount(index, minlength=len(centres))
        full = np.flatnonzero(count)
        if len(full):
            means = np.bincount(index, y, len(centres))[full] / count[full]
            row[full] = means
            if len(curves) > 1:
                row[:] = np.interp(centres, centres[full], means, np.nan, np.nan)
    return rows


def score_figure(logs: Sequence[RunLog], options: Options) -> Figure:
    """Scores of each task (rows) over steps and time (columns)."""
    axes: tuple[Axis, ...] = ("steps", "time") if options.x == "both" else (options.x,)
    tasks = list(dict.fromkeys(log.config.task for log in logs))
    figure = _figure(len(tasks), len(axes))
    for i, task in enumerate(tasks):
        group = [log for log in logs if log.config.task == task]
        for j, axis in enumerate(axes):
            panel: Axes = figure.axes[i * len(axes) + j]
            drawn = _draw_settings(panel, group, "episode/score", axis, options.bins)
            if options.reference and axis == "steps":
                _draw_reference(panel, group[0].config, options.bins)
            panel.set(title=task, ylabel="episode score")
            if drawn:
                panel.legend(fontsize="small")
            else:
                panel.text(0.5, 0.5, "no finished episode", ha="center", transform=panel.transAxes)
    return figure


def loss_figure(logs: Sequence[RunLog], bins: int) -> Figure:
    """Each loss over environment steps, one panel a loss."""
    names = sorted({k for log in logs for line in log.lines for k in line if k.startswith("loss/")})
    if not names:
        raise UsageError("--losses: nothing was learned yet in these runs")
    columns = min(3, len(names))
    figure = _figure(-(-len(names) // columns), columns)
    for name, panel in zip(names, figure.axes, strict=False):
        _draw_settings(panel, logs, name, "steps", bins, with_task=True)
        panel.set(title=name)
    figure.axes[0].legend(fontsize="small")
    for panel in figure.axes[len(names) :]:
        panel.remove()
    return figure


def _figure(rows: int, columns: int) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((5.2 * columns, 3.8 * rows), dpi=120, layout="constrained")
    for panel in figure.subplots(rows, columns, squeeze=False).flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_settings(
    panel: Axes, logs: Sequence[RunLog], name: str, axis: Axis, bins: int, with_task: bool = False
) -> bool:
    """A curve for each setting: mean of its runs, their range as a band. False if there is none."""
    settings: dict[str, list[RunLog]] = {}
    for log in logs:
        label = f"{log.config.task}, {log.setting}" if with_task else log.setting
        settings.setdefault(label, []).append(log)
    panel.set(xlabel=_LABELS[axis])
    drawn = False
    for label, group in settings.items():
        curves = [c for c in (log.series(name, axis) for log in group) if len(c[0])]
        if curves:
            seeds = "" if len(group) == 1 else f", {len(group)} runs"
            _draw_band(panel, curves, bins, f"{label}{seeds}")
            drawn = True
    return drawn


def _draw_band(
    panel: Axes,
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    bins: int,
    label: str,
    color: str | None = None,
) -> None:
    """Mean of curves and the range between the lowest and the highest, where any of them is."""
    edges = np.linspace(0, max(x.max() for x, _ in curves) * (1 + 1e-9), bins + 1)
    rows = binned(curves, edges)
    known = ~np.isnan(rows).all(0)
    centres, rows = ((edges[1:] + edges[:-1]) / 2)[known], rows[:, known]
    several = len(curves) > 1
    marker = "" if several else "."  # a point is a bin with episodes
    (line,) = panel.plot(centres, np.nanmean(rows, 0), marker=marker, label=label, color=color)
    if several:
        low, high = np.nanmin(rows, 0), np.nanmax(rows, 0)
        panel.fill_between(centres, low, high, color=line.get_color(), alpha=0.2, lw=0)


def _draw_reference(panel: Axes, config: Config, bins: int) -> None:
    curves = official_curves(config.task, config.env)
    if not curves:
        print(f"--reference: no official curve of {config.task} is here", file=sys.stderr)
        return
    label = f"official, recipe {curves[0].recipe}, {len(curves)} runs"
    _draw_band(panel, [(c.steps, c.scores) for c in curves], bins, label, _REFERENCE)


if __name__ == "__main__":
    run(main)
