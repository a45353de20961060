"""``python -m bench.acting``: latency of a policy step, observation in, action out."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.results import origin, record
from bench.update import Clock, check
from bench.update import Options as UpdateOptions
from bench.workload import Workload
from fastdreamer.cli import parse, run
from fastdreamer.errors import UsageError
from fastdreamer.execution import Act
from fastdreamer.host import set_up_process
from fastdreamer.kernels import BACKENDS, resolve
from fastdreamer.video import check_output, writing

WARM_UP = 5
STEPS = 20  # between two looks at the clock


@dataclass(frozen=True)
class Options:
    """Time policy steps, as a run takes them."""

    recipe: Literal["2023", "2025"] = "2023"
    """Which DreamerV3."""
    size: str = ""
    """Size of the networks; default s in recipe 2023, 1m in 2025."""
    obs: Literal["image", "vector"] = "image"
    """As in bench.update."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to run."""
    envs: tuple[int, ...] = (1, 8)
    """Environments that step together, at most 16."""
    rounds: int = 10
    """Of 20 steps, each backend in turn."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's default."""
    json: Path | None = None
    """A .json or .jsonl file for the results, a line each."""
    record: bool = True
    """Append the results to bench/results/acting.jsonl."""


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = parse(Options, sys.argv[1:], "python -m bench.acting", Options())
    rows = measure(options)
    for row in rows:
        times = ", ".join(f"{k} {1e3 * v:.3g} ms" for k, v in row["seconds"].items())
        print(f"{row['workload']}, {row['envs']} environment(s): {times}")
    device = rows[0]["device_kind"]
    if options.json:
        with writing(options.json) as path:
            path.write_text("".join(json.dumps(row | origin(device)) + "\n" for row in rows))
    if options.record:
        print(f"appended to {record('acting', rows, device)}")


def measure(options: Options) -> list[dict[str, Any]]:
    """A row for each number of environments, with the median seconds of a step by backend.

    Raises:
        UsageError: an option is not valid.
    """
    same = {
        k: getattr(options, k) for k in ("recipe", "size", "obs", "device", "rounds", "threads")
    }
    workload = check(UpdateOptions(**same))
    check_output("--json", options.json, (".json", ".jsonl"))
    most = workload.shape[0]
    if not options.envs or not all(0 < n <= most for n in options.envs):
        raise UsageError(f"--envs must be 1 to {most}, got {options.envs}")
    set_up_process(options.threads)
    clock, rows = Clock(workload.device), []
    for envs in options.envs:
        steps = {name: step for name in BACKENDS if (step := policy(workload, name, envs))}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                times[name].append(clock.time(step) / STEPS)
        rows.append(
            {
                "workload": workload.name,
                "device_kind": workload.device,
                "envs": envs,
                "rounds": options.rounds,
                "seconds": {k: statistics.median(v) for k, v in times.items()},
                "min_s": {k: min(v) for k, v in times.items()},
                "max_s": {k: max(v) for k, v in times.items()},
            }
        )
    return rows


def policy(workload: Workload, backend: str, envs: int) -> Callable[[], None] | None:
    """Warm policy steps on a backend, or None where it is not available."""
    try:
        ops = resolve(backend, workload.device)
    except RuntimeError:
        return None
    agent, on_gpu = workload.agent(ops), workload.device == "cuda"
    agent.bf16 = on_gpu
    generator = torch.Generator(workload.device).manual_seed(0)
    act, carry = Act(agent, generator, graph=on_gpu), agent.initial_carry(envs)
    obs = {k: workload.batch[k][:envs, 0] for k in agent.obs_space}
    first = torch.zeros(envs, dtype=torch.bool, device=workload.device)

    def steps(count: int = STEPS) -> None:
        nonlocal carry
        for _ in range(count):
            carry = act(obs, first, carry)
            carry.action.cpu()  # the environment waits for it

    steps(WARM_UP)
    return steps


if __name__ == "__main__":
    run(main)
