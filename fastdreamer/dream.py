"""``python -m fastdreamer.dream``: a video of what an agent imagines. See ``--help``.

A row of the picture is one example: on the left what the world model imagines (green border while
it still observes, red after), in the middle what the environment showed under the same actions,
on the right the reconstruction from all observations. The panels of one frame are of one step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastdreamer.cli import parse, run
from fastdreamer.envs import VectorEnv
from fastdreamer.errors import UsageError
from fastdreamer.video import FORMATS, check_output, enlarge, to_rgb, write_video, writing

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from torch import Tensor

    from fastdreamer.actions import ActionSpec, Part
    from fastdreamer.agent import Agent
    from fastdreamer.evaluation import Policy
    from fastdreamer.imagination import Prediction
    from fastdreamer.replay import Replay

PLAYED = 500
"""Steps played beyond an example's length, from which its start is drawn."""
_OBSERVED, _IMAGINED = (64, 160, 96), (208, 96, 80)  # RGB of a panel's border
_TEXT, _BACKGROUND = (235, 235, 235), (24, 24, 28)
_GAP, _BORDER = 10, 3  # pixels


@dataclass(frozen=True)
class Options:
    """Show what a trained agent imagines beside what happens, and measure the difference."""

    checkpoint: Path | None = None
    """Run directory, its checkpoints folder, or one .pt file (required)."""
    out: Path = Path("dream.gif")
    """The .gif or .mp4 file to write."""
    examples: int = 4
    """Examples, each from another environment: the rows of the picture."""
    context: int = 5
    """Steps that the agent observes before it imagines."""
    horizon: int = 45
    """Steps that it imagines."""
    seed: int = 0
    """Seed of environments, starts and sampling."""
    fps: float = 8.0
    """Steps shown a second."""
    scale: int = 0
    """Screen pixels for a pixel of the image; 0 makes it about 256 wide."""
    json: Path | None = None
    """Write the errors by step to this .json file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""


def main() -> None:
    """Parse the command line, imagine, write the video, print the errors."""
    options = parse(Options, sys.argv[1:], "python -m fastdreamer.dream", Options())
    result = film(options)
    print(report(result))
    print(f"wrote {options.out}")


def film(options: Options) -> dict[str, Any]:
    """Play, imagine, and write the files that are asked for.

    Returns:
        What --json writes: task, step, context, horizon, and mean squared pixel errors by
        imagined step.

    Raises:
        UsageError, CheckpointError, TaskError: in one line.
    """
    _check(options)
    from fastdreamer.evaluation import agent_policy
    from fastdreamer.imagination import predict
    from fastdreamer.loading import choose_device, load_run

    assert options.checkpoint is not None
    saved = load_run(options.checkpoint)
    envs = saved.envs(options.examples, options.seed)
    try:
        agent = saved.agent(envs, choose_device(options.device))
        if not agent.world_model.decoder.images:
            raise UsageError(f"task {saved.config.task} has no images to draw, only vectors")
        policy = agent_policy(agent, options.examples, options.seed)
        steps = PLAYED + options.context + options.horizon
        played = _play(envs, policy, agent.spec, steps)
    finally:
        envs.close()
    rows = _cut(played, options)
    obs = {k: rows[k] for k in agent.obs_space}
    predicted = predict(
        agent,
        obs,
        rows["action"],
        rows["is_first"],
        rows["reward"],
        options.context,
        options.seed,
    )
    with writing(options.out) as path:
        write_video(path, draw(predicted, envs.action_names, options.scale), options.fps)
    result = {
        "task": saved.config.task,
        "recipe": saved.config.recipe,
        "size": saved.config.size,
        "step": saved.step,
        "examples": options.examples,
        "context": options.context,
        "horizon": rows["reward"].shape[1] - options.context,
        "mean_squared_pixel_error": predicted.errors(),
    }
    if options.json is not None:
        with writing(options.json) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def report(result: Mapping[str, Any]) -> str:
    """The result of :func:`film` as a table over the horizon."""
    errors, horizon = result["mean_squared_pixel_error"], result["horizon"]
    lines = [
        f"{result['task']}: recipe {result['recipe']}, size {result['size']}, after "
        f"{result['step']:,} steps; {result['examples']} examples, {result['context']} observed",
        "mean squared pixel error (pixels 0..1)",
        "imagined step " + "".join(f"{name:>15}" for name in errors),
    ]
    shown = sorted({1, 2, 5, *range(10, horizon, 10), horizon} & set(range(1, horizon + 1)))
    lines += [f"{t:13} " + "".join(f"{e[t - 1]:15.5f}" for e in errors.values()) for t in shown]
    lines.append(f"{'mean':>13} " + "".join(f"{np.mean(e):15.5f}" for e in errors.values()))
    return "\n".join(lines)


def dream_frames(
    agent: Agent,
    obs: Mapping[str, Tensor],
    action: Tensor,
    is_first: Tensor,
    reward: Tensor,
    context: int = 5,
    seed: int = 0,
    action_names: Sequence[str] | None = None,
    scale: int = 0,
) -> np.ndarray:
    """The frames of the video, (T, height, width, 3) uint8, for B examples of T steps.

    Takes what :func:`fastdreamer.imagination.predict` and :func:`draw` take.
    """
    from fastdreamer.imagination import predict

    predicted = predict(agent, obs, action, is_first, reward, context, seed)
    return draw(predicted, action_names, scale)


def replay_frames(
    agent: Agent,
    replay: Replay,
    rng: np.random.Generator,
    length: int,
    examples: int = 3,
    action_names: Sequence[str] | None = None,
) -> np.ndarray | None:
    """The video of replayed sequences within one episode each, for a run in progress.

    Args:
        rng: draws the sequences, so that the replay's own draws stay as they are.
        length: T, halved until sequences without a reset are found.

    Returns:
        As :func:`dream_frames`; None where no sequence of at least 8 steps is found.
    """
    while length >= 8:
        index = replay.choose(rng, 32 * examples, length)
        rows = replay.gather(index, length)
        whole = ~rows["is_first"][:, 1:].any(1)
        if whole.sum() >= examples:
            rows = {k: v[whole][:examples] for k, v in rows.items()}
            obs = {k: rows[k] for k in agent.obs_space}
            inputs = (rows["action"], rows["is_first"], rows["reward"])
            return dream_frames(agent, obs, *inputs, action_names=action_names)
        length //= 2
    return None


def draw(
    predicted: Prediction, action_names: Sequence[str] | None = None, scale: int = 0
) -> np.ndarray:
    """Pictures of a prediction: (T, height, width, 3) uint8.

    Under each panel stands the reward of that step: predicted from the imagined state, true, and
    predicted from the posterior; in the middle also the action that led to the step.

    Args:
        action_names: of the discrete actions; their indices where None.
        scale: screen pixels for a pixel; 0 makes panels about 256 pixels wide.
    """
    from fastdreamer.imagination import KINDS

    scale = scale or max(1, 256 // predicted.images["true"].shape[3])
    panels = [
        enlarge(to_rgb((predicted.images[k].clip(0, 1) * 255).round().astype(np.uint8)), scale)
        for k in KINDS
    ]  # each (B, T, height, width, 3)
    sheet = _Sheet(panels[0].shape[3], panels[0].shape[2], len(panels[0]))
    frames = []
    for t in range(panels[0].shape[1]):
        texts = [_captions(predicted, b, t, action_names) for b in range(len(panels[0]))]
        frames.append(sheet.paint([p[:, t] for p in panels], texts, t, predicted.context))
    return np.stack(frames)


def _captions(
    predicted: Prediction, example: int, t: int, action_names: Sequence[str] | None
) -> list[str]:
    """What stands under the three panels of an example at step ``t``."""
    rewards = [f"reward {r[example, t]:.2f}" for r in predicted.rewards.values()]
    if t > 0:
        action = predicted.actions[example, t - 1]
        rewards[1] = f"{_name(action, predicted.parts, action_names)}, {rewards[1]}"
    return rewards


def _name(action: np.ndarray, parts: Sequence[Part], names: Sequence[str] | None) -> str:
    """An action vector (A,) in words: a lone discrete part by its name, others by numbers."""
    words = []
    for part, values in zip(
        parts, np.split(action, np.cumsum([p.size for p in parts])[:-1]), strict=True
    ):
        if not part.discrete:
            words += [f"{x:+.1f}" for x in values]
        elif names and len(parts) == 1:
            words.append(names[int(values.argmax())])
        else:
            words.append(f"{part.name} {values.argmax()}")
    return " ".join(words[:4])


class _Sheet:
    """Lays out rows of three panels of ``width`` x ``height`` pixels with text."""

    def __init__(self, width: int, height: int, rows: int):
        from PIL import ImageFont

        self.font_size = min(16, max(7, width // 16))
        self.font = ImageFont.load_default(self.font_size)
        self.line = self.font_size + 6
        self.pitch = (width + 2 * _BORDER + _GAP, height + 2 * _BORDER + self.line + _GAP)
        self.size = (3 * self.pitch[0] + _GAP, rows * self.pitch[1] + 2 * self.line + _GAP)

    def paint(
        self, panels: Sequence[np.ndarray], texts: Sequence[Sequence[str]], t: int, context: int
    ) -> np.ndarray:
        """One frame (height, width, 3) from three panels (B, h, w, 3) and their captions."""
        from PIL import Image, ImageDraw

        from fastdreamer.imagination import KINDS

        canvas = Image.new("RGB", self.size, _BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        colour = _OBSERVED if t < context else _IMAGINED
        state = f"observed {t + 1} of {context}" if t < context else f"imagined {t - context + 1}"
        pen.text((_GAP, 4), f"step {t} ({state})", colour, self.font)
        for column, kind in enumerate(KINDS):
            x = _GAP + column * self.pitch[0]
            pen.text((x, 4 + self.line), kind, _TEXT, self.font)
            for row, image in enumerate(panels[column]):
                y = 2 * self.line + _GAP // 2 + row * self.pitch[1]
                border = colour if column == 0 else _BACKGROUND
                self._panel(pen, (x, y), image, border)
                canvas.paste(Image.fromarray(image), (x + _BORDER, y + _BORDER))
                below = y + len(image) + 2 * _BORDER
                pen.text((x, below), texts[row][column], _TEXT, self.font)
        return np.asarray(canvas)

    @staticmethod
    def _panel(
        pen: ImageDraw, corner: tuple[int, int], image: np.ndarray, border: tuple[int, int, int]
    ) -> None:
        x, y = corner
        height, width = image.shape[:2]
        pen.rectangle((x, y, x + width + 2 * _BORDER - 1, y + height + 2 * _BORDER - 1), border)


def _check(options: Options) -> None:
    if options.checkpoint is None:
        raise UsageError("give --checkpoint DIR")
    for name in ("examples", "context", "horizon"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.scale < 0:
        raise UsageError(f"--scale must not be negative, got {options.scale}")
    if not 0.1 <= options.fps <= 50:
        raise UsageError(f"--fps must lie in 0.1..50, got {options.fps:g}")
    check_output("--out", options.out, FORMATS)
    check_output("--json", options.json, (".json",))


def _play(
    envs: VectorEnv, policy: Policy, spec: ActionSpec, steps: int
) -> list[dict[str, np.ndarray]]:
    """Rows of ``steps`` steps, with the vector of the "action" taken after each."""
    played, rows = [], envs.reset()
    for _ in range(steps):
        action = policy(rows)
        played.append({**rows, "action": spec.encode(action)})
        rows = envs.step(action)
    return played


def _cut(played: Sequence[Mapping[str, np.ndarray]], options: Options) -> dict[str, Tensor]:
    """One window (B, T, ...) within an episode of each environment, its start drawn evenly.

    Where episodes are too short, the horizon is: as much as the longest of each allows.
    """
    import torch

    firsts = np.stack([rows["is_first"] for rows in played])  # (steps, B)
    starts = [np.flatnonzero(f).tolist() for f in firsts.T]
    spans = [list(zip(s, [*s[1:], len(played)], strict=True)) for s in starts]
    longest = min(max(end - start for start, end in span) for span in spans)
    length = min(options.context + options.horizon, longest)
    if length <= options.context:
        raise UsageError(
            f"--context {options.context}: episodes last only {longest} steps; give less"
        )
    rng = np.random.default_rng(options.seed)
    valid = [[t for a, e in span for t in range(a, e - length + 1)] for span in spans]
    at = [int(rng.choice(v)) for v in valid]
    return {
        k: torch.from_numpy(
            np.stack([[played[t + i][k][b] for i in range(length)] for b, t in enumerate(at)])
        )
        for k in played[0]
    }


if __name__ == "__main__":
    run(main)
