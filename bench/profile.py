"""``python -m bench.profile``: where the time of one update goes, part by part. See ``--help``.

The parts are the learner's methods and the operators between them, and for each of them its
backward pass: the nodes that autograd made in it. What belongs to no part is the rest, so that the
parts sum to the whole. A part's floor is its dense FLOPs, counted in the same way in an update of
the reference, over the fastest matrix product measured in the same run.
"""

from __future__ import annotations

import json
import sys
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bench.results import origin, record
from bench.update import Clock, check
from bench.workload import PLAIN, Update
from fastdreamer.cli import parse, run
from fastdreamer.errors import UsageError
from fastdreamer.host import set_up_process
from fastdreamer.kernels import resolve
from fastdreamer.learner import Learner
from fastdreamer.video import writing

WARM_UP = 3  # updates before the first that counts
REST = "rest"


@dataclass(frozen=True)
class Options:
    """Time the parts of an update on a CPU: a batch of 16 x 64, horizon 15."""

    recipe: Literal["2023", "2025"] = "2025"
    """Which DreamerV3."""
    size: str = ""
    """Size of the networks; default s in recipe 2023, 1m in 2025."""
    obs: Literal["image", "vector"] = "image"
    """Observations: 64 x 64 x 3 images, or 24 numbers."""
    backend: Literal["auto", "reference", "cpp"] = "auto"
    """Our kernels."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of products."""
    rounds: int = 5
    """Updates; the one of median time is shown."""
    threads: int = 1
    """CPU threads. With one, times are the process's own, whatever else the machine does."""
    json: Path | None = None
    """A .json or .jsonl file for the result, one line."""
    record: bool = True
    """Append the result to bench/results/profile.jsonl."""
    device: Literal["cpu"] = "cpu"
    """Where to run."""


class Meter:
    """Shares out what a counter counts among the parts that run, the innermost first."""

    def __init__(self, read: Callable[[], float]):
        self.read, self.stack, self.last = read, [REST], read()
        self.spent: dict[str, float] = defaultdict(float)
        self.marks: list[tuple[int, str]] = []
        """From which of autograd's nodes on which part makes them."""

    def enter(self, part: str) -> None:
        self._book()
        self.stack.append(part)
        self._mark()

    def leave(self) -> None:
        self._book()
        self.stack.pop()
        self._mark()

    def owner(self, node: Node) -> str:
        """The part in which a node was made; those of parameters belong to the rest."""
        at = bisect(self.marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        is_parameter = node.name() == "torch::autograd::AccumulateGrad"
        return REST if at < 0 or is_parameter else self.marks[at][1]

    def _mark(self) -> None:
        self.marks.append((torch.autograd._get_sequence_nr(), self.stack[-1]))

    def _book(self) -> None:
        now = self.read()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = parse(Options, sys.argv[1:], "python -m bench.profile", Options())
    result = measure(options)
    print(table(result))
    if options.json:
        with writing(options.json) as path:
            path.write_text(json.dumps(result | origin()) + "\n")
    if options.record:
        print(f"appended to {record('profile', [result])}")


def measure(options: Options) -> dict[str, Any]:
    """A row of results.

    Raises:
        UsageError: an option is not valid.
    """
    workload = check(options)
    set_up_process(options.threads)
    try:
        ops = resolve(options.backend)
    except RuntimeError as error:
        raise UsageError(f"--backend: {error}") from None
    learner = Learner.make(workload.agent(ops), workload.learner)
    update = workload.update_of(learner, replace(PLAIN, precision=options.precision))
    for _ in range(WARM_UP):
        update()
    read = time.process_time if options.threads == 1 else time.perf_counter
    rounds = [metered(update, learner, read) for _ in range(options.rounds)]
    seconds = sorted(rounds, key=lambda spent: sum(spent.values()))[len(rounds) // 2]
    with workload.counted() as (counted, reference, counter):
        flops = metered(counted, reference, counter.get_total_flops)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    peak = max(Clock("cpu", read).peak(each) for each in {torch.float32, dtype})
    parts = {
        name: {"seconds": seconds.get(name, 0.0), "flops": int(flops.get(name, 0))}
        for name in sorted({*seconds, *flops}, key=lambda name: -seconds.get(name, 0.0))
    }
    return {
        "workload": workload.name,
        "batch": [workload.learner.batch_size, workload.learner.batch_length],
        "horizon": workload.learner.horizon,
        "backend": ops.backend,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "peak_flops_per_s": peak,
        "seconds": sum(part["seconds"] for part in parts.values()),
        "flops": sum(part["flops"] for part in parts.values()),
        "parts": parts,
    }


def metered(update: Update, learner: Learner, read: Callable[[], float]) -> dict[str, float]:
    """What one update adds to a counter, by part."""
    meter = Meter(read)
    with divided(learner, meter):
        meter.last = read()
        update()
        meter._book()
    return meter.spent


@contextmanager
def divided(learner: Learner, meter: Meter) -> Iterator[None]:
    """Tell the meter of every part of the learner's updates."""
    model = learner.agent.world_model
    parts = [
        (learner, "draw_noise", "noise"),
        (learner, "encode", "encoder"),
        (model.rssm, "observe", "posterior scan"),
        (learner, "predict", "world model's heads and losses"),
        (model, "decode", "decoder"),
        (model.rssm, "imagine", "rollout"),
        (learner, "judge", "imagined heads"),
        (learner, "behaviour_losses", "actor and critic losses"),
        (learner, "replay_value_loss", "replay value"),
        (learner, "step", "optimiser"),
        (learner, "update_target", "target critic's average"),
    ]
    with ExitStack() as stack:
        for owner, name, part in parts:
            if hasattr(owner, name):
                stack.enter_context(
                    patch.object(owner, name, timed(getattr(owner, name), meter, part))
                )
        for name in ("grad", "backward"):
            function = getattr(torch.autograd, name)
            stack.enter_context(patch.object(torch.autograd, name, backward(function, meter)))
        yield


def timed(function: Callable[..., Any], meter: Meter, part: str) -> Callable[..., Any]:
    """The function as a part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        meter.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            meter.leave()

    return call


def backward(function: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """One of autograd's functions of a loss: its nodes tell the meter the parts that made them."""

    def call(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        meter.enter(f"{REST} of backward")
        for node in nodes(loss):
            part = f"{meter.owner(node)}, backward"
            node.register_prehook(lambda _, part=part: meter.enter(part))
            node.register_hook(lambda *_: meter.leave())
        try:
            return function(loss, *args, **kwargs)
        finally:
            meter.leave()

    return call


def nodes(loss: Tensor) -> set[Node]:
    """All nodes of autograd's graph behind a loss."""
    found: set[Node] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return found


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table."""
    lines = ["| part | ms | share | floor, ms | times the floor |", "|---|---|---|---|---|"]
    whole = {"seconds": result["seconds"], "flops": result["flops"]}
    for name, part in {**result["parts"], "whole": whole}.items():
        floor = part["flops"] / result["peak_flops_per_s"]
        multiple = f"{part['seconds'] / floor:.1f}" if floor else "-"
        lines.append(
            f"| {name} | {1e3 * part['seconds']:.1f} | {part['seconds'] / result['seconds']:.0%} | "
            f"{1e3 * floor:.1f} | {multiple} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
