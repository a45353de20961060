"""``python -m bench.gpu``: everything that needs a GPU, the most valuable first. See ``--help``.

Each item runs in a process of its own, because a fault on a GPU ends the process that causes it,
and appends what it measured to ``bench/results/gpu/<kind>.jsonl``. Items that are there for the
same commit and device are not run again, so the command can be repeated until all is there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench import gpu_items, rivals
from bench.gpu_items import Row
from bench.results import RESULTS, ROOT, commit, device_name, record
from fastdreamer.cli import parse, run
from fastdreamer.errors import UsageError, UserError
from fastdreamer.kernels import resolve
from fastdreamer.loading import choose_device

GPU_RESULTS = RESULTS / "gpu"
LEAST = 20.0  # seconds that an item needs; with less time left none is begun
WORKLOADS = (  # recipe, size, observations
    ("2025", "1m", "vector"),
    ("2023", "s", "image"),
    ("2025", "12m", "image"),
    ("2025", "1m", "image"),
    ("2025", "12m", "vector"),
    ("2025", "200m", "vector"),
    ("2025", "200m", "image"),
)
SMALL = (("2025", "debug", "vector"), ("2023", "debug", "image"))  # of a dry run


@dataclass(frozen=True)
class Options:
    """Test and time fastdreamer on the GPU of this machine."""

    minutes: float = 0
    """Minutes for a real Atari 100k run after all else (recipe 2025 until it is complete, then
    2023); the next call resumes it."""
    limit: float = 10
    """Minutes for all else; what does not fit is named, and run by the next call."""
    items: str = ""
    """Names of items with commas, instead of all; "list" prints them."""
    again: bool = False
    """Also run items that have results of this commit."""
    rivals: str = "installed"
    """As in bench.update."""
    dry_run: bool = False
    """No GPU: compile every kernel ahead of time, print what it needs, fail if one spills; then
    run the items' logic on the CPU with the smallest networks and record nothing."""
    child: str = ""
    """Run this one item in this process and write its rows into the file named by --out."""
    out: Path | None = None
    """See --child."""


@dataclass(frozen=True)
class Item:
    """One thing to run, in at most ``seconds``; ``run`` gets the device's type."""

    name: str
    kind: str
    seconds: float
    run: Callable[[str], Iterable[Row]]
    needs: str = ""
    """The item without whose success this one is not run."""


def items(options: Options) -> list[Item]:
    """All items, in the order of their value."""
    workloads, m = SMALL if options.dry_run else WORKLOADS, options.minutes

    def item(name: str, kind: str, seconds: float, function: Callable, *args: object) -> Item:
        return Item(name, kind, seconds, partial(function, *args))

    def named(kind: str, seconds: float, function: Callable, *args: object) -> list[Item]:
        return [
            item(f"{kind} {' '.join(w)}", f"{kind}s", seconds, function, w, *args)
            for w in workloads
        ]

    timed = named("update", 240, gpu_items.whole_update, options.rivals)
    updates = [
        replace(each, needs=f"goldens {recipe}")
        for each, (recipe, _, _) in zip(timed, workloads, strict=True)
    ]
    recipes = dict.fromkeys(recipe for recipe, _, _ in workloads)
    profiles = named("profile", 90, gpu_items.profile)
    syncs = named("synchronisation", 90, gpu_items.synchronisation)
    return [
        item("tests triton", "tests", 150, gpu_items.operator_tests, "triton"),
        *(item(f"goldens {r}", "tests", 150, gpu_items.goldens, r) for r in recipes),
        *syncs[:2],
        *updates[:2],
        item("tests cuda", "tests", 150, gpu_items.operator_tests, "cuda"),
        *profiles[:2],
        item("operators", "operators", 240, gpu_items.operator_times),
        *updates[2:],
        *profiles[2:4],
        item("memory errors", "checks", 240, gpu_items.memory_errors),
        *([item("train", "training", 60 * m + 120, gpu_items.train, m)] if m else []),
    ]


def main() -> None:
    """Parse the command line, run what is left to do, print what was found."""
    options = parse(Options, sys.argv[1:], "python -m bench.gpu", Options())
    if options.child:
        run_child(options)
        return
    chosen = choose(options)
    if options.items == "list":
        print("\n".join(f"{item.name} (at most {item.seconds:g} s)" for item in chosen))
        return
    if options.dry_run:
        ahead_of_time()
    else:
        print(introduction())
    failed = in_order(chosen, options)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}")


def choose(options: Options) -> list[Item]:
    """The items that are asked for.

    Raises:
        UsageError: an option is not valid, or there is no GPU.
    """
    if options.limit <= 0 or options.minutes < 0:
        raise UsageError("--limit must be above 0, --minutes at least 0")
    everything = items(options)
    names = [name.strip() for name in options.items.split(",") if name.strip()]
    if options.items in ("", "list"):
        names = [item.name for item in everything]
    if unknown := set(names) - {item.name for item in everything}:
        valid = ", ".join(item.name for item in everything)
        raise UsageError(f"--items: unknown {sorted(unknown)[0]!r}, valid are {valid}")
    if not (options.dry_run or options.items == "list"):
        choose_device("cuda")  # raises where there is none
    return [item for item in everything if item.name in names]


def introduction() -> str:
    """Device, versions, and which of our libraries it will run."""
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    lines = [
        f"{device_name('cuda')} (compute capability {capability}), PyTorch {torch.__version__}, "
        f"CUDA {torch.version.cuda}",
        f"commit {commit()}",
    ]
    for name in rivals.NAMES:
        there = rivals.installed_version(name) if name in rivals.installed() else "not installed"
        lines.append(f"{name}: {there}")
    for backend in ("triton", "cuda"):
        try:
            served = resolve(backend, "cuda").served_by
            mine = [name for name, by in served.items() if by == backend]
            lines.append(f"backend {backend}: {', '.join(mine)}")
        except RuntimeError as error:
            lines.append(str(error))
    return "\n".join(lines)


def in_order(chosen: list[Item], options: Options) -> list[str]:
    """Run the items while time lasts; returns the names of those that failed."""
    end, failed = time.monotonic() + 60 * (options.limit + options.minutes) + 120, []
    done = set() if options.dry_run else finished()
    for item in chosen:
        left = end - time.monotonic()
        if item.name in done and not options.again:
            print(f"{item.name}: has a result of this commit")
        elif item.needs and item.needs not in done:
            print(f"{item.name}: skipped, {item.needs} has not passed")
        elif left < LEAST:
            print(f"{item.name}: skipped, no time is left")
        else:
            started = time.monotonic()
            rows, problem = in_child(item, min(left, item.seconds), options)
            if problem:
                rows.append({"ok": False, "error": problem})
            taken = f"({time.monotonic() - started:.0f} s)"
            for row in rows:
                print(f"{item.name}: {summary(row)} {taken}", flush=True)
            if all(row["ok"] for row in rows):
                done.add(item.name)
            else:
                failed.append(item.name)
            if rows and not options.dry_run:
                record(f"gpu/{item.kind}", [row | {"item": item.name} for row in rows], "cuda")
    return failed


def finished() -> set[str]:
    """Names of the items whose last call succeeded with this commit on this device."""
    rows = [
        json.loads(line)
        for path in GPU_RESULTS.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    here = commit(), device_name("cuda")
    calls: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        if (row["commit"], row["device"]) == here:
            calls.setdefault(row["item"], {}).setdefault(row["date"], []).append(row["ok"])
    return {item for item, by_date in calls.items() if all(by_date[max(by_date)])}


def in_child(item: Item, seconds: float, options: Options) -> tuple[list[Row], str]:
    """Run an item in a process of its own; its rows, and in a line what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        arguments = ["--child", item.name, "--out", str(out), "--rivals", options.rivals]
        arguments += ["--minutes", str(options.minutes)]
        arguments += ["--dry-run"] if options.dry_run else []
        command = [sys.executable, "-m", "bench.gpu", *arguments]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe)
        problem = ""
        try:
            lines = child.communicate(timeout=seconds)[0].strip().splitlines()
            if child.returncode:
                problem = f"failed: {lines[-1] if lines else f'exit status {child.returncode}'}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started
            child.wait()
            problem = f"stopped after {seconds:.0f} s"
        written = out.read_text().splitlines() if out.exists() else []
        return [json.loads(line) for line in written], problem


def run_child(options: Options) -> None:
    """What ``--child`` asks for."""
    assert options.out is not None
    (item,) = (item for item in items(options) if item.name == options.child)
    with options.out.open("w") as file:
        for row in item.run("cpu" if options.dry_run else "cuda"):
            print(json.dumps(row), file=file, flush=True)


def summary(row: Row) -> str:
    """A row in a line."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items() if not isinstance(v, dict | list))


def ahead_of_time() -> None:
    """Compile every kernel for every GPU that we know, without one.

    Raises:
        UserError: one fails to compile, or spills registers.
    """
    modules = ["fastdreamer.kernels.aot"]
    if shutil.which("nvcc"):
        modules.append("bench.nvcc")
    else:
        print("nvcc is not in the path: the CUDA kernels are not compiled")
    for module in modules:
        if subprocess.run([sys.executable, "-m", module], cwd=ROOT, check=False).returncode:
            raise UserError(f"python -m {module} failed")


if __name__ == "__main__":
    run(main)
