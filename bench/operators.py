"""Times every operator on each backend, beside the eager reference and torch.compile of it.

Run it by ``python -m pytest bench/operators.py``. Backends take turns, so that a busy moment of
the machine hits them all; an operator that disagrees with its reference is not timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import operator_inputs
from bench.operator_inputs import CONVOLUTIONS, REFERENCE, SCANS
from bench.results import record
from fastdreamer import kernels
from fastdreamer.kernels.rssm_imagine import Rollout

torch.compiler.config.force_disable_caches = True  # or the first call would not show compiling
torch._dynamo.config.recompile_limit = 64  # one function for all shapes of an operator

BACKENDS = ("reference", "compile(reference)", "cpp")
ROUNDS = range(5)
SHAPES = {"imagination": (1024, 15), "replay": (16, 63)}  # N, T of every preset's 16 x 64 batch
# (B T, S, K) of the latents by size, and (H B T, A) of the policy.
CATEGORICALS = {
    "2025-1m": (1024, 32, 4),
    "2025-12m": (1024, 32, 16),
    "2023-s": (1024, 32, 32),
    "policy": (15360, 18),
}
ROWS = {
    "posterior": (1024, 64),
    "heads": (16384, 64),
    "convolution": (16 * 64 * 32 * 32, 24),
}
# N (1 + H), D, S, K, units of the heads on imagined states, by size.
FEATURES = {
    "2023-xs": (16384, 256, 32, 32, 256),
    "2023-s": (16384, 512, 32, 32, 512),
    "2025-12m": (16384, 2048, 32, 16, 256),
}
IMAGINED = 16384  # N (1 + H)
BINS = {"replay": (1024, 255), "imagination": (16384, 255)}
IMAGES = {"replay": (1024, 64, 64, 3)}
PASSES = ("forward", "forward+backward")
# B, D, U, G of both cells.
STEPS = {"replay": (16, 512, 64, 8), "imagination": (1024, 512, 64, 8)}
ENVS = (1, 8)
STEPPED = {"agc_laprop": "12m", "clip_adam": "s"}  # size of the agent
TARGETS = {"2025": "12m", "2023": "s"}
SCAN_BACKENDS = ("reference", "cpp", "cpp bf16")
# Sums over rows cancel, and so do means over bins.
SUM_TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}
# PyTorch's float32 norm of a tensor of a million elements is itself wrong by 1e-5, that of the 16
# million gradients of size s by 8.3e-5.
STEP_TOLERANCE = {
    "agc_laprop": {"rtol": 5e-5, "atol": 1e-5},
    "clip_adam": {"rtol": 1e-4, "atol": 1e-5},
}
# In bfloat16, the norm of the difference: of a million draws some fall otherwise.
BFLOAT16_DISTANCE = 2**-5
POOLING_DISTANCE = 1e-3
"""Where rounding chooses between the two largest of four, the gradient goes to another pixel."""

Key = tuple[str, str, str, tuple[int, ...]]


@dataclass
class Timing:
    """One operator on one backend: what its first call cost, and a median for each round."""

    first_call: float
    medians: list[float] = field(default_factory=list)


TIMINGS: dict[Key, Timing] = {}


@pytest.fixture(scope="module", autouse=True)
def _record_when_done():
    yield
    rows = [_row(key, timing) for key, timing in TIMINGS.items() if timing.medians]
    if rows:
        print(f"\nappended {len(rows)} results to {record('operators', rows)}")


def _row(key: Key, timing: Timing) -> dict[str, Any]:
    operator, pass_, backend, shape = key
    return {
        "operator": operator,
        "pass": pass_,
        "backend": backend,
        "dtype": "bfloat16" if backend.endswith("bf16") else "float32",
        "shape": shape,
        "median_s": statistics.median(timing.medians),
        "min_s": min(timing.medians),
        "max_s": max(timing.medians),
        "rounds": len(timing.medians),
        "first_call_s": timing.first_call,
    }


def tensors_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, list | tuple):
        return [x for part in tree for x in tensors_of(part)]
    return [tree] if isinstance(tree, Tensor) else []


def outputs_of(results: Tensor | tuple[Any, ...] | None) -> list[Tensor]:
    """What every backend gives."""
    if isinstance(results, Rollout):
        results = results._replace(policy=None)
    return tensors_of(results if isinstance(results, tuple) else [results])


def forward(operator: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        return outputs_of(operator(*inputs))


def forward_backward(operator: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    outputs = outputs_of(operator(*inputs))
    wanted = [x for x in tensors_of(inputs) if x.requires_grad]
    loss = torch.stack([y.square().sum() for y in outputs]).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in outputs), *grads]


@cache
def implementation(name: str, backend: str, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    reference = getattr(REFERENCE, name)
    if backend == "compile(reference)":
        return torch.compile(reference, fullgraph=True, dynamic=False)
    if backend == "reference":
        return reference
    library, *precision = backend.split()
    if precision and kernels.library.isa() not in kernels.library.BFLOAT16_SETS:
        pytest.skip("this processor's products are in float32")
    ops = kernels.resolve(library)
    assert ops.served_by[name] == library, f"{name} is served by {ops.served_by[name]}"
    return in_bfloat16(getattr(ops, name)) if precision else getattr(ops, name)


def in_bfloat16(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return operator(*inputs)

    return run


def in_turns(shapes: dict[str, tuple[int, ...]]) -> Callable[[Callable], Callable]:
    """Every pass and shape in every round; what is applied last varies fastest: the backend."""

    def decorate(bench: Callable) -> Callable:
        bench = pytest.mark.parametrize("pass_", PASSES)(bench)
        bench = pytest.mark.parametrize("shape", shapes.values(), ids=shapes.keys())(bench)
        bench = pytest.mark.parametrize("round_", ROUNDS)(bench)
        return pytest.mark.parametrize("backend", BACKENDS)(bench)

    return decorate


def measure(
    benchmark: Any,
    key: Key,
    inputs: list[Any],
    rounds: int = 50,
    tolerance: Mapping[str, float] = MappingProxyType({}),
    distance: float | None = None,
) -> None:
    """Compare one implementation with the reference on copies of the inputs, then time it.

    Args:
        distance: from the reference, relative, of each tensor as a whole; instead of `tolerance`.
    """
    label, pass_, backend, shape = key
    name, run = label.split()[0], forward_backward if pass_ == PASSES[1] else forward
    operator = implementation(name, backend, shape)
    benchmark.group = f"{label} {pass_} {shape}"

    copies = copy.deepcopy(inputs), copy.deepcopy(inputs)
    started = time.perf_counter()
    actual = run(operator, copies[0])
    timing = TIMINGS.setdefault(key, Timing(time.perf_counter() - started))
    expected = run(getattr(REFERENCE, name), copies[1])
    distance = BFLOAT16_DISTANCE if backend.endswith("bf16") else distance
    if distance is not None:
        for x, y in zip(actual, expected, strict=True):
            assert (x - y).float().norm() <= distance * y.float().norm()
    else:
        torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(*map(tensors_of, copies), **tolerance)  # it may change them

    benchmark.pedantic(run, (operator, inputs), rounds=rounds, warmup_rounds=5)
    timing.medians.append(benchmark.stats.stats.median)


@in_turns(SHAPES)
def bench_lambda_return(benchmark, backend, pass_, shape, round_):
    key = ("lambda_return", pass_, backend, shape)
    measure(benchmark, key, operator_inputs.lambda_return(shape))


@in_turns(ROWS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def bench_norm_act(benchmark, kind, backend, pass_, shape, round_):
    key = (f"norm_act {kind}", pass_, backend, shape)
    measure(benchmark, key, operator_inputs.norm_act(kind, shape), 10, tolerance=SUM_TOLERANCE)


@in_turns(CONVOLUTIONS)
def bench_conv_norm_act(benchmark, backend, pass_, shape, round_):
    key = ("conv_norm_act", pass_, backend, shape)
    measure(benchmark, key, operator_inputs.conv_norm_act(shape), 10, distance=POOLING_DISTANCE)


@in_turns(FEATURES)
def bench_latent_linear(benchmark, backend, pass_, shape, round_):
    key, inputs = (
        ("latent_linear", pass_, backend, shape),
        operator_inputs.latent_linear(shape),
    )
    measure(benchmark, key, inputs, 5, tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("recipe", SCANS)
def bench_heads(benchmark, recipe, pass_, backend, round_):
    key = (f"heads {recipe}-{SCANS[recipe]}", pass_, backend, (IMAGINED,))
    measure(benchmark, key, operator_inputs.heads(recipe, IMAGINED), 5, tolerance=SUM_TOLERANCE)


@in_turns(BINS)
@pytest.mark.parametrize("name", ["twohot_loss", "twohot_mean"])
def bench_twohot(benchmark, name, backend, pass_, shape, round_):
    if name == "twohot_mean" and pass_ != "forward":
        pytest.skip("a run takes means without gradient")
    key, inputs = (name, pass_, backend, shape), operator_inputs.twohot(name, shape)
    measure(benchmark, key, inputs, 10, tolerance=SUM_TOLERANCE)


@in_turns(IMAGES)
def bench_image_loss(benchmark, backend, pass_, shape, round_):
    key = ("image_loss", pass_, backend, shape)
    measure(benchmark, key, operator_inputs.image_loss(shape), 5, tolerance=SUM_TOLERANCE)


@in_turns(CATEGORICALS)
@pytest.mark.parametrize("name", ["unimix", "entropy", "kl", "balanced_kl", "sample"])
def bench_categorical(benchmark, name, backend, pass_, shape, round_):
    measure(benchmark, (name, pass_, backend, shape), operator_inputs.categorical(name, shape))


@in_turns(STEPS)
@pytest.mark.parametrize("name", ["gru_step", "block_gru_step"])
def bench_gru_step(benchmark, name, backend, pass_, shape, round_):
    key, inputs = (name, pass_, backend, shape), operator_inputs.gru_step(name, shape)
    measure(benchmark, key, inputs, 10, tolerance=SUM_TOLERANCE)


# The compiler would unroll the loops over steps, for minutes.
@pytest.mark.parametrize("backend", SCAN_BACKENDS)
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("recipe", SCANS)
def bench_rssm_observe(benchmark, recipe, backend, round_):
    key = (f"rssm_observe {recipe}-{SCANS[recipe]}", "forward+backward", backend, (16, 64))
    inputs = operator_inputs.observe(recipe, 16, 64)
    measure(benchmark, key, inputs, 3, tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", SCAN_BACKENDS)
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("recipe", SCANS)
def bench_rssm_imagine(benchmark, recipe, backend, round_):
    key = (f"rssm_imagine {recipe}-{SCANS[recipe]}", "forward", backend, (1024, 15))
    inputs = operator_inputs.imagine(recipe, 1024, 15)
    measure(benchmark, key, inputs, 3, tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("rows", ENVS)
@pytest.mark.parametrize("recipe", SCANS)
def bench_policy_step(benchmark, recipe, rows, backend, round_):
    key = (f"policy_step {recipe}-{SCANS[recipe]}", "forward", backend, (rows,))
    measure(benchmark, key, operator_inputs.policy_step(recipe, rows), tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("name", STEPPED)
def bench_step(benchmark, name, backend, round_):
    inputs = operator_inputs.step(name, STEPPED[name])
    key = (name, "step", backend, (sum(x.numel() for x in inputs[0]),))
    measure(benchmark, key, inputs, rounds=5, tolerance=STEP_TOLERANCE[name])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("recipe", TARGETS)
def bench_ema(benchmark, recipe, backend, round_):
    inputs = operator_inputs.ema(recipe, TARGETS[recipe])
    key = ("ema", "step", backend, (sum(x.numel() for x in inputs[0]),))
    measure(benchmark, key, inputs, rounds=20)
