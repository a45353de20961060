"""Times every operator on each backend, beside the eager reference and torch.compile of it.

Run it by ``python -m pytest bench/operators.py``. Backends take turns, so that a busy moment of
the machine hits them all; an operator that disagrees with its reference is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.results import record
from fastdreamer import kernels

torch.compiler.config.force_disable_caches = True  # or the first call would not show compiling

REFERENCE = kernels.resolve("reference")
BACKENDS = ("reference", "compile(reference)", "cpp")
ROUNDS = range(5)
SHAPES = {"imagination": (1024, 15), "replay": (16, 63)}  # N, T of every preset's 16 x 64 batch
PASSES = ("forward", "forward+backward")

Key = tuple[str, str, str, tuple[int, int]]


@dataclass
class Timing:
    """One operator on one backend: what its first call cost, and a median for each round."""

    first_call: float
    medians: list[float] = field(default_factory=list)


TIMINGS: dict[Key, Timing] = {}


@pytest.fixture(scope="module", autouse=True)
def _record_when_done():
    yield
    rows = [_row(key, timing) for key, timing in TIMINGS.items()]
    if rows:
        print(f"\nappended {len(rows)} results to {record('operators', rows)}")


def _row(key: Key, timing: Timing) -> dict[str, Any]:
    operator, pass_, backend, shape = key
    return {
        "operator": operator,
        "pass": pass_,
        "backend": backend,
        "dtype": "float32",
        "shape": shape,
        "median_s": statistics.median(timing.medians),
        "min_s": min(timing.medians),
        "max_s": max(timing.medians),
        "rounds": len(timing.medians),
        "first_call_s": timing.first_call,
    }


def lambda_return_inputs(shape: tuple[int, int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(shape, generator=g) for _ in range(2))
    discount = 0.997 * torch.rand(shape, generator=g).gt(0.01)
    return [x.requires_grad_() for x in (reward, discount, value)] + [torch.tensor(0.95)]


def forward(operator: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [operator(*inputs)]


def forward_backward(operator: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    ret = operator(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [ret.detach(), *torch.autograd.grad(ret.square().sum(), wanted)]


@cache
def implementation(name: str, backend: str, shape: tuple[int, int]) -> Callable[..., Tensor]:
    reference = getattr(REFERENCE, name)
    if backend == "compile(reference)":
        return torch.compile(reference, fullgraph=True, dynamic=False)
    if backend == "reference":
        return reference
    ops = kernels.resolve(backend)
    assert ops.served_by[name] == backend, f"{name} is served by {ops.served_by[name]}"
    return getattr(ops, name)


@pytest.mark.parametrize("backend", BACKENDS)  # the topmost varies fastest: backends take turns
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("pass_", PASSES)
def bench_lambda_return(benchmark, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key = ("lambda_return", pass_, backend, shape)
    operator, inputs = implementation("lambda_return", backend, shape), lambda_return_inputs(shape)
    benchmark.group = f"lambda_return {pass_} {shape}"

    started = time.perf_counter()
    actual = run(operator, inputs)
    timing = TIMINGS.setdefault(key, Timing(time.perf_counter() - started))
    torch.testing.assert_close(actual, run(REFERENCE.lambda_return, inputs))

    benchmark.pedantic(run, (operator, inputs), rounds=50, warmup_rounds=5)
    timing.medians.append(benchmark.stats.stats.median)
