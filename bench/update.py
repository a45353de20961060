"""``python -m bench.update``: times whole updates of ours and of rivals in turns. See ``--help``.

Ours is timed only when its golden tests pass. The floor is the reference's dense FLOPs over the
fastest matrix product measured in the same run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bench import rivals
from bench.results import ROOT, origin, record
from bench.workload import PLAIN, Update, Workload
from fastdreamer.cli import parse, run
from fastdreamer.config import SIZES
from fastdreamer.errors import UsageError, UserError
from fastdreamer.execution import Execution
from fastdreamer.host import set_up_process
from fastdreamer.kernels import Ops, library, resolve
from fastdreamer.loading import choose_device
from fastdreamer.video import check_output, writing

WARM_UP = 2  # updates after the first one
TRIALS = 2  # updates that decide between a rival's settings
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices whose product is the peak
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """Time whole updates: batches of 16 x 64, horizon 15."""

    recipe: Literal["2023", "2025"] = "2023"
    """Which DreamerV3."""
    size: str = ""
    """Size of the networks; default s in recipe 2023, 1m in 2025."""
    obs: Literal["image", "vector"] = "image"
    """Observations: 64 x 64 x 3 images, or 24 numbers."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to run."""
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    """Our kernels."""
    rivals: str = ""
    """Names with commas: sheeprl, torchrl; or "installed": all that are. Those without a learner of
    the workload are left out."""
    compile: bool = True
    """Also try the rivals' settings with torch.compile, which compiles for minutes on a CPU."""
    rounds: int = 5
    """Updates of each contender."""
    threads: int = 0
    """CPU threads; 0 keeps PyTorch's default."""
    json: Path | None = None
    """A .json or .jsonl file for the result, one line."""
    record: bool = True
    """Append the result to bench/results/updates.jsonl."""


@dataclass
class Contender:
    """One update, and what its calls took (seconds)."""

    settings: str
    update: Update
    first_call: float
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)

    def summary(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "seconds": self.seconds,
            "min_s": min(self.times),
            "max_s": max(self.times),
            "first_call_s": self.first_call,
        }


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = parse(Options, sys.argv[1:], "python -m bench.update", Options())
    result = measure(options)
    print(report(result))
    if options.json:
        with writing(options.json) as path:
            path.write_text(json.dumps(result | origin(result["device_kind"])) + "\n")
    if options.record:
        print(f"appended to {record('updates', [result], result['device_kind'])}")


def measure(options: Options, gated: bool = False) -> dict[str, Any]:
    """Everything that was asked for, as one row of results.

    Args:
        gated: the golden tests have passed before.

    Raises:
        UsageError: an option is not valid, or a rival is not installed.
        UserError: our golden tests fail.
    """
    workload = check(options)
    names = chosen(options, workload)
    set_up_process(options.threads)
    try:
        ops = resolve(options.backend, workload.device)
    except RuntimeError as error:
        raise UsageError(f"--backend: {error}") from None
    load = os.getloadavg()[0]
    if not gated:
        gate(workload, ops)
    clock = Clock(workload.device)
    ours, tried = clock.best("ours", own_settings(workload, ops))
    others = {
        name: clock.best(name, rivals.load(name).updates(workload, options.compile))
        for name in names
    }
    peaks = clock.in_turns([ours, *(best for best, _ in others.values())], options.rounds)
    return {
        "workload": workload.name,
        "recipe": workload.recipe,
        "size": workload.size,
        "obs": workload.obs,
        "batch": [workload.learner.batch_size, workload.learner.batch_length],
        "horizon": workload.learner.horizon,
        "backend": ops.backend,
        "device_kind": workload.device,
        "rounds": options.rounds,
        "load_before": load,
        **ours.summary(),
        "tried": tried,
        "rivals": {name: best.seconds for name, (best, _) in others.items()},
        "rivals_at": {
            name: best.summary()
            | {
                "version": rivals.installed_version(name),
                "tried": attempts,
                "compile": options.compile,
            }
            for name, (best, attempts) in others.items()
        },
        "ratio": ratio(ours, [best for best, _ in others.values()]),
        **floor(workload.flops(), peaks, ours.seconds),
    }


def check(options: Options) -> Workload:
    """The workload of valid options.

    Raises:
        UsageError: one is not valid.
    """
    size = options.size or ("s" if options.recipe == "2023" else "1m")
    if size not in SIZES[options.recipe]:
        valid = ", ".join(SIZES[options.recipe])
        raise UsageError(f"--size {size}: recipe {options.recipe} has {valid}")
    if options.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {options.rounds}")
    if options.threads < 0:
        raise UsageError(f"--threads must be at least 0, got {options.threads}")
    check_output("--json", options.json, (".json", ".jsonl"))
    return Workload(options.recipe, size, options.obs, choose_device(options.device).type)


def chosen(options: Options, workload: Workload) -> list[str]:
    """Names of the rivals to time; one without a learner of this workload is left out, and said.

    Raises:
        UsageError: one is unknown or not installed, or none of those named has such a learner.
    """
    every = options.rivals == "installed"
    asked = set(rivals.installed() if every else filter(None, options.rivals.split(",")))
    able = {name for name in asked if rivals.load(name).supports(workload)}
    others = " and ".join(sorted(asked - able))
    if others and not able and not every:
        raise UsageError(f"--rivals: no learner of {workload.name} in {others}")
    # After TorchRL has registered its schemas with Hydra, sheeprl's configuration fails.
    names = [name for name in rivals.NAMES if name in able]
    for name in names:
        rivals.require(name)
    if others:
        print(f"left out, having no learner of {workload.name}: {others}", flush=True)
    return names


def own_settings(workload: Workload, ops: Ops) -> rivals.Makers:
    """Our updates by their settings.

    On a CPU float32, and bfloat16 where its kernels have products in it; on a GPU everything that
    there is to choose, with plain PyTorch among it.
    """
    chosen = {ops.backend: [PLAIN]}
    if ops.backend == "cpp" and library.isa() in library.BFLOAT16_SETS:
        chosen[ops.backend].append(replace(PLAIN, precision="bf16"))
    if workload.device == "cuda":
        flags = (True, False)
        every = [Execution("bf16", compile, graph) for compile in flags for graph in flags]
        chosen = {backend: every for backend in dict.fromkeys((ops.backend, "triton", "reference"))}
    return {
        f"{backend}, {execution}": partial(
            workload.update, resolve(backend, workload.device), execution
        )
        for backend, executions in chosen.items()
        for execution in executions
    }


def gate(workload: Workload, ops: Ops) -> None:
    """Run the golden tests of the recipe, which compare with the original implementation.

    Raises:
        UserError: they fail.
    """
    recipe, device = workload.recipe, workload.device
    folders = sorted((ROOT / "tests" / "golden").glob(f"v{recipe}*"))
    golden = [argument for folder in folders for argument in ("--golden", str(folder))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_golden.py", *golden]
    done = subprocess.run(
        [*command, "--device", device, "--backend", ops.backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise UserError(
            f"no time is given: the golden tests of recipe {recipe} fail on backend "
            f"{ops.backend} ({' '.join(last)})"
        )


@dataclass(frozen=True)
class Clock:
    """Times calls on one device."""

    device: str
    read: Callable[[], float] = time.perf_counter

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call, with the device idle before and after."""
        self._wait()
        started = self.read()
        call()
        self._wait()
        return self.read() - started

    def start(self, settings: str, make: Callable[[], Update]) -> Contender:
        """A contender, built and warm; its first call includes building and compiling."""
        started = time.perf_counter()
        update = make()
        self.time(update)
        contender = Contender(settings, update, time.perf_counter() - started)
        for _ in range(WARM_UP):
            update()
        return contender

    def best(self, name: str, makers: rivals.Makers) -> tuple[Contender, dict[str, float | str]]:
        """Someone's update at the fastest of its settings, and what a few took at each.

        Raises:
            UserError: it fails at every setting.
        """
        best: Contender | None = None
        fastest, tried = float("inf"), {}
        for settings, make in makers.items():
            try:
                contender = self.start(settings, make)
                seconds = min(self.time(contender.update) for _ in range(TRIALS))
            except Exception as error:  # whatever is raised rules out this setting alone
                tried[settings] = f"{type(error).__name__}: {error}".splitlines()[0]
                _progress(name, settings, str(tried[settings]))
                continue
            tried[settings] = seconds
            first = f"first call {contender.first_call:.3g} s"
            _progress(name, settings, f"{seconds:.4g} s, {first}")
            if seconds < fastest:
                best, fastest = contender, seconds
        if best is None:
            raise UserError(f"{name} fails at every setting")
        return best, tried

    def in_turns(self, contenders: Sequence[Contender], rounds: int) -> dict[str, float]:
        """Time the contenders in turns; returns the peak of matrix products by dtype, FLOP/s."""
        peaks = {str(dtype).removeprefix("torch."): 0.0 for dtype in DTYPES}
        for _ in range(rounds):
            for name in peaks:
                peaks[name] = max(peaks[name], self.peak(getattr(torch, name)))
            for contender in contenders:
                contender.times.append(self.time(contender.update))
        return peaks

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest of a few products of large square matrices.

        Products that take over a second, as in bfloat16 without instructions for it, come once.
        """
        rows, fastest = PRODUCT[self.device], float("inf")
        a, b = (torch.randn(rows, rows, device=self.device).to(dtype) for _ in range(2))
        for _ in range(5):
            fastest = min(fastest, self.time(lambda: a @ b))
            if fastest > 1:
                break
        return 2 * rows**3 / fastest

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _progress(name: str, settings: str, text: str) -> None:
    print(f"{name} ({settings}): {text}", flush=True)


def ratio(ours: Contender, others: Sequence[Contender]) -> float | None:
    """Seconds of the fastest rival over ours; None without rivals."""
    return min(x.seconds for x in others) / ours.seconds if others else None


def floor(flops: int, peaks: dict[str, float], seconds: float) -> dict[str, Any]:
    """The time that the dense FLOPs alone would take, and ours as a multiple of it."""
    least = flops / max(peaks.values())
    return {
        "flops": flops,
        "peak_flops_per_s": peaks,
        "floor_s": least,
        "floor_multiple": seconds / least,
    }


def report(result: dict[str, Any]) -> str:
    """A result in a few lines."""
    lines = [f"{result['workload']}: batch 16 x 64, horizon 15, {result['rounds']} rounds"]
    for name, row in {"ours": result, **result["rivals_at"]}.items():
        lines.append(
            f"{name} ({row['settings']}): {row['seconds']:.4g} s, {row['min_s']:.4g} to "
            f"{row['max_s']:.4g}; first call {row['first_call_s']:.3g} s"
        )
    if result["ratio"] is not None:
        lines.append(f"ratio: {result['ratio']:.2f} (the fastest rival's seconds over ours)")
    peak = max(result["peak_flops_per_s"].values())
    lines.append(
        f"floor: {result['floor_s']:.4g} s ({result['flops'] / 1e12:.3g} T at "
        f"{peak / 1e12:.3g} TFLOP/s); ours is {result['floor_multiple']:.2f} times that"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
