"""Times every operator on each backend, beside the eager reference and torch.compile of it.

Run it by ``python -m pytest bench/operators.py``. Backends take turns, so that a busy moment of
the machine hits them all; an operator that disagrees with its reference is not timed.
"""

from __future__ import annotations

import math
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


def lambda_return_inputs(shape: tuple[int, int]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(shape, generator=g) for _ in range(2))
    discount = 0.997 * torch.rand(shape, generator=g).gt(0.01)
    return [x.requires_grad_() for x in (reward, discount, value)] + [torch.tensor(0.95)]


def norm_act_inputs(shape: tuple[int, int]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(shape, generator=g), torch.rand(shape[1], generator=g)
    return [x.requires_grad_(), scale.requires_grad_(), None, "rms", 1e-4]


def layer_norm_act_inputs(shape: tuple[int, int]) -> list[Any]:
    x, scale, *_ = norm_act_inputs(shape)
    shift = torch.randn(shape[1], generator=torch.Generator().manual_seed(1))
    return [x, scale, shift.requires_grad_(), "layer", 1e-3]


def twohot_mean_inputs(shape: tuple[int, int]) -> list[Any]:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return [logits.requires_grad_(), "symexp"]


def twohot_loss_inputs(shape: tuple[int, int]) -> list[Any]:
    logits, layout = twohot_mean_inputs(shape)
    return [logits, torch.randn(shape[0], generator=torch.Generator().manual_seed(1)), layout]


# Operator and kind, how to make its inputs, and shapes of size1m: of 16 x 64 steps or imagined.
CASES = {
    "lambda_return": (lambda_return_inputs, ((1024, 15), (16, 63))),
    "norm_act": (norm_act_inputs, ((1024, 64), (15360, 64), (16 * 64 * 32 * 32, 24))),
    "norm_act layer": (layer_norm_act_inputs, ((1024, 64), (15360, 64), (16 * 64 * 32 * 32, 24))),
    "twohot_loss": (twohot_loss_inputs, ((1024, 255), (16384, 255))),
    "twohot_mean": (twohot_mean_inputs, ((1024, 255), (16384, 255))),
}
WORK = [(name, shape) for name, (_, shapes) in CASES.items() for shape in shapes]
LARGE = 1_000_000  # elements from which a few calls tell as much as fifty


def forward(operator: Callable[..., Tensor], inputs: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [operator(*inputs)]


def forward_backward(operator: Callable[..., Tensor], inputs: list[Any]) -> list[Tensor]:
    ret = operator(*inputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
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
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(("name", "shape"), WORK, ids=str)
def bench_operator(benchmark, backend, pass_, name, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    stem = name.split()[0]
    operator, inputs = implementation(stem, backend, shape), CASES[name][0](shape)
    benchmark.group = f"{name} {pass_} {shape}"

    started = time.perf_counter()
    actual = run(operator, inputs)
    timing = TIMINGS.setdefault(
        (name, pass_, backend, shape), Timing(time.perf_counter() - started)
    )
    for x, y in zip(actual, run(getattr(REFERENCE, stem), inputs), strict=True):
        # Sums over rows cancel: what rounding leaves is relative to the largest.
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().amax().item())

    rounds = 5 if math.prod(shape) > LARGE else 50
    benchmark.pedantic(run, (operator, inputs), rounds=rounds, warmup_rounds=rounds // 5)
    timing.medians.append(benchmark.stats.stats.median)
