"""Heads on one-hot features, against the plain layers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from operator_common import drawn, normal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdreamer.kernels import heads as heads_module
from fastdreamer.kernels import library
from fastdreamer.kernels.heads import (
    SIGNATURE,
    CHead,
    CHeads,
    Head,
    heads,
    heads_by_operators,
    heads_cpp,
)
from fastdreamer.kernels.latent_linear import Latents
from fastdreamer.kernels.rssm_weights import CLayer, Layer

pytestmark = pytest.mark.operators

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}  # sums of up to a hundred numbers, through three norms
EPS = 1e-3
# N, D, S, K, widths of the hidden layers, whether the latents come first, whether LayerNorm
SHAPES = [
    (63, 5, 3, 16, (41, 17), True, True),
    (130, 24, 4, 4, (64, 64, 64), False, False),
    (1, 8, 1, 17, (1,), True, False),
    (49, 7, 5, 18, (33,), False, True),
    (0, 8, 2, 16, (8,), True, False),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@drawn
def draw(shape: tuple, dtype: torch.dtype) -> list[Tensor]:
    """feat, index, then weight, bias, scale and shift of each layer of `layer_widths`."""
    N, D, S, K, _, first, _ = shape
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-1, K, (N, S), generator=g, dtype=torch.int32)
    stoch = (index.unsqueeze(-1) == torch.arange(K)).to(dtype).flatten(1)
    deter = torch.randn(N, D, generator=g, dtype=dtype)
    tensors = [torch.cat([stoch, deter] if first else [deter, stoch], 1), index]
    for widths in layer_widths(shape):
        inputs = D + S * K
        for outputs in widths:
            weight = torch.randn(outputs, inputs, generator=g, dtype=dtype) / inputs**0.5
            vectors = (torch.randn(outputs, generator=g, dtype=dtype) for _ in range(3))
            tensors += [x.requires_grad_() for x in (weight, *vectors)]
            inputs = outputs
    return tensors


def layer_widths(shape: tuple) -> list[tuple[int, ...]]:
    """Of a mean of each layout, of outputs, of a trained head with and one without outputs."""
    hidden = shape[4]
    return [(*hidden, 255), (*hidden, 5), (*hidden, 3), (*hidden, 255), hidden, (6,)]


def make_inputs(shape: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    """feat, latents, heads and the trained ones' weights."""
    _, D, _, K, hidden, first, centred = shape
    feat, index, *tensors = draw(shape, dtype)
    tensors = iter(tensors)
    given, weights = [], []
    layouts = ("symlog", "symexp", None, None, None, None)
    for i, (widths, layout) in enumerate(zip(layer_widths(shape), layouts, strict=True)):
        layers = []
        for j in range(len(widths)):
            weight, bias, scale, shift = (next(tensors) for _ in range(4))
            normed = j < len(hidden) and len(widths) >= len(hidden) and i < 5
            norm = (scale, shift if centred else None) if normed else (None, None)
            layers.append(Layer(weight, None if normed and centred else bias, *norm))
        given.append(Head(tuple(layers), layout, trained=i > 2))
        weights += [x for layer in layers for x in layer if x is not None and i > 2]
    return feat, Latents(index, 0 if first else D, K), given, weights


def values_and_gradients(operator: Callable, inputs: tuple) -> list[Tensor]:
    *arguments, weights = inputs
    outputs = operator(*arguments, EPS)
    trained = [y for y, head in zip(outputs, arguments[2], strict=True) if head.trained]
    assert all(not y.requires_grad for y in outputs[:3])
    # One after the other: recipe 2023 takes its losses' gradients apart.
    grads = [
        torch.autograd.grad((y * normal(y)[0]).sum(), weights, allow_unused=True) for y in trained
    ]
    return [*outputs, *(x for per_head in grads for x in per_head if x is not None)]


@pytest.fixture
def operator(compiled) -> Callable:
    return heads_cpp if compiled.backend == "cpp" else heads_by_operators


@shapes
def test_values_and_gradients(compiled, isa, operator, shape):
    inputs = make_inputs(shape)
    pairs = zip(
        values_and_gradients(operator, inputs), values_and_gradients(heads, inputs), strict=True
    )
    for i, (actual, expected) in enumerate(pairs):
        torch.testing.assert_close(actual, expected, **TOLERANCE, msg=lambda m, i=i: f"{i}: {m}")


def test_large_heads_one_by_one(compiled, operator, monkeypatch):
    monkeypatch.setattr(heads_module, "SHARED_WEIGHTS", 0)
    inputs = make_inputs(SHAPES[0])
    actual, expected = (values_and_gradients(f, inputs) for f in (operator, heads))
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_layer_by_layer(compiled):
    inputs = make_inputs(SHAPES[0])
    actual, expected = (values_and_gradients(f, inputs) for f in (heads_by_operators, heads))
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_bfloat16_by_amx_multiplies_latents_too(compiled, operator, monkeypatch):
    """There products cost less than the rows in their place.

    A factor is off by 2^-8 at most; the mean in symlog space enlarges that of its outputs.
    """
    monkeypatch.setattr(library, "isa", lambda: "amx")
    inputs = make_inputs(SHAPES[0])
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        actual = operator(*inputs[:-1], EPS)
    feat, _, given = inputs[:-1]
    first = sum(head.layers[0].weight.numel() for head in given)
    assert counter.get_total_flops() >= 2 * len(feat) * first
    for y, expected in zip(actual, heads(*inputs[:-1], EPS), strict=True):
        assert (y - expected).norm() <= 2**-6 * expected.norm()


@pytest.mark.parametrize("shared", [True, False])
def test_mixed_precision(cpp, monkeypatch, shared):
    """Without AMX heads without gradient stay float32; each stays where it was among the others."""
    monkeypatch.setattr(library, "isa", lambda: "avx512bf16")
    monkeypatch.setattr(heads_module, "SHARED_WEIGHTS", 2**18 if shared else 0)
    feat, latents, given, weights = make_inputs(SHAPES[0])
    inputs = feat, latents, given[::-1], weights
    with torch.autocast("cpu", torch.bfloat16):
        actual = heads_cpp(*inputs[:-1], EPS)
    expected = heads_cpp(*inputs[:-1], EPS)
    for head, y, exact in zip(inputs[2], actual, expected, strict=True):
        assert y.dtype == torch.float32
        assert head.trained or torch.equal(y, exact)
        assert (y - exact).norm() <= 2**-7 * exact.norm()
        if head.trained:
            wanted = [w for layer in head.layers for w in layer if w is not None]
            grads = [torch.autograd.grad(v.sum(), wanted) for v in (y, exact)]
            assert all((g - e).norm() <= 2**-7 * e.norm() for g, e in zip(*grads, strict=True))


def test_more_axes(compiled, operator):
    feat, latents, given, _ = make_inputs(SHAPES[1])
    shaped = latents._replace(drawn=latents.drawn.unflatten(0, (13, 10)))
    actual = operator(feat.unflatten(0, (13, 10)), shaped, given, EPS)
    expected = heads(feat, latents, given, EPS)
    torch.testing.assert_close([y.flatten(0, 1) for y in actual], expected, **TOLERANCE)


def test_gradcheck():
    feat, latents, given, weights = make_inputs(SHAPES[3], torch.float64)

    def run(*_: Tensor) -> list[Tensor]:
        return [y for y in heads(feat, latents, given, EPS) if y.requires_grad]

    assert torch.autograd.gradcheck(run, weights, fast_mode=True)


def test_repeats_with_any_number_of_threads(compiled, operator, threads):
    inputs = make_inputs(SHAPES[1])[:3]
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(operator(*inputs, EPS))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_compiles_to_one_graph(compiled, operator, monkeypatch, shared):
    monkeypatch.setattr(heads_module, "SHARED_WEIGHTS", 2**18 if shared else 0)
    feat, latents, given, weights = make_inputs(SHAPES[0])

    def run(feat: Tensor, *_: Tensor) -> list[Tensor]:
        return operator(feat, latents, given, EPS)

    torch._dynamo.reset()
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(feat, *weights)
    torch.testing.assert_close(outputs, heads(feat, latents, given, EPS), **TOLERANCE)
    grads = torch.autograd.grad(outputs[3].sum(), given[3].layers[0].weight)
    expected = torch.autograd.grad(run(feat)[3].sum(), given[3].layers[0].weight)
    torch.testing.assert_close(grads, expected, **TOLERANCE)


def test_opcheck(compiled):
    if compiled.backend != "cpp":
        pytest.skip("it is the C++ library's operator")
    feat, latents, given, _ = make_inputs(SHAPES[0])
    tensors = [x if x is None else x.detach() for h in given for layer in h.layers for x in layer]
    counts, layouts = [len(h.layers) for h in given], [h.layout or "" for h in given]
    trained = [h.trained for h in given]
    arguments = (feat, latents.drawn, tensors, counts, layouts, trained, *latents[1:], EPS)
    torch.library.opcheck(torch.ops.fastdreamer.heads.default, arguments)


def test_no_gradient_to_features(compiled, operator):
    feat, *rest = make_inputs(SHAPES[0])[:3]
    with pytest.raises(ValueError, match="detach it"):
        operator(feat.requires_grad_(), *rest, EPS)


def test_no_second_derivative(compiled):
    """It would take what is kept of the first pass for constant."""
    if compiled.backend != "cpp":
        pytest.skip("each operator refuses by itself")
    feat, latents, given, _ = make_inputs(SHAPES[1])
    first, *_, last = given[3].layers
    for loss in (Tensor.sum, lambda y: y.square().sum()):
        (y,) = heads_cpp(feat, latents, [Head((first, last), trained=True)], EPS)
        (grad,) = torch.autograd.grad(loss(y), last.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (y.sum() + grad.sum()).backward()


def test_a_class_out_of_range_is_refused(compiled):
    if compiled.backend != "cpp":
        pytest.skip("a GPU takes it for none")
    feat, latents, given, _ = make_inputs(SHAPES[0])
    latents.drawn[3, 1] = latents.classes
    with pytest.raises(RuntimeError, match="index"):
        heads_cpp(feat, latents, given, EPS)


def test_shapes_that_do_not_fit(compiled):
    if compiled.backend != "cpp":
        pytest.skip("PyTorch's product checks them")
    feat, latents, given, _ = make_inputs(SHAPES[0])
    with pytest.raises(ValueError, match="a weight must be"):
        heads_cpp(feat[:, 1:], latents._replace(start=0), given, EPS)
    with pytest.raises(TypeError, match="int32"):
        heads_cpp(feat, latents._replace(drawn=latents.drawn.long()), given, EPS)


class TestBoundary:
    """The C function called with what kernels/ would not pass."""

    @staticmethod
    def call(**changes: int | float) -> None:
        memory = (ctypes.c_float * 64)()
        at = ctypes.addressof(memory)
        layers = (CLayer * 2)(CLayer(at, at, at, at, 3, 2, 3), CLayer(at, at, None, None, 2, 3, 2))
        values = dict(N=1, deter=1, stoch=1, classes=2, deter_first=0, eps=EPS, count=1)
        pointers = dict(feat=at, index=at)
        names = {"layer_count": "count", "y": "y", "bins": "bins"}
        head = CHead(layers=layers, count=2, y=at)
        for name, field in names.items():
            if name in changes:
                setattr(head, field, changes.pop(name))
        if "width" in changes:
            layers[1].inputs = changes.pop("width")
        if "last" in changes:
            layers[1].outputs = changes.pop("last")
        arguments = CHeads(**(values | pointers | changes), heads=(CHead * 1)(head))
        library.function("fd_run_heads", SIGNATURE)(ctypes.byref(arguments))

    def test_valid(self, cpp):
        self.call()

    @pytest.mark.parametrize(
        "change",
        [
            {"N": -1},
            {"deter": 0},
            {"stoch": 0},
            {"classes": 0},
            {"count": 0},
            {"count": 17},
            {"layer_count": 0},
            {"layer_count": 9},
            {"width": 3},
            {"deter": 2},
        ],
        ids=str,
    )
    def test_wrong_sizes(self, cpp, change):
        with pytest.raises(RuntimeError, match="size"):
            self.call(**change)

    def test_an_even_number_of_bins(self, cpp):
        with pytest.raises(RuntimeError, match="size"):
            self.call(bins=64, last=2)

    @pytest.mark.parametrize("pointer", ["feat", "index", "y"])
    def test_null_pointers(self, cpp, pointer):
        with pytest.raises(RuntimeError, match="pointer"):
            self.call(**{pointer: None})
