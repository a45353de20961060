"""``python -m fastdreamer.evaluate``: scores of a trained agent. See ``--help``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from fastdreamer.cli import parse, run
from fastdreamer.config import Config
from fastdreamer.envs import VectorEnv, make_envs
from fastdreamer.errors import UsageError
from fastdreamer.reference import published_score
from fastdreamer.video import FORMATS, check_output, to_rgb, write_video, writing

if TYPE_CHECKING:
    from fastdreamer.loading import SavedRun

FPS = 15
"""Frames a second of a video: real time for Atari with an action repeat of 4."""


@dataclass(frozen=True)
class Options:
    """Play whole episodes with a trained agent, with random actions, or both; report the scores."""

    checkpoint: Path | None = None
    """Run directory, its checkpoints folder, or one .pt file."""
    episodes: int = 10
    """Episodes to play."""
    seed: int = 0
    """Seed of environments and sampling."""
    num_envs: int = 8
    """Environments stepped together (at most the number of episodes are made)."""
    mode: bool = False
    """Take the policy's most probable action instead of a sample."""
    random: bool = False
    """Also play as many episodes of uniformly random actions, to compare the agent with."""
    task: str | None = None
    """Task to play; default the checkpoint's. Needed for --random without a checkpoint."""
    video: Path | None = None
    """Write what the first environment shows to this .mp4 or .gif."""
    json: Path | None = None
    """Write the result to this .json file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to act; auto takes a GPU if there is one."""


def main() -> None:
    """Parse the command line, evaluate, print."""
    options = parse(Options, sys.argv[1:], "python -m fastdreamer.evaluate", Options())
    print(report(evaluate(options)))


def evaluate(options: Options) -> dict[str, Any]:
    """Play the episodes and write the files that are asked for.

    Returns:
        What --json writes: task, scores (raw reward units), mean, std, interval (95 % bootstrap),
        for a known Atari game human_normalised and published, and with --random beside an agent
        random (the same of its episodes), difference and standard_errors (see `standard_errors`).

    Raises:
        UsageError, CheckpointError, TaskError: in one line.
    """
    _check(options)
    from fastdreamer.evaluation import (
        agent_policy,
        play,
        random_policy,
        run_episodes,
        standard_errors,
        summarise,
    )
    from fastdreamer.loading import choose_device

    saved, config = _subject(options)
    count = min(options.num_envs, options.episodes)

    def make() -> VectorEnv:
        if saved is not None:
            return saved.envs(count, options.seed)
        return make_envs(config.task, count, options.seed, config.env)

    chance = partial(random_policy, seed=options.seed)
    envs = make()
    try:
        with _Watch(options, envs) as watch:
            if saved is None:
                policy = chance(envs)
            else:
                agent = saved.agent(envs, choose_device(options.device))
                policy = agent_policy(agent, count, options.seed, options.mode)
            ours = summarise(run_episodes(envs, policy, options.episodes, watch))
    finally:
        envs.close()
    result = _described(options, saved, config) | asdict(ours)
    if saved is not None and options.random:
        theirs = summarise(play(make, chance, options.episodes))
        result["random"] = asdict(theirs)
        result["difference"] = ours.mean - theirs.mean
        result["standard_errors"] = standard_errors(ours, theirs)
    result |= _published(result)
    if options.video is not None:
        with writing(options.video) as path:
            write_video(path, [to_rgb(f) for f in watch.frames], FPS, watch.scale)
    if options.json is not None:
        with writing(options.json) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def report(result: Mapping[str, Any]) -> str:
    """The result of :func:`evaluate` as text."""
    lines = [f"{result['task']}: {result['subject']}, {len(result['scores'])} episodes"]
    lines += [f"  episode {i:3}  score {s:g}" for i, s in enumerate(result["scores"], 1)]
    lines.append(_statistics(result))
    if "random" in result:
        lines.append(f"random actions, {len(result['random']['scores'])} episodes")
        lines.append(_statistics(result["random"]))
        line = f"difference of the agent to random actions {result['difference']:+.5g}"
        if result["standard_errors"] is not None:
            line += f", which is {result['standard_errors']:+.1f} standard errors"
        lines.append(line)
    if "human_normalised" in result:
        published = result["published"]
        line = f"human-normalised {result['human_normalised']:.3f}; published after 100k steps: "
        line += f"random {published['random']:g}, human {published['human']:g}"
        if published["dreamer"] is not None:
            line += f", DreamerV3 recipe {result['recipe']} {published['dreamer']:g}"
            line += f" ({published['dreamer_normalised']:.3f})"
        lines.append(line)
    return "\n".join(lines)


def _statistics(summary: Mapping[str, Any]) -> str:
    line = f"mean {summary['mean']:.5g}"
    if summary["interval"] is not None:
        low, high = summary["interval"]
        line += f", standard deviation {summary['std']:.4g}, 95 % interval of the mean "
        line += f"{low:.5g} to {high:.5g} (bootstrap)"
    return line


class _Watch:
    """Shows progress and keeps what the first environment shows, if a video is asked for."""

    def __init__(self, options: Options, envs: VectorEnv):
        self.frames: list[np.ndarray] = []
        spaces: Mapping[str, Any] = envs.obs_space.spaces
        images = [k for k, space in spaces.items() if len(space.shape) == 3]
        if options.video is not None and not images:
            raise UsageError(f"--video {options.video}: this task has no images, only vectors")
        self.key = images[0] if options.video is not None else None
        self.scale = max(1, 256 // spaces[self.key].shape[0]) if self.key else 1
        self._bar = tqdm(total=options.episodes, unit="episode", leave=False, disable=None)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, rows: Mapping[str, np.ndarray]) -> None:
        self._bar.update(min(int(rows["is_last"].sum()), self._bar.total - self._bar.n))
        if self.key is not None:
            self.frames.append(rows[self.key][0].copy())


def _check(options: Options) -> None:
    if options.checkpoint is None and not (options.random and options.task):
        raise UsageError("give --checkpoint DIR, or --random with --task NAME")
    if options.checkpoint is None and options.mode:
        raise UsageError("--mode is of an agent's policy: leave it out without --checkpoint")
    for option, value in (("--episodes", options.episodes), ("--num-envs", options.num_envs)):
        if value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}")
    check_output("--video", options.video, FORMATS)
    check_output("--json", options.json, (".json",))


def _subject(options: Options) -> tuple[SavedRun | None, Config]:
    """The checkpoint, if one is given, and the configuration that says what to play."""
    if options.checkpoint is None:
        return None, Config(task=str(options.task))
    from fastdreamer.loading import load_run

    saved = load_run(options.checkpoint)
    if options.task is not None:
        saved = replace(saved, config=replace(saved.config, task=options.task))
    return saved, saved.config


def _described(options: Options, saved: SavedRun | None, config: Config) -> dict[str, Any]:
    """What was played, by whom."""
    result: dict[str, Any] = {"task": config.task, "seed": options.seed}
    if saved is None:
        return result | {"subject": "random actions"}
    ratio = config.learner.replay_ratio
    policy = "most probable actions" if options.mode else "sampled actions"
    subject = f"recipe {config.recipe}, size {config.size}, {ratio:g} updates a step, "
    subject += f"{saved.step:,} steps, {policy}"
    return result | {
        "subject": subject,
        "checkpoint": str(saved.path),
        "step": saved.step,
        "recipe": config.recipe,
        "size": config.size,
        "updates_per_step": ratio,
        "mode": options.mode,
    }


def _published(result: Mapping[str, Any]) -> dict[str, Any]:
    """Human-normalised score and the published ones, where they are known."""
    published = published_score(result["task"], result.get("recipe", ""))
    if published is None:
        return {}
    values = asdict(published)
    if published.dreamer is not None:
        values["dreamer_normalised"] = published.normalise(published.dreamer)
    return {"human_normalised": published.normalise(result["mean"]), "published": values}


if __name__ == "__main__":
    run(main)
