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

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from bench.results import record
from fastdreamer import kernels
from fastdreamer.agent import Agent
from fastdreamer.config import SIZES
from fastdreamer.kernels import unimix
from fastdreamer.kernels.heads import Head
from fastdreamer.kernels.latent_linear import Latents
from fastdreamer.recipe import RECIPES

torch.compiler.config.force_disable_caches = True  # or the first call would not show compiling

REFERENCE = kernels.resolve("reference")
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
# N, H, W, C, O of the second and the last convolution of size 1m, of XS's first and last, and of
# wide ones of 12m and S.
CONVOLUTIONS = {
    "pool": (256, 32, 32, 8, 12),
    "upsample": (256, 32, 32, 8, 3),
    "stride": (256, 64, 64, 3, 24),
    "transpose": (256, 32, 32, 24, 3),
    "pool wide": (256, 16, 16, 48, 64),
    "upsample wide": (256, 16, 16, 48, 32),
    "stride wide": (256, 16, 16, 64, 128),
    "transpose wide": (256, 16, 16, 64, 32),
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
# B, D, U, G of both cells; by recipe the size whose weights the scans have.
STEPS = {"replay": (16, 512, 64, 8), "imagination": (1024, 512, 64, 8)}
SCANS = {"2025": "1m", "2023": "xs"}
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


def lambda_return_inputs(shape: tuple[int, int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(shape, generator=g) for _ in range(2))
    discount = 0.997 * torch.rand(shape, generator=g).gt(0.01)
    return [x.requires_grad_() for x in (reward, discount, value)] + [torch.tensor(0.95)]


def norm_act_inputs(kind: str, shape: tuple[int, int]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(shape, generator=g), torch.rand(shape[1], generator=g)
    shift = torch.randn(shape[1], generator=g).requires_grad_() if kind == "layer" else None
    return [x.requires_grad_(), scale.requires_grad_(), shift, kind, 1e-3]


def conv_norm_act_inputs(shape: tuple[int, ...]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    n, height, width, c, o = shape
    kind = next(k for k, v in CONVOLUTIONS.items() if v == shape).split()[0]
    size = 5 if kind in ("pool", "upsample") else 4
    x = torch.randn(n, height, width, c, generator=g)
    outer = (c, o) if kind == "transpose" else (o, c)
    weight = torch.randn(*outer, size, size, generator=g) / (c * size**2) ** 0.5
    bias, scale = (torch.rand(o, generator=g).requires_grad_() for _ in range(2))
    return [x.requires_grad_(), weight.requires_grad_(), bias, scale, None, kind, "rms", 1e-3]


def latent_linear_inputs(shape: tuple[int, ...]) -> list[Any]:
    rows, deter, stoch, classes, outputs = shape
    g = torch.Generator().manual_seed(0)
    index = torch.randint(classes, (rows, stoch), generator=g, dtype=torch.int32)
    onehot = (index.unsqueeze(-1) == torch.arange(classes)).float().flatten(1)
    feat = torch.cat([torch.randn(rows, deter, generator=g), onehot], 1)
    weight = torch.randn(outputs, feat.shape[1], generator=g).requires_grad_()
    bias = torch.randn(outputs, generator=g).requires_grad_()
    return [feat, index, weight, bias, deter, classes]


def twohot_inputs(name: str, shape: tuple[int, int]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).requires_grad_()
    targets = [torch.randn(shape[0], generator=g)] if name == "twohot_loss" else []
    return [logits, *targets, "symexp"]


def image_loss_inputs(shape: tuple[int, ...]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).requires_grad_()
    return [x, torch.randint(256, shape, generator=g, dtype=torch.uint8), 0.0, True]


def categorical_inputs(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(shape, generator=g) for _ in range(2)]
    if name == "unimix":
        return [logits[0].requires_grad_()]
    logp, logq = (unimix.unimix(x).requires_grad_() for x in logits)
    if name == "entropy":
        return [logp]
    noise = -torch.empty(shape).exponential_(generator=g).log()
    return [logp, noise if name == "sample" else logq]


def atari_agent(recipe: str, size: str) -> Agent:
    torch.manual_seed(0)
    spaces = {"image": Box(0, 255, (64, 64, 3), np.uint8)}, Discrete(18)
    return Agent(*spaces, SIZES[recipe][size], RECIPES[recipe], REFERENCE)


def gru_step_inputs(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    B, D, U, G = shape
    width = D // G
    vectors = [(D,), (D,), (G, width, 3 * width), (3 * D,)]
    weights = [(G, width + U, width), *vectors] if name == "block_gru_step" else []
    sizes = [(B, D), (B, U), *(weights or [(3 * D, D + U), (3 * D,), (3 * D,)])]
    return [(torch.randn(s, generator=g) / s[-1] ** 0.5).requires_grad_() for s in sizes]


def leaves(tree: Any) -> Any:
    """The same tuples with a leaf of its own, with gradient, for each tensor."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_()
    if isinstance(tree, tuple):
        parts = map(leaves, tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def detached(tree: Any) -> Any:
    """The same tuples without gradient."""
    if isinstance(tree, tuple):
        parts = map(detached, tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree.detach() if isinstance(tree, Tensor) else tree


def tensors_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, list | tuple):
        return [x for part in tree for x in tensors_of(part)]
    return [tree] if isinstance(tree, Tensor) else []


def clear_noise(*shape: int) -> Tensor:
    """Gumbel noise so wide that rounding does not change what is drawn."""
    g = torch.Generator().manual_seed(0)
    return -50 * torch.empty(shape).exponential_(generator=g).log()


@cache
def observe_inputs(recipe: str, rows: int, steps: int) -> list[Any]:
    agent = atari_agent(recipe, SCANS[recipe])
    rssm, g = agent.world_model.rssm, torch.Generator().manual_seed(0)
    weights = leaves(rssm.weights())
    weights.initial_stoch.requires_grad_(False)  # a drawn class: the scan has no gradient of it
    start = torch.zeros(rows, rssm.deter), torch.zeros(rows, *rssm.latent)
    action = torch.eye(18)[torch.randint(18, (rows, steps), generator=g)]
    units = weights.posterior[0].weight.shape[0]
    embedded = torch.randn(rows, steps, units, generator=g).requires_grad_()
    first = torch.rand(rows, steps, generator=g) < 0.01
    return [weights, *start, action, embedded, first, clear_noise(rows, steps, *rssm.latent)]


@cache
def imagine_inputs(recipe: str, rows: int, steps: int) -> list[Any]:
    agent = atari_agent(recipe, SCANS[recipe])
    rssm = agent.world_model.rssm
    weights, policy = leaves(rssm.weights()), leaves(agent.actor.weights())
    start = torch.zeros(rows, rssm.deter), torch.zeros(rows, *rssm.latent)
    noise = clear_noise(rows, steps, *rssm.latent), clear_noise(rows, steps + 1, 18)
    return [weights, policy, *start, *noise]


@cache
def heads_inputs(recipe: str, rows: int) -> list[Any]:
    """Of all heads on imagined states, the critic's and the actor's with gradient."""
    agent, g = atari_agent(recipe, SCANS[recipe]), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(agent.critic.out.weight, std=0.1, generator=g)  # it starts at 0
    model, bins = agent.world_model, agent.recipe.bins
    shape = (rows, model.rssm.deter, *model.rssm.latent, 1)
    feat, index, _, _, deter, classes = latent_linear_inputs(shape)
    given = [
        Head(detached(model.reward.weights()), bins),
        Head(detached(agent.target_critic.weights()), bins),
        Head(detached(model.cont.weights())),
        Head(leaves(agent.critic.weights()), trained=True),
        Head(leaves(agent.actor.mlp.weights()), trained=True),
    ]
    return [feat, Latents(index, deter, classes), given, model.reward.eps]


@cache
def policy_step_inputs(recipe: str, rows: int) -> list[Any]:
    """Of a policy step behind the encoder."""
    agent, g = atari_agent(recipe, SCANS[recipe]), torch.Generator().manual_seed(0)
    rssm, embedding = agent.world_model.rssm, agent.world_model.rssm.embedding()
    weights, policy = detached(rssm.weights()), detached(agent.actor.weights())
    state = torch.randn(rows, rssm.deter, generator=g), torch.zeros(rows, *rssm.latent)
    state[1][..., 0] = 1
    x = torch.randn(rows, embedding.weight.shape[1], generator=g)
    first = torch.zeros(rows, dtype=torch.bool)
    steps = (torch.eye(18)[:rows], x, first, clear_noise(rows, *rssm.latent))
    return [weights, (detached(embedding),), policy, *state, *steps, clear_noise(rows, 18)]


@cache
def step_inputs(name: str, size: str) -> list[Any]:
    """Parameters, gradients and moments that an Atari agent's step has, and the scalars.

    ``clip_adam`` steps the world model of recipe 2023, ``agc_laprop`` all of recipe 2025.
    """
    adam = name == "clip_adam"
    agent = atari_agent("2023", size).world_model if adam else atari_agent("2025", size)
    params = [p.data for p in agent.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(0)
    grads, nu, mu = ([torch.randn(p.shape, generator=g) for p in params] for _ in range(3))
    rate, clip = (1e-4, 1000.0) if adam else (4e-5, 0.3)
    return [params, grads, [x.square() for x in nu], mu, 1000, rate, clip]


@cache
def ema_inputs(recipe: str, size: str) -> list[Any]:
    """Target critic and critic of an Atari agent, apart from one another."""
    agent = atari_agent(recipe, size)
    g = torch.Generator().manual_seed(0)
    critic = [torch.randn(p.shape, generator=g) for p in agent.critic.parameters()]
    return [list(agent.target_critic.parameters()), critic, 0.02]


def outputs_of(results: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
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
    run: Callable,
    key: Key,
    inputs: list[Any],
    rounds: int = 50,
    tolerance: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Compare one implementation with the reference on copies of the inputs, then time it."""
    label, pass_, backend, shape = key
    name = label.split()[0]
    operator = implementation(name, backend, shape)
    benchmark.group = f"{label} {pass_} {shape}"

    copies = copy.deepcopy(inputs), copy.deepcopy(inputs)
    started = time.perf_counter()
    actual = run(operator, copies[0])
    timing = TIMINGS.setdefault(key, Timing(time.perf_counter() - started))
    expected = run(getattr(REFERENCE, name), copies[1])
    if backend.endswith("bf16"):
        for x, y in zip(actual, expected, strict=True):
            assert (x - y).float().norm() <= BFLOAT16_DISTANCE * y.float().norm()
    else:
        torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(*map(tensors_of, copies), **tolerance)  # it may change them

    benchmark.pedantic(run, (operator, inputs), rounds=rounds, warmup_rounds=5)
    timing.medians.append(benchmark.stats.stats.median)


@in_turns(SHAPES)
def bench_lambda_return(benchmark, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key = ("lambda_return", pass_, backend, shape)
    measure(benchmark, run, key, lambda_return_inputs(shape))


@in_turns(ROWS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def bench_norm_act(benchmark, kind, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key = (f"norm_act {kind}", pass_, backend, shape)
    measure(benchmark, run, key, norm_act_inputs(kind, shape), 10, tolerance=SUM_TOLERANCE)


@in_turns(CONVOLUTIONS)
def bench_conv_norm_act(benchmark, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key = ("conv_norm_act", pass_, backend, shape)
    measure(benchmark, run, key, conv_norm_act_inputs(shape), 10, tolerance=SUM_TOLERANCE)


@in_turns(FEATURES)
def bench_latent_linear(benchmark, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key, inputs = ("latent_linear", pass_, backend, shape), latent_linear_inputs(shape)
    measure(benchmark, run, key, inputs, 5, tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("recipe", SCANS)
def bench_heads(benchmark, recipe, pass_, backend, round_):
    run = forward if pass_ == "forward" else forward_backward
    key = (f"heads {recipe}-{SCANS[recipe]}", pass_, backend, (IMAGINED,))
    measure(benchmark, run, key, heads_inputs(recipe, IMAGINED), 5, tolerance=SUM_TOLERANCE)


@in_turns(BINS)
@pytest.mark.parametrize("name", ["twohot_loss", "twohot_mean"])
def bench_twohot(benchmark, name, backend, pass_, shape, round_):
    if name == "twohot_mean" and pass_ != "forward":
        pytest.skip("a run takes means without gradient")
    run = forward if pass_ == "forward" else forward_backward
    key, inputs = (name, pass_, backend, shape), twohot_inputs(name, shape)
    measure(benchmark, run, key, inputs, 10, tolerance=SUM_TOLERANCE)


@in_turns(IMAGES)
def bench_image_loss(benchmark, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key = ("image_loss", pass_, backend, shape)
    measure(benchmark, run, key, image_loss_inputs(shape), 5, tolerance=SUM_TOLERANCE)


@in_turns(CATEGORICALS)
@pytest.mark.parametrize("name", ["unimix", "entropy", "kl", "balanced_kl", "sample"])
def bench_categorical(benchmark, name, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    measure(benchmark, run, (name, pass_, backend, shape), categorical_inputs(name, shape))


@in_turns(STEPS)
@pytest.mark.parametrize("name", ["gru_step", "block_gru_step"])
def bench_gru_step(benchmark, name, backend, pass_, shape, round_):
    run = forward if pass_ == "forward" else forward_backward
    key, inputs = (name, pass_, backend, shape), gru_step_inputs(name, shape)
    measure(benchmark, run, key, inputs, 10, tolerance=SUM_TOLERANCE)


# The compiler would unroll the loops over steps, for minutes.
@pytest.mark.parametrize("backend", SCAN_BACKENDS)
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("recipe", SCANS)
def bench_rssm_observe(benchmark, recipe, backend, round_):
    key = (f"rssm_observe {recipe}-{SCANS[recipe]}", "forward+backward", backend, (16, 64))
    inputs = observe_inputs(recipe, 16, 64)
    measure(benchmark, forward_backward, key, inputs, 3, tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", SCAN_BACKENDS)
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("recipe", SCANS)
def bench_rssm_imagine(benchmark, recipe, backend, round_):
    key = (f"rssm_imagine {recipe}-{SCANS[recipe]}", "forward", backend, (1024, 15))
    inputs = imagine_inputs(recipe, 1024, 15)
    measure(benchmark, forward, key, inputs, 3, tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("rows", ENVS)
@pytest.mark.parametrize("recipe", SCANS)
def bench_policy_step(benchmark, recipe, rows, backend, round_):
    key = (f"policy_step {recipe}-{SCANS[recipe]}", "forward", backend, (rows,))
    measure(benchmark, forward, key, policy_step_inputs(recipe, rows), tolerance=SUM_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("name", STEPPED)
def bench_step(benchmark, name, backend, round_):
    inputs = step_inputs(name, STEPPED[name])
    key = (name, "step", backend, (sum(x.numel() for x in inputs[0]),))
    measure(benchmark, forward, key, inputs, rounds=5, tolerance=STEP_TOLERANCE[name])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("recipe", TARGETS)
def bench_ema(benchmark, recipe, backend, round_):
    inputs = ema_inputs(recipe, TARGETS[recipe])
    key = ("ema", "step", backend, (sum(x.numel() for x in inputs[0]),))
    measure(benchmark, forward, key, inputs, rounds=20)
