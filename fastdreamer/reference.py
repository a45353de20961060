"""Published scores and learning curves, which come with the source checkout."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fastdreamer.envs.base import EnvOptions, fold

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "reference"

# Columns of atari100k_compare.csv, by recipe.
_COLUMNS = {
    "2023": "dreamerv3_v1_2023_runs_in_Simulus_repo",
    "2025": "dreamerv3_nature2025_official_json",
}


@dataclass(frozen=True)
class Published:
    """Scores of one Atari game after 100k steps, in raw reward units."""

    random: float
    human: float
    dreamer: float | None
    """DreamerV3 of the asked recipe, mean over the published seeds."""

    def normalise(self, score: float) -> float:
        """Human-normalised: 0 is random play, 1 is human."""
        return (score - self.random) / (self.human - self.random)


@dataclass(frozen=True)
class Curve:
    """A learning curve of one seed: scores (episode returns) over environment steps."""

    steps: np.ndarray
    scores: np.ndarray
    frames: int
    """Frames in a step."""
    recipe: str
    """Which DreamerV3 it is of."""


def published_score(task: str, recipe: str) -> Published | None:
    """Published scores of an Atari game; None for other tasks, or without the source checkout."""
    path, game = FOLDER / "atari100k_compare.csv", atari_name(task)
    if game is None or not path.exists():
        return None
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if fold(row["game"]) == game:
                dreamer = row.get(_COLUMNS.get(recipe, ""))
                score = float(dreamer) if dreamer else None
                return Published(float(row["random"]), float(row["human"]), score)
    return None


def official_curves(task: str, options: EnvOptions) -> list[Curve]:
    """The official learning curves of a task, one per seed; [] where none is known.

    Those of DeepMind Control from vectors were already published in May 2023, with the code of
    recipe 2023.

    Args:
        task: as :func:`fastdreamer.envs.make_envs` takes it. Atari games and DeepMind Control
            (from vectors and, with ``options.dmc_images``, from images) are known.
        options: of our environments; the official curves count frames, ours the agent's steps.
    """
    game, control = atari_name(task), control_name(task)
    if game is not None:
        rows, frames, recipe = _rows("atari100k").get(f"atari{game}"), options.action_repeat, "2025"
    elif control is not None:
        suite, recipe = ("dmc_vision", "2025") if options.dmc_images else ("dmc_proprio", "2023")
        rows, frames = _rows(suite).get(f"dmc{control}"), options.dmc_repeat
    else:
        return []
    return [
        Curve(np.array(row["xs"]) / frames, np.array(row["ys"]), frames, recipe)
        for row in rows or []
    ]


def same_task(one: str, other: str) -> bool:
    """Whether two spellings mean the same task."""
    return one == other or any(
        name(one) is not None and name(one) == name(other) for name in (atari_name, control_name)
    )


@cache
def atari_name(task: str) -> str | None:
    """An Atari game's name in small letters without separators; None for other tasks."""
    from fastdreamer.envs import TaskError
    from fastdreamer.envs.pool import atari_games, find_atari

    prefix, colon, name = task.partition(":")
    try:
        if colon and prefix == "envpool":
            found = name if name in atari_games().values() else None
        else:
            found = find_atari(name if prefix == "atari" else task)
    except TaskError:  # no envpool, as on another operating system
        found = None
    return None if found is None else fold(found.rpartition("-")[0])


@cache
def control_name(task: str) -> str | None:
    """A task of DeepMind Control in small letters without separators; None for other tasks."""
    from fastdreamer.envs import TaskError
    from fastdreamer.envs.control import dmc_tasks, find_dmc
    from fastdreamer.envs.pool import import_envpool

    prefix, _, name = task.partition(":")
    try:
        import_envpool(task)
        found = name if prefix == "envpool" else find_dmc(task)
    except TaskError:  # no envpool, or no such task
        found = None
    names = {envpool_id: known for known, envpool_id in dmc_tasks().items()} if found else {}
    return fold(names[found]) if found in names else None


@cache
def _rows(suite: str) -> dict[str, list[dict]]:
    """Rows of a suite's file by folded task name."""
    path = FOLDER / "scores" / f"{suite}-dreamerv3.json.gz"
    tasks: dict[str, list[dict]] = {}
    if path.exists():
        with gzip.open(path, "rt") as file:
            for row in json.load(file):
                tasks.setdefault(fold(row["task"]), []).append(row)
    return tasks
