"""``python -m bench.gpu``: everything that needs a GPU, the most valuable first. See ``--help``.

Each item runs in a process of its own, because a fault on a GPU ends the process that causes it,
and appends what it measured to ``bench/results/gpu/<kind>.jsonl``. Items that are there for the
same commit and device are not run again, so the command can be repeated until all is there.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from bench import operators, rivals, update
from bench.results import RESULTS, ROOT, commit, device_name, record
from bench.workload import Workload
from fastdreamer.cli import parse, run
from fastdreamer.errors import UsageError, UserError
from fastdreamer.kernels import resolve
from fastdreamer.loading import choose_device

Row = dict[str, Any]

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
MEMCHECKED = "rssm or lambda_return"  # tests that compute-sanitizer runs
PROFILED = 5  # updates


@dataclass(frozen=True)
class Options:
    """Test and time fastdreamer on the GPU of this machine."""

    minutes: float = 10
    """Time limit; what does not fit is named, and run by the next call."""
    train: float = 0
    """Minutes for an Atari 100k run of each recipe after all else, resumed by the next call."""
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
    run: Callable[[str], list[Row]]


def items(options: Options) -> list[Item]:
    """All items, in the order of their value."""
    workloads = SMALL if options.dry_run else WORKLOADS
    recipes = {recipe: (recipe, size, obs) for recipe, size, obs in reversed(workloads)}
    tests = [
        Item(f"tests {backend}", "tests", 150, partial(operator_tests, backend))
        for backend in ("triton", "cuda")
    ]
    syncs = [
        Item(f"synchronisation {recipe}", "checks", 90, partial(synchronisation, workload))
        for recipe, workload in recipes.items()
    ]
    updates = [
        Item(f"update {' '.join(w)}", "updates", 240, partial(whole_update, w, options.rivals))
        for w in workloads
    ]
    profiles = [
        Item(f"profile {' '.join(w)}", "profiles", 90, partial(profile, w)) for w in workloads[:3]
    ]
    return [
        tests[0],
        *syncs,
        *updates[:2],
        tests[1],
        *profiles[:2],
        Item("operators", "operators", 240, operator_times),
        *updates[2:],
        *profiles[2:],
        Item("memory errors", "checks", 240, memory_errors),
        *(
            Item(f"train {preset}", "training", 60 * options.train, partial(train, preset, options))
            for preset in (("atari100k-2025", "atari100k") if options.train else ())
        ),
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
    if options.minutes <= 0 or options.train < 0:
        raise UsageError("--minutes must be above 0, --train at least 0")
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
    end, failed = time.monotonic() + 60 * (options.minutes + 2 * options.train), []
    done = set() if options.again or options.dry_run else finished()
    for item in chosen:
        left = end - time.monotonic()
        if item.name in done:
            print(f"{item.name}: has a result of this commit")
        elif left < LEAST:
            print(f"{item.name}: skipped, no time is left")
        else:
            started = time.monotonic()
            rows, problem = in_child(item, min(left, item.seconds), options)
            taken = f"({time.monotonic() - started:.0f} s)"
            for row in rows:
                print(f"{item.name}: {summary(row)} {taken}", flush=True)
            if problem:
                print(f"{item.name}: {problem} {taken}", flush=True)
            if problem or any(not row.get("ok", True) for row in rows):
                failed.append(item.name)
            if rows and not options.dry_run:
                record(f"gpu/{item.kind}", [row | {"item": item.name} for row in rows], "cuda")
    return failed


def finished() -> set[str]:
    """Names of the items with results of this commit on this device."""
    rows = [
        json.loads(line)
        for path in GPU_RESULTS.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    here = commit(), device_name("cuda")
    return {row["item"] for row in rows if (row["commit"], row["device"]) == here}


def in_child(item: Item, seconds: float, options: Options) -> tuple[list[Row], str]:
    """Run an item in a process of its own; its rows, and in a line what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        arguments = ["--child", item.name, "--out", str(out), "--rivals", options.rivals]
        arguments += ["--train", str(options.train)]
        arguments += ["--dry-run"] if options.dry_run else []
        command = [sys.executable, "-m", "bench.gpu", *arguments]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return [], f"stopped after {seconds:.0f} s"
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            return [], f"failed: {lines[-1] if lines else f'exit status {done.returncode}'}"
        return json.loads(out.read_text()), ""


def run_child(options: Options) -> None:
    """What ``--child`` asks for."""
    assert options.out is not None
    (item,) = (item for item in items(options) if item.name == options.child)
    options.out.write_text(json.dumps(item.run("cpu" if options.dry_run else "cuda")))


def summary(row: Row) -> str:
    """A row in a line."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items() if not isinstance(v, dict | list))


def ahead_of_time() -> None:
    """Compile every kernel for every GPU that we know, without one.

    Raises:
        UserError: one fails to compile, or spills registers.
    """
    for command in (["fastdreamer.kernels.aot"], ["fastdreamer.kernels.ptxas"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False)
        if done.returncode:
            raise UserError(f"python -m {command[0]} failed")


def operator_tests(backend: str, device: str) -> list[Row]:
    """The operators' tests on the device; where it is a CPU, a few in Triton's interpreter."""
    if device == "cpu":
        if backend == "cuda":
            return [{"ok": True, "skipped": "the CUDA library needs a GPU"}]
        return [_pytest(backend, device, "-k", "lambda_return", interpret=True)]
    return [_pytest(backend, device)]


def _pytest(backend: str, device: str, *more: str, interpret: bool = False) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "operators", "--backend", backend, "--device", device]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *more]
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpret else {})
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        if not report.exists():
            return {"ok": False, "error": "pytest could not run"}
        suite = next(ET.parse(report).getroot().iter("testsuite"))
    count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname')}::{case.get('name')}: {fault.get('message', '')[:200]}"
        for case in suite.iter("testcase")
        for fault in (*case.findall("failure"), *case.findall("error"))
    ]
    ran = count["tests"] - count["skipped"]
    return {"backend": backend, "ok": not bad and ran > 0, **count, "bad": bad[:50]}


def synchronisation(workload: tuple[str, str, str], device: str) -> list[Row]:
    """Whether an update waits for the device, or reads from it."""
    chosen = Workload(*workload, device)
    step = chosen.update(resolve("auto", device))
    step(), step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return [{"ok": False, "error": str(error).splitlines()[0]}]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [{"ok": True}]


def whole_update(workload: tuple[str, str, str], others: str, device: str) -> list[Row]:
    """`bench.update` of a workload, and the memory that ours takes."""
    recipe, size, obs = workload
    options = update.Options(recipe=recipe, size=size, obs=obs, device=device, rivals=others)
    if device == "cpu":
        options = replace(options, rivals="", rounds=1, compile=False)
    row = update.measure(options)
    return [row | {"ok": True}]


def profile(workload: tuple[str, str, str], device: str) -> list[Row]:
    """How many kernels an update launches, how long the device is busy, what takes longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    chosen = Workload(*workload, device)
    step = chosen.update(resolve("auto", device))
    clock = update.Clock(device)
    for _ in range(3):
        clock.time(step)
    seconds = statistics.median(clock.time(step) for _ in range(20 if device == "cuda" else 1))
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profiler(activities=[activity]) as recorded:
        for _ in range(PROFILED):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    on_device = [e for e in recorded.events() if device == "cpu" or e.device_time_total > 0]
    by_name: dict[str, list[float]] = {}
    for event in on_device:
        took = event.device_time_total if device == "cuda" else event.self_cpu_time_total
        by_name.setdefault(event.name, []).append(took / 1e6 / PROFILED)
    busy = sum(map(sum, by_name.values()))
    longest = sorted(by_name.items(), key=lambda x: -sum(x[1]))[:30]
    return [
        {
            "workload": chosen.name,
            "seconds": seconds,
            "kernels": len(on_device) / PROFILED,
            "busy_s": busy,
            "idle_share": max(0.0, 1 - busy / seconds),
            "longest": [[name, len(x) / PROFILED, sum(x)] for name, x in longest],
            "ok": True,
        }
    ]


def operator_times(device: str) -> list[Row]:
    """Every operator and shape of the presets on each backend that serves it.

    Beside the time stand the bytes of what goes in and out and the reference's FLOPs, as shares of
    what the device copies and multiplies in a second.
    """
    copied, product = ceilings(device)
    rows = []
    for case in cases(device):
        timings = {}
        for backend in ("reference", "compile(reference)", "triton", "cuda"):
            if operator := implementation(case, backend, device):
                timings[backend] = time_case(case, operator, device)
        ours = [v for k, v in timings.items() if k in ("triton", "cuda")]
        if device == "cuda" and not ours:
            continue
        best = min(ours or timings.values())
        theirs = [v for k, v in timings.items() if k not in ("triton", "cuda")]
        rows.append(
            {
                "operator": case.label,
                "pass": case.pass_,
                "shape": list(case.shape),
                "seconds": timings,
                "bytes": case.bytes,
                "flops": case.flops,
                "copy_share": case.bytes / best / copied,
                "product_share": case.flops / best / product,
                "ratio": min(theirs) / best,
                "ok": True,
            }
        )
    return rows


@dataclass(frozen=True)
class Case:
    """One operator, pass and shape."""

    label: str
    shape: tuple[int, ...]
    inputs: list[Any]
    run: Callable[[Callable, list[Any]], list[Tensor]]

    @property
    def name(self) -> str:
        return self.label.split()[0]

    @property
    def pass_(self) -> str:
        return "forward" if self.run is operators.forward else "forward+backward"

    def reference(self) -> list[Tensor]:
        return self.run(getattr(operators.REFERENCE, self.name), self.inputs)

    @property
    def bytes(self) -> int:
        """Of everything that goes in and out once."""
        tensors = [*operators.tensors_of(self.inputs), *self.reference()]
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def flops(self) -> int:
        """Matrix products of the reference."""
        with FlopCounterMode(display=False) as counter:
            self.reference()
        return counter.get_total_flops()


def cases(device: str) -> Iterator[Case]:
    """What `bench.operators` times, on the device; on a CPU one of each."""
    o = operators
    both = (o.forward, o.forward_backward)
    table: list[tuple[str, dict[str, Any], Callable, tuple[Callable, ...]]] = [
        ("lambda_return", o.SHAPES, o.lambda_return_inputs, both),
        ("norm_act rms", o.ROWS, partial(o.norm_act_inputs, "rms"), both),
        ("norm_act layer", o.ROWS, partial(o.norm_act_inputs, "layer"), both),
        ("latent_linear", o.FEATURES, o.latent_linear_inputs, both),
        *(
            (name, o.BINS, partial(o.twohot_inputs, name), both)
            for name in ("twohot_loss", "twohot_mean")
        ),
        *(
            (name, o.CATEGORICALS, partial(o.categorical_inputs, name), both)
            for name in ("unimix", "entropy", "kl", "balanced_kl", "sample")
        ),
        *(
            (name, o.STEPS, partial(o.gru_step_inputs, name), both)
            for name in ("gru_step", "block_gru_step")
        ),
        *(
            (f"rssm_observe {r}-{s}", {"replay": (16, 64)}, scan_inputs("observe", r), both[1:])
            for r, s in o.SCANS.items()
        ),
        *(
            (f"rssm_imagine {r}-{s}", {"starts": (1024, 15)}, scan_inputs("imagine", r), both[:1])
            for r, s in o.SCANS.items()
        ),
        (
            "agc_laprop",
            {"1m": ("1m",), "12m": ("12m",)},
            lambda x: o.agc_laprop_inputs(*x),
            both[:1],
        ),
    ]
    for label, shapes, make, passes in table:
        for shape in list(shapes.values())[: None if device == "cuda" else 1]:
            moved = tree_map(lambda x: _moved(x, device), make(shape))
            for run_ in passes if device == "cuda" else passes[:1]:
                yield Case(label, shape, moved, run_)


def scan_inputs(scan: str, recipe: str) -> Callable[[tuple[int, int]], list[Any]]:
    """Of a scan: (rows, steps) -> its inputs."""
    make = operators.observe_inputs if scan == "observe" else operators.imagine_inputs
    return lambda shape: make(recipe, *shape)


def _moved(x: Any, device: str) -> Any:
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def implementation(case: Case, backend: str, device: str) -> Callable | None:
    """The operator on a backend, or None where that has it not."""
    if backend == "compile(reference)":
        if device == "cpu" or "rssm" in case.name or case.name == "agc_laprop":
            return None  # the compiler would unroll the loops over steps, for minutes
        torch._dynamo.reset()
        return torch.compile(getattr(operators.REFERENCE, case.name), dynamic=False)
    try:
        ops = resolve(backend, device)
    except RuntimeError:
        return None
    return getattr(ops, case.name) if ops.served_by[case.name] == backend else None


def time_case(case: Case, operator: Callable, device: str) -> float:
    """Seconds, without what a launch costs; of an operator that agrees with its reference.

    Raises:
        AssertionError: it does not agree.
    """
    copies = [copy.deepcopy(case.inputs) for _ in range(2)]  # some operators change them
    actual = case.run(operator, copies[0])
    expected = case.run(getattr(operators.REFERENCE, case.name), copies[1])
    torch.testing.assert_close(actual, expected, **operators.SUM_TOLERANCE)
    if device == "cpu":
        return update.Clock(device).time(lambda: case.run(operator, case.inputs))
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(lambda: case.run(operator, case.inputs), rep=50) / 1e3


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), FLOP/s of the fastest large product."""
    clock = update.Clock(device)
    source = torch.ones(1 << (28 if device == "cuda" else 20), device=device)
    target = torch.empty_like(source)
    seconds = min(clock.time(lambda: target.copy_(source)) for _ in range(5))
    return 8 * source.numel() / seconds, max(clock.peak(dtype) for dtype in update.DTYPES)


def memory_errors(device: str) -> list[Row]:
    """compute-sanitizer over the tests of the CUDA operators."""
    program = shutil.which("compute-sanitizer")
    if program is None or device == "cpu":
        return [{"ok": True, "skipped": "compute-sanitizer is not there"}]
    tests = ["-q", "-x", "-m", "operators", "--backend", "cuda", "--device", "cuda"]
    command = [program, "--error-exitcode", "3", sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(
        [*command, "-k", MEMCHECKED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [{"ok": done.returncode == 0, "last": done.stdout.strip().splitlines()[-3:]}]


def train(preset: str, options: Options, device: str) -> list[Row]:
    """Go on with an Atari 100k run for the minutes that are given, then evaluate it."""
    logdir = ROOT / "runs" / f"gpu-{preset}"
    command = [
        sys.executable,
        "-m",
        "fastdreamer.train",
        "--preset",
        preset,
        "--logdir",
        str(logdir),
    ]
    command += ["--device", device, "--log.no-progress", "--eval-episodes", "0"]
    command += ["--size", "12m"] if preset.endswith("2025") else []
    started = time.monotonic()
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        running.wait(60 * options.train * 0.8)
    except subprocess.TimeoutExpired:
        running.terminate()  # it saves
        running.wait(60)
    trained = time.monotonic() - started
    scored = logdir / "evaluation.json"
    subprocess.run(
        [sys.executable, "-m", "fastdreamer.evaluate", str(logdir), "--json", str(scored)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        timeout=60 * options.train * 0.2,
        check=True,
    )
    last = json.loads((logdir / "metrics.jsonl").read_text().splitlines()[-1])
    score = json.loads(scored.read_text())
    return [
        {
            "preset": preset,
            "step": last["step"],
            "updates": last["updates"],
            "seconds_now": trained,
            "seconds_in_all": last["time"],
            "updates_per_second": last.get("updates_per_second"),
            "score": score["mean"],
            "interval": score["interval"],
            "ok": True,
        }
    ]


if __name__ == "__main__":
    run(main)
