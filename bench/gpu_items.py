"""What `bench.gpu` runs, each item as rows of results.

Every function here gets the type of the device last; "cpu" is a dry run, which goes through the
same steps on the smallest networks.
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

from bench import operator_inputs, operators, update
from bench.results import ROOT
from bench.workload import PLAIN, Workload
from fastdreamer.config import PRESETS
from fastdreamer.errors import UserError
from fastdreamer.execution import Execution
from fastdreamer.kernels import resolve

Row = dict[str, Any]

MEMCHECKED = "rssm or lambda_return"  # tests that compute-sanitizer runs
PROFILED = 5  # updates
UNCOMPILED = ("rssm_observe", "rssm_imagine", "agc_laprop", "clip_adam", "ema", "policy_step")
"""Operators whose reference the compiler would unroll, for minutes."""
BFLOAT16 = {"rtol": 5e-2, "atol": 5e-2}
EXECUTIONS = {
    "cpu": {"eager": PLAIN},
    "cuda": {
        "eager": Execution("bf16", compile=False, graph=False),
        "compiled and captured": Execution("bf16", compile=True, graph=True),
    },
}
ATARI = ("atari100k-2025", "atari100k")
QUIET = ("--log.no-progress", "--eval-episodes", "0")
TRAIN = (sys.executable, "-m", "fastdreamer.train", *QUIET)
EVALUATE = (sys.executable, "-m", "fastdreamer.evaluate")


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
        environment = os.environ | {"FASTDREAMER_REQUIRE": backend}
        environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
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


def synchronisation(workload: tuple[str, str, str], device: str) -> Iterator[Row]:
    """Whether an update waits for the device, or reads from it."""
    for name, execution in EXECUTIONS[device].items():
        step = Workload(*workload, device).update(resolve("auto", device), execution)
        step(), step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        row: Row = {"execution": name, "ok": True}
        try:
            step()
        except RuntimeError as error:
            row |= {"ok": False, "error": str(error).splitlines()[0]}
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        yield row


def whole_update(workload: tuple[str, str, str], others: str, device: str) -> list[Row]:
    """`bench.update` of a workload."""
    recipe, size, obs = workload
    options = update.Options(recipe=recipe, size=size, obs=obs, device=device, rivals=others)
    if device == "cpu":
        options = replace(options, rivals="", rounds=1, compile=False)
    row = update.measure(options, gated=True)
    return [row | {"ok": True}]


def goldens(recipe: str, device: str) -> Iterator[Row]:
    """The golden tests of a recipe on every backend of ours that is timed."""
    for backend in ("triton", "cuda") if device == "cuda" else ("cpp",):
        row: Row = {"backend": backend, "ok": True}
        try:
            update.gate(Workload(recipe, "debug", "image", device), resolve(backend, device))
        except (RuntimeError, UserError) as error:
            row |= {"ok": False, "error": str(error)}
        yield row


def profile(workload: tuple[str, str, str], device: str) -> list[Row]:
    """Kernels of an update, how long the device is busy, what takes longest, memory."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    chosen = Workload(*workload, device)
    step = chosen.update(resolve("auto", device), list(EXECUTIONS[device].values())[-1])
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
            **memory(device),
            "longest": [[name, len(x) / PROFILED, sum(x)] for name, x in longest],
            "ok": True,
        }
    ]


def memory(device: str) -> dict[str, int]:
    """Bytes of a GPU that were allocated at most, and that are in use with graphs and all."""
    if device == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"allocated_bytes": torch.cuda.max_memory_allocated(), "held_bytes": total - free}


def operator_times(device: str) -> Iterator[Row]:
    """Every operator and shape of the presets on each backend that serves it.

    Beside the time stand the bytes of what goes in and out and the reference's FLOPs, as shares of
    what the device copies and multiplies in a second; small operands stay in its caches.
    """
    copied, product = ceilings(device)
    for case in cases(device):
        timings = {}
        for backend in ("reference", "compile(reference)", "triton", "cuda"):
            if operator := implementation(case, backend, device):
                try:
                    timings[backend] = time_case(case, operator, device)
                except AssertionError as error:
                    what = f"{case.label} {case.pass_} {case.shape} by {backend} is wrong"
                    yield {"ok": False, "error": f"{what}: {error}"[:500]}
        ours = [v for k, v in timings.items() if k in ("triton", "cuda")]
        if device == "cuda" and not ours:
            continue
        best = min(ours or timings.values())
        theirs = [v for k, v in timings.items() if k not in ("triton", "cuda")]
        yield {
            "operator": case.label,
            "pass": case.pass_,
            "shape": list(case.shape),
            "dtype": "bfloat16" if case.half else "float32",
            "seconds": timings,
            "bytes": case.bytes,
            "flops": case.flops,
            "copy_share": case.bytes / best / copied,
            "product_share": case.flops / best / product,
            "ratio": min(theirs) / best,
            "ok": True,
        }


@dataclass(frozen=True)
class Case:
    """One operator, pass and shape."""

    label: str
    shape: tuple[int, ...]
    inputs: list[Any]
    pass_of: Callable[[Callable, list[Any]], list[Tensor]]

    @property
    def half(self) -> bool:
        """The scans on a GPU multiply in bfloat16, as they do in a run."""
        return "rssm" in self.name and operators.tensors_of(self.inputs)[0].is_cuda

    def run(self, operator: Callable, inputs: list[Any]) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.half):
            return self.pass_of(operator, inputs)

    @property
    def name(self) -> str:
        return self.label.split()[0]

    @property
    def pass_(self) -> str:
        return "forward" if self.pass_of is operators.forward else "forward+backward"

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
    o, made = operators, operator_inputs
    both = (o.forward, o.forward_backward)
    table: list[tuple[str, dict[str, Any], Callable, tuple[Callable, ...]]] = [
        ("lambda_return", o.SHAPES, made.lambda_return, both),
        ("norm_act rms", o.ROWS, partial(made.norm_act, "rms"), both),
        ("norm_act layer", o.ROWS, partial(made.norm_act, "layer"), both),
        ("conv_norm_act", made.CONVOLUTIONS, made.conv_norm_act, both),
        ("latent_linear", o.FEATURES, made.latent_linear, both),
        ("image_loss", o.IMAGES, made.image_loss, both),
        *(
            (name, o.BINS, partial(made.twohot, name), both)
            for name in ("twohot_loss", "twohot_mean")
        ),
        *(
            (name, o.CATEGORICALS, partial(made.categorical, name), both)
            for name in ("unimix", "entropy", "kl", "balanced_kl", "sample")
        ),
        *(
            (name, o.STEPS, partial(made.gru_step, name), both)
            for name in ("gru_step", "block_gru_step")
        ),
        *(
            (f"rssm_observe {r}-{s}", {"replay": (16, 64)}, scan_inputs("observe", r), both[1:])
            for r, s in made.SCANS.items()
        ),
        *(
            (f"rssm_imagine {r}-{s}", {"starts": (1024, 15)}, scan_inputs("imagine", r), both[:1])
            for r, s in made.SCANS.items()
        ),
        *(
            (f"heads {r}-{s}", {"imagined": (o.IMAGINED,)}, heads_inputs(r), both)
            for r, s in made.SCANS.items()
        ),
        *(
            (f"policy_step {r}-{s}", {n: (n,) for n in o.ENVS}, policy_inputs(r), both[:1])
            for r, s in made.SCANS.items()
        ),
        (
            "agc_laprop",
            {"1m": ("1m",), "12m": ("12m",)},
            lambda x: made.step("agc_laprop", *x),
            both[:1],
        ),
        ("clip_adam", {"s": ("s",)}, lambda x: made.step("clip_adam", *x), both[:1]),
        ("ema", {r: (r, s) for r, s in o.TARGETS.items()}, lambda x: made.ema(*x), both[:1]),
    ]
    for label, shapes, make, passes in table:
        for shape in list(shapes.values())[: None if device == "cuda" else 1]:
            moved = tree_map(lambda x: _moved(x, device), make(shape))
            for run_ in passes if device == "cuda" else passes[:1]:
                yield Case(label, shape, moved, run_)


def scan_inputs(scan: str, recipe: str) -> Callable[[tuple[int, int]], list[Any]]:
    """Of a scan: (rows, steps) -> its inputs."""
    make = operator_inputs.observe if scan == "observe" else operator_inputs.imagine
    return lambda shape: make(recipe, *shape)


def heads_inputs(recipe: str) -> Callable[[tuple[int]], list[Any]]:
    """Of heads: (rows,) -> their inputs."""
    return lambda shape: operator_inputs.heads(recipe, *shape)


def policy_inputs(recipe: str) -> Callable[[tuple[int]], list[Any]]:
    """Of a policy step: (environments,) -> its inputs."""
    return lambda shape: operator_inputs.policy_step(recipe, *shape)


def _moved(x: Any, device: str) -> Any:
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def implementation(case: Case, backend: str, device: str) -> Callable | None:
    """The operator on a backend, or None where that has it not."""
    if backend == "compile(reference)":
        if device == "cpu" or case.name in UNCOMPILED:
            return None
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
    tolerance = BFLOAT16 if case.half else operators.SUM_TOLERANCE
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(*map(operators.tensors_of, copies), **tolerance)
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
    environment = os.environ | {"FASTDREAMER_REQUIRE": "cuda"}
    tests = ["-q", "-x", "-m", "operators", "--backend", "cuda", "--device", "cuda"]
    command = [program, "--error-exitcode", "3", sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(
        [*command, "-k", MEMCHECKED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return [{"ok": done.returncode == 0, "last": done.stdout.strip().splitlines()[-3:]}]


def train(minutes: float, device: str) -> list[Row]:
    """Go on with an Atari 100k run, the first that is not complete, then evaluate it."""
    preset, logdir = next_run()
    command = [*TRAIN, "--preset", preset, "--logdir", str(logdir), "--device", device]
    command += ["--size", "12m"] if preset.endswith("2025") else []
    started = time.monotonic()
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        running.wait(60 * minutes * 0.8)
    except subprocess.TimeoutExpired:
        running.terminate()  # it saves
        running.wait(60)
    trained = time.monotonic() - started
    scored = logdir / "evaluation.json"
    subprocess.run(
        [*EVALUATE, "--checkpoint", str(logdir), "--device", device, "--json", str(scored)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        timeout=60 * minutes * 0.2,
        check=True,
    )
    last, score = last_line(logdir), json.loads(scored.read_text())
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


def next_run() -> tuple[str, Path]:
    """Preset and directory of the first run that is not complete, or of the last."""
    for preset in ATARI:
        logdir = ROOT / "runs" / f"gpu-{preset}"
        if last_line(logdir)["step"] < PRESETS[preset].steps:
            break
    return preset, logdir


def last_line(logdir: Path) -> Row:
    """The last line of a run's metrics; step 0 where there is none."""
    path = logdir / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else {"step": 0}
