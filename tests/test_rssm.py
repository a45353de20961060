"""The scans of the recurrent state-space model against their references, for both cells.

Legend: B batch, T time, N rows, H horizon, D deter, S stoch, K classes, A action, U hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from operator_common import normal
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.heads import Head, heads, heads_cpp
from fastdreamer.kernels.latent_linear import Latents
from fastdreamer.kernels.rssm_imagine import (
    PolicyWeights,
    Rollout,
    rssm_imagine,
    rssm_imagine_cpp,
)
from fastdreamer.kernels.rssm_observe import rssm_observe, rssm_observe_cpp
from fastdreamer.kernels.rssm_observe_operator import CObserve
from fastdreamer.kernels.rssm_observe_weights import flatten
from fastdreamer.kernels.rssm_weights import (
    BlockGRUWeights,
    CModel,
    GRUWeights,
    Layer,
    RSSMWeights,
    c_model,
    drawn,
)

pytestmark = pytest.mark.operators

# Sums of up to a few hundred products in another order, carried through a few steps.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
# B, T, D, S, K, A, U, G; none of a multiple of a vector's length, or all of them.
SHAPES = [
    (3, 5, 24, 3, 4, 2, 7, 8),
    (2, 3, 40, 2, 5, 6, 33, 8),
    (1, 4, 64, 4, 16, 3, 32, 4),
    (13, 2, 16, 3, 32, 1, 16, 1),
    (4, 1, 8, 1, 2, 1, 1, 8),
]
# The weights of either cell do not fit in a core's cache: the rollout takes more rows at a time.
LARGE = (135, 2, 384, 3, 5, 2, 480, 8)
CELLS = ("gru", "block_gru")

cells = pytest.mark.parametrize("cell", CELLS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Draw:
    """Random tensors by a generator of their own."""

    def __init__(self, dtype: torch.dtype = torch.float32, grad: bool = False):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.grad = dtype, grad

    def __call__(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=self.dtype)
        return (x / max(1, shape[-1]) ** 0.5).requires_grad_(self.grad)

    def gumbel(self, *shape: int) -> Tensor:
        u = torch.rand(shape, generator=self.generator, dtype=self.dtype)
        return -torch.log(-torch.log(u))

    def one_hot(self, *shape: int) -> Tensor:
        *lead, classes = shape
        index = torch.randint(0, classes, lead, generator=self.generator)
        return torch.nn.functional.one_hot(index, classes).to(self.dtype)

    def layer(self, inputs: int, outputs: int, shift: bool, norm: bool = True) -> Layer:
        scale = self(outputs) + 1 if norm else None
        bias = None if shift and norm else self(outputs)
        return Layer(self(outputs, inputs), bias, scale, self(outputs) if shift and norm else None)


def make_weights(draw: Draw, cell: str, shape: tuple[int, ...]) -> RSSMWeights:
    """Weights of either cell; G = 1 for a GRU, and zeros as the block cell's initial state."""
    _, _, D, S, K, A, U, G = shape
    gru = cell == "gru"
    made: GRUWeights | BlockGRUWeights
    if gru:
        gates, norm = draw(3 * D, D + U), (draw(3 * D), draw(3 * D))
        made = GRUWeights(draw.layer(S * K + A, U, True), gates, *norm)
    else:
        layers = [draw.layer(inputs, U, False) for inputs in (D, S * K, A)]
        width = D // G
        hidden = (draw(G, width + 3 * U, width), draw(D), draw(D))
        made = BlockGRUWeights(*layers, *hidden, draw(G, width, 3 * width), draw(3 * D))
    head = (draw.layer(D, U, gru)._replace(bias=None), draw.layer(U, S * K, gru, norm=False))
    prior = (draw.layer(D, U, gru), draw.layer(U, S * K, gru, norm=False))
    stoch = draw.one_hot(S, K) if gru else torch.zeros(S, K, dtype=draw.dtype)
    return RSSMWeights(made, head, prior, draw(D), stoch, 1e-3, 0.01)


def make_scan(draw: Draw, shape: tuple[int, ...]) -> list[Tensor]:
    """Start, action, embedded, is_first, noise; the first row starts from no classes."""
    B, T, D, S, K, A, U, _ = shape
    start = draw.one_hot(B, S, K)
    start[:1] = 0
    first = torch.rand(B, T, generator=draw.generator) < 0.3
    action = 2 * draw(B, T, A).detach()
    embedded = draw(B, T, U)
    return [draw(B, D).detach(), start, action, embedded, first, draw.gumbel(B, T, S, K)]


def gradients(operator: Callable, weights: RSSMWeights, scan: list[Tensor]) -> list[Tensor]:
    outputs = operator(weights, *scan)
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in outputs if x.numel()
    )
    return list(torch.autograd.grad(loss, [*flatten(weights), scan[3]], allow_unused=True))


@cells
@shapes
def test_observe_values(isa, cell, shape):
    draw = Draw()
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    actual, expected = rssm_observe_cpp(weights, *scan), rssm_observe(weights, *scan)
    for name, x, y in zip(("deter", "stoch", "logp"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(actual[1].sum(-1), torch.ones(shape[0], shape[1], shape[3]))


@cells
@shapes
def test_observe_gradients(isa, cell, shape):
    draw = Draw(grad=True)
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    actual = gradients(rssm_observe_cpp, weights, scan)
    expected = gradients(rssm_observe, weights, scan)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        y = torch.zeros_like(x) if y is None else y
        size = float(y.abs().max()) + 1
        torch.testing.assert_close(
            x / size, y / size, **TOLERANCE, msg=lambda m, i=i: f"gradient {i}: {m}"
        )


def test_more_blocks_than_the_library_takes(cpp):
    shape, draw = (2, 2, 130, 2, 4, 2, 3, 65), Draw()
    weights, scan = make_weights(draw, "block_gru", shape), make_scan(draw, shape)
    pairs = zip(rssm_observe_cpp(weights, *scan), rssm_observe(weights, *scan), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@cells
def test_observe_float64_is_the_reference(cpp, cell):
    draw = Draw(torch.float64)
    weights, scan = make_weights(draw, cell, SHAPES[0]), make_scan(draw, SHAPES[0])
    pairs = zip(rssm_observe_cpp(weights, *scan), rssm_observe(weights, *scan), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@cells
@pytest.mark.parametrize("size", [(0, 5), (3, 0)], ids=str)
def test_observe_of_nothing(cpp, cell, size):
    draw, shape = Draw(grad=True), (*size, *SHAPES[0][2:])
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    deter, stoch, logp = rssm_observe_cpp(weights, *scan)
    assert deter.shape == (*size, shape[2])
    assert stoch.shape == logp.shape == (*size, shape[3], shape[4])
    grads = torch.autograd.grad(deter.sum() + logp.sum(), flatten(weights))
    assert not any(x.any() for x in grads)


@cells
def test_observe_repeats_bit_for_bit(cpp, threads, cell):
    draw = Draw(grad=True)
    weights, scan = make_weights(draw, cell, SHAPES[3]), make_scan(draw, SHAPES[3])
    threads(2)
    first = gradients(rssm_observe_cpp, weights, scan)
    for x, y in zip(first, gradients(rssm_observe_cpp, weights, scan), strict=True):
        assert torch.equal(x, y)
    two = rssm_observe_cpp(weights, *scan)
    threads(1)
    for x, y in zip(two, rssm_observe_cpp(weights, *scan), strict=True):
        assert torch.equal(x, y)


@cells
def test_observe_strided_inputs(cpp, cell):
    draw = Draw()
    weights, scan = make_weights(draw, cell, SHAPES[1]), make_scan(draw, SHAPES[1])
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in scan]
    assert not views[3].is_contiguous()
    for x, y in zip(
        rssm_observe_cpp(weights, *scan), rssm_observe_cpp(weights, *views), strict=True
    ):
        assert torch.equal(x, y)


def flat_arguments(cell: str, grad: bool = False) -> tuple[Any, ...]:
    draw = Draw(grad=grad)
    weights, scan = make_weights(draw, cell, SHAPES[0]), make_scan(draw, SHAPES[0])
    start, stoch, *rest = scan
    index = (drawn(stoch), drawn(weights.initial_stoch))
    return (flatten(weights), start, *index, *rest, weights.eps, weights.mix, torch.float32)


@cells
def test_observe_opcheck(cpp, cell):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for grad in (False, True):
        arguments = flat_arguments(cell, grad)
        torch.library.opcheck(
            torch.ops.fastdreamer.rssm_observe.default, arguments, test_utils=checks
        )


@cells
def test_observe_compiles_to_one_graph(cpp, cell):
    arguments = flat_arguments(cell)

    def run(embedded: Tensor) -> Tensor:
        inputs = (*arguments[:5], embedded, *arguments[6:])
        deter, stoch, logp, *_ = torch.ops.fastdreamer.rssm_observe(*inputs)
        return deter.sum() + (stoch * logp).sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    embedded = arguments[5].clone().requires_grad_()
    (actual,) = torch.autograd.grad(compiled(embedded), embedded)
    (expected,) = torch.autograd.grad(run(embedded), embedded)
    assert torch.equal(actual, expected)


@cells
@pytest.mark.parametrize(
    ("position", "name"), [(0, "start_deter"), (1, "start_index"), (3, "embedded"), (5, "noise")]
)
def test_observe_refuses_shapes(cpp, cell, position, name):
    draw = Draw()
    weights, scan = make_weights(draw, cell, SHAPES[0]), make_scan(draw, SHAPES[0])
    scan[position] = scan[position][:2]
    with pytest.raises(ValueError, match=f"rssm_observe: {name} must be"):
        rssm_observe_cpp(weights, *scan)


@cells
def test_observe_refuses_classes_and_weights(cpp, cell):
    tensors, start, index, *rest = flat_arguments(cell)
    operator = torch.ops.fastdreamer.rssm_observe
    for wrong in (-2, SHAPES[0][4]):
        with pytest.raises(RuntimeError, match="index of a class"):
            operator(tensors, start, torch.full_like(index, wrong), *rest)
    for i in range(len(tensors) - 1):  # the last is the initial state: every shape hangs on it
        spoilt = [*tensors[:i], tensors[i][..., :-1], *tensors[i + 1 :]]
        with pytest.raises(ValueError, match="must be"):
            operator(spoilt, start, index, *rest)
    with pytest.raises(TypeError, match="weights must be"):
        operator([tensors[0].double(), *tensors[1:]], start, index, *rest)


@cells
def test_observe_refuses_dtypes(cpp, cell):
    draw = Draw()
    weights, scan = make_weights(draw, cell, SHAPES[0]), make_scan(draw, SHAPES[0])
    scan[0] = scan[0].double()
    with pytest.raises(TypeError, match=r"start_deter must be torch\.float32"):
        rssm_observe_cpp(weights, *scan)
    scan[0], scan[4] = scan[0].float(), scan[4].float()
    with pytest.raises(TypeError, match="is_first must be bool"):
        rssm_observe_cpp(weights, *scan)


@cells
def test_nan_stays_within_its_row(cpp, cell):
    draw = Draw()
    weights, scan = make_weights(draw, cell, SHAPES[0]), make_scan(draw, SHAPES[0])
    clean = rssm_observe_cpp(weights, *scan)
    scan[3] = scan[3].clone()
    scan[3][1, 0] = float("nan")
    spoilt = rssm_observe_cpp(weights, *scan)
    assert spoilt[2][1, 0].isnan().all()
    for x, y in zip(clean, spoilt, strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]])


def make_policy(
    draw: Draw, shape: tuple[int, ...], kinds: str, gru: bool, depth: int = 2
) -> PolicyWeights:
    """``kinds``: d for a discrete part of A classes, c for a continuous one of A values."""
    _, _, D, S, K, A, U, _ = shape
    widths = [D + S * K, *[2 * U + 1] * (depth - 1), U]
    layers = tuple(draw.layer(i, o, gru) for i, o in pairwise(widths))
    heads = []
    for kind in kinds:
        count = 1 if kind == "d" else 2
        heads.append(tuple(draw.layer(U, A, gru, norm=False) for _ in range(count)))
    return PolicyWeights(layers, tuple(heads), not gru, 0.01 if gru else 0.0)


def imagine_arguments(
    cell: str, shape: tuple[int, ...], kinds: str, dtype: torch.dtype, depth: int = 2
) -> tuple:
    draw, (B, T, D, S, K, A, *_) = Draw(dtype), shape
    shape = (*shape[:5], A * len(kinds), *shape[6:])
    weights = make_weights(draw, cell, shape)
    policy = make_policy(draw, (*shape[:5], A, *shape[6:]), kinds, cell == "gru", depth)
    stoch, rows = draw.one_hot(B, S, K), B
    stoch[:1] = 0
    noise = draw.gumbel(rows, T, S, K)
    return weights, policy, draw(rows, D), stoch, noise, draw.gumbel(rows, T + 1, A * len(kinds))


def assert_rollouts_equal(actual: Rollout, expected: Rollout, **tolerance: float) -> None:
    """Of what every backend gives; within TOLERANCE if there is no other."""
    for x, y in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(x.cpu(), y, **(tolerance or TOLERANCE))


@cells
@shapes
@pytest.mark.parametrize("kinds", ["d", "c", "dcd"])
def test_imagine(isa, cell, shape, kinds):
    shape = (shape[0] * 17, *shape[1:])  # more than one tile of rows, and a partial one
    arguments = imagine_arguments(cell, shape, kinds, torch.float32)
    assert_rollouts_equal(rssm_imagine_cpp(*arguments), rssm_imagine(*arguments))


@cells
def test_imagine_of_a_large_model(isa, cell, threads):
    threads(1)  # more would share the rows out
    arguments = imagine_arguments(cell, LARGE, "d", torch.float32)
    assert_rollouts_equal(rssm_imagine_cpp(*arguments), rssm_imagine(*arguments))


@cells
@shapes
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_imagine_keeps_what_the_policy_gave(isa, cell, shape, depth):
    """Values and gradients of its hidden layers are those of running them on the features."""
    weights, policy, *rest = imagine_arguments(
        cell, (shape[0] * 17, *shape[1:]), "d", torch.float32, depth
    )
    feat, index, _, ran = rssm_imagine_cpp(weights, policy, *rest)
    latents = Latents(index, shape[2] if policy.deter_first else 0, shape[4])
    trained = [x.requires_grad_() for layer in policy.layers for x in layer if x is not None]
    results = []
    for operator, kept in ((heads_cpp, ran), (heads, None)):
        given = Head(policy.layers, trained=True, ran=kept)
        (y,) = operator(feat, latents, [given], weights.eps)
        assert kept is None or y.data_ptr() == kept.outputs.data_ptr()  # not run again
        results.append([y, *torch.autograd.grad((y * normal(y)[0]).sum(), trained)])
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        size = float(y.abs().max()) + 1
        torch.testing.assert_close(x / size, y / size, **TOLERANCE, msg=lambda m, i=i: f"{i}: {m}")


@cells
def test_imagine_of_nothing(cpp, cell):
    for shape in ((0, 3, *SHAPES[0][2:]), (3, 0, *SHAPES[0][2:])):
        arguments = imagine_arguments(cell, shape, "d", torch.float32)
        assert_rollouts_equal(rssm_imagine_cpp(*arguments), rssm_imagine(*arguments))


@cells
def test_imagine_does_not_depend_on_threads(cpp, threads, cell):
    arguments = imagine_arguments(cell, (130, *SHAPES[0][1:]), "dc", torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        *rollout, ran = rssm_imagine_cpp(*arguments)
        results.append([*rollout, *ran])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@cells
@pytest.mark.parametrize(
    ("position", "name"), [(2, "deter"), (3, "stoch"), (4, "noise"), (5, "action_noise")]
)
def test_imagine_refuses_shapes_and_dtypes(cpp, cell, position, name):
    arguments = [*imagine_arguments(cell, SHAPES[0], "dc", torch.float32)]
    right = arguments[position]
    arguments[position] = right[..., :-1]
    with pytest.raises(ValueError, match=f"rssm_imagine: {name} must be"):
        rssm_imagine_cpp(*arguments)
    arguments[position] = right.half()
    if position > 2:
        with pytest.raises(TypeError, match=f"rssm_imagine: {name} must be"):
            rssm_imagine_cpp(*arguments)


@cells
def test_imagine_refuses_weights(cpp, cell):
    weights, policy, *rest = imagine_arguments(cell, SHAPES[0], "dc", torch.float32)
    narrow = policy.layers[0]._replace(scale=policy.layers[0].scale[:-1])
    with pytest.raises(ValueError, match="a weight must be"):
        rssm_imagine_cpp(weights, policy._replace(layers=(narrow, *policy.layers[1:])), *rest)
    wide = weights.cell._replace(gates=weights.cell.gates.double())
    with pytest.raises(TypeError, match="weights must be"):
        rssm_imagine_cpp(weights._replace(cell=wide), policy, *rest)


def test_imagine_float64_is_the_reference(cpp):
    arguments = imagine_arguments("gru", SHAPES[0], "d", torch.float64)
    actual, expected = rssm_imagine_cpp(*arguments), rssm_imagine(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(actual[:3], expected[:3], strict=True))
    assert actual.policy is None


class TestCInterface:
    """The C function of the scan, called as another program would."""

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        draw, shape = Draw(), SHAPES[0]
        self.weights = make_weights(draw, "block_gru", shape)
        self.model = c_model(self.weights, shape[5], self.weights.posterior)
        self.memory = torch.zeros(4096)
        pointers = {k: self.memory.data_ptr() for k, _ in CObserve._fields_[2:]}
        self.scan = CObserve(B=0, T=0, **pointers)

    def call(self, model: object, scan: object) -> None:
        structures = (CModel, CObserve, library.Launch)
        signature = tuple(ctypes.POINTER(x) for x in structures)
        library.function("fd_rssm_observe", signature)(model, scan, None)

    def test_empty_scan(self):
        self.call(self.model, self.scan)

    def test_null_structures(self):
        for arguments in ((None, self.scan), (self.model, None)):
            with pytest.raises(RuntimeError, match="null pointer"):
                self.call(*arguments)

    @pytest.mark.parametrize("name", [k for k, _ in CObserve._fields_[2:]])
    def test_null_tensors(self, name):
        self.scan.B = self.scan.T = 1
        setattr(self.scan, name, None)
        with pytest.raises(RuntimeError, match="null pointer"):
            self.call(self.model, self.scan)

    @pytest.mark.parametrize("name", ["gate_weight", "hidden_weight", "cell_scale", "gate_bias"])
    def test_null_weights(self, name):
        setattr(self.model, name, None)
        with pytest.raises(RuntimeError, match="null pointer"):
            self.call(self.model, self.scan)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("cell", 2),
            ("deter", 0),
            ("deter", 25),
            ("blocks", 65),
            ("head_layers", 3),
            ("action", -1),
        ],
    )
    def test_sizes(self, name, value):
        setattr(self.model, name, value)
        with pytest.raises(RuntimeError, match="size"):
            self.call(self.model, self.scan)

    def test_negative_sizes(self):
        self.scan.B = -1
        with pytest.raises(RuntimeError, match="size"):
            self.call(self.model, self.scan)
