"""winograd against PyTorch's convolutions: kind x shape x instruction set.

Legend: N images, H rows, W columns, C channels before and O after.
"""

from __future__ import annotations

import ctypes
from typing import Any

import conv_common
import pytest
import torch
from conv_common import gradients
from torch import Tensor

from fastdreamer.kernels import conv_norm_act as conv_norm_act_module
from fastdreamer.kernels import library
from fastdreamer.kernels.conv_norm_act import LEAST_TILES
from fastdreamer.kernels.convolution import KINDS, CConv, CConvGrad, convolution
from fastdreamer.kernels.winograd import BWD_SIGNATURE, FWD_SIGNATURE, winograd

pytestmark = pytest.mark.operators

OPERATOR = torch.ops.fastdreamer.winograd.default
BACKWARD = torch.ops.fastdreamer.winograd_backward.default
# Every remainder of a tile's rows and columns, of a vector and of sixteen channels; several blocks
# of tiles, several parts of a sum, and right matrices larger than the least block.
SHAPES = [  # N, H, W, C, O
    (1, 2, 2, 1, 1),
    (3, 4, 4, 5, 16),
    (2, 6, 10, 33, 17),
    (2, 12, 14, 3, 49),
    (5, 8, 8, 48, 20),
    (1, 26, 50, 8, 3),
    (37, 8, 4, 16, 31),
    (70, 16, 16, 24, 12),
    (9, 4, 8, 130, 96),
    (0, 8, 4, 3, 5),
]
# Errors by the largest value. PyTorch's are below 2e-6 in these shapes; the transforms enlarge what
# is rounded by up to the squares of the matrices' norms, in practice by about five.
TOLERANCE = 2e-5

kinds = pytest.mark.parametrize("kind", KINDS)


def make_inputs(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, weight and bias, with gradient."""
    return conv_common.make_inputs(kind, None, shape, dtype)[:3]


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected.float(), rtol=0, atol=TOLERANCE * max(0.1, largest),
        msg=lambda m: f"{what}: {m}",
    )  # fmt: skip


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(cpp, isa, kind, shape):
    inputs = make_inputs(kind, shape)
    exact = [p.detach().double().requires_grad_() for p in inputs]
    y, expected = winograd(*inputs, kind), convolution(*exact, kind)
    assert y.is_contiguous()
    close(y, expected, "y")
    names = ("dx", "dweight", "dbias")
    for name, a, b in zip(names, gradients(y, inputs), gradients(expected, exact), strict=True):
        close(a, b, name)


@kinds
def test_without_bias_or_gradient_of_x(cpp, kind):
    x, weight, bias = make_inputs(kind, (3, 8, 8, 5, 7))
    y = winograd(x, weight, None, kind)
    assert torch.equal(y, winograd(x, weight, torch.zeros_like(bias), kind))
    (alone,) = gradients(winograd(x.detach(), weight, None, kind), [weight])
    assert torch.equal(alone, gradients(y, [weight])[0])


def test_equal_maxima(cpp, isa):
    """The gradient goes to the first of them, as in PyTorch's pooling."""
    x, weight, _ = make_inputs("pool", (3, 6, 8, 2, 20))
    weight.data.zero_()
    actual, expected = (
        gradients(f(x, weight, None, "pool"), [weight])[0] for f in (winograd, convolution)
    )
    close(actual, expected, "dweight")


@kinds
def test_nan_stays_in_its_image(cpp, isa, kind):
    """Within it, NaN may reach a few outputs more: those of its tile."""
    x, weight, bias = make_inputs(kind, (40, 4, 4, 3, 8))
    dy = torch.ones_like(convolution(x, weight, bias, kind))
    dy[7, 1, 1] = float("nan")
    (dx,) = torch.autograd.grad(winograd(x, weight, bias, kind), x, dy)
    x.data[3, 1, 1] = float("nan")
    y, expected = (f(x, weight, bias, kind) for f in (winograd, convolution))
    assert y[expected.isnan()].isnan().all()
    for images, image in ((y.isnan(), 3), (dx.isnan(), 7)):
        assert images[image].any() and images.sum() == images[image].sum()


@kinds
def test_threads_do_not_change_a_bit(cpp, threads, kind):
    inputs = make_inputs(kind, (150, 16, 12, 20, 24))
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        y = winograd(*inputs, kind)
        results.append([y, *gradients(y, inputs)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@kinds
def test_gradcheck_of_the_reference(kind):
    inputs = make_inputs(kind, (2, 4, 2, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(convolution, (*inputs, kind))


@kinds
def test_strides(cpp, kind):
    x, weight, bias = make_inputs(kind, (3, 8, 6, 5, 7))
    strided = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    turned = weight.detach().transpose(0, 1).contiguous().transpose(0, 1)
    y = winograd(x, weight, bias, kind)
    assert torch.equal(y, winograd(strided, turned, bias, kind))
    assert torch.autograd.grad(y.sum(), weight)[0].isfinite().all()  # dy of stride 0


def test_no_gradient_where_the_output_has_none(cpp):
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    x, weight, bias = make_inputs("pool", (16, 4, 4, 5, 6))
    scale = torch.ones(6, requires_grad=True)
    operator = torch.ops.fastdreamer.conv_norm_act
    for y in (
        winograd(x, weight, bias, "pool"),
        operator(x, weight, bias, scale, None, "pool", "rms", 0.1)[0],
    ):
        wanted = torch.autograd.grad(Undefined.apply(y).sum(), [x, weight], allow_unused=True)
        assert wanted == (None, None)


@kinds
def test_opcheck(cpp, kind):
    inputs = make_inputs(kind, (3, 4, 2, 2, 5))
    torch.library.opcheck(OPERATOR, (*inputs, kind))
    x, weight, bias = (p.detach() for p in inputs)
    y, index = OPERATOR(x, weight, bias, kind)
    for wants_dx in (True, False):
        torch.library.opcheck(BACKWARD, (torch.ones_like(y), x, weight, index, kind, wants_dx))


@kinds
def test_compiles_to_one_graph(cpp, kind):
    def twice(*inputs: Tensor) -> Tensor:
        return 2 * winograd(*inputs, kind)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(kind, (16, 4, 6, 24, 20))
    assert torch.equal(compiled(*inputs), twice(*inputs))
    for a, b in zip(*(gradients(f(*inputs), inputs) for f in (compiled, twice)), strict=True):
        assert torch.equal(a, b)


@kinds
def test_serves_many_channels(cpp, kind, monkeypatch):
    """Of many tiles in float32, in the place of PyTorch's convolutions; autocast keeps these."""
    calls = []

    def spy(*inputs: object) -> Tensor:
        calls.append(inputs)
        return winograd(*inputs)

    monkeypatch.setattr(conv_norm_act_module, "winograd", spy)
    options = (None, None, kind, "rms", 0.1)
    side = {"pool": 2, "stride": 8}.get(kind, 4)  # of one tile
    inputs = make_inputs(kind, (LEAST_TILES, side, side, 40, 32))
    ragged = make_inputs(kind, (LEAST_TILES, side, side + 2, 40, 32))
    few = [inputs[0][1:], *inputs[1:]]
    for served, tensors in ((True, inputs), (kind == "pool", ragged), (False, few)):
        y = cpp.conv_norm_act(*tensors, *options)
        assert bool(calls) == served
        close(y, convolution(*tensors, kind), "y")
        calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert cpp.conv_norm_act(*inputs, *options).dtype == torch.bfloat16
    assert not calls


def test_refuses(cpp):
    x, weight, bias = torch.ones(2, 4, 4, 3), torch.ones(5, 3, 5, 5), torch.ones(5)
    for wrong in ((x[0], weight, bias), (x[:, 1:], weight, bias), (x, weight[:, 1:], bias),
                  (x, weight[:0], bias[:0]), (x, weight, bias[1:])):  # fmt: skip
        with pytest.raises(ValueError, match=r"winograd: pool takes x \(N, H, W, C\)"):
            OPERATOR(*wrong, "pool")
    with pytest.raises(ValueError, match="winograd: kind must be one of"):
        OPERATOR(x, weight, bias, "unpool")
    for wrong in (
        (x.double(), weight, bias),
        (x, weight.bfloat16(), bias),
        (x.byte(), weight, bias),
    ):
        with pytest.raises(TypeError, match="winograd: all float32"):
            OPERATOR(*wrong, "pool")
    with pytest.raises(ValueError, match="inputs on"):
        OPERATOR(x, weight.to("meta"), bias, "pool")
    y, index = OPERATOR(x, weight, bias, "pool")
    for wrong in ((y[1:], index), (y, index[1:])):
        with pytest.raises(ValueError, match="dy and index must have y's shape"):
            BACKWARD(wrong[0], x, weight, wrong[1], "pool", True)
    with pytest.raises(TypeError, match="all float32"):
        BACKWARD(y.double(), x, weight, index, "pool", True)


class TestCInterface:
    """The C functions, called as another program would."""

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.tensors = {k: torch.ones(4096) for k in ("x", "weight", "bias")}
        self.tensors["index"] = torch.zeros(4096, dtype=torch.uint8)
        self.y, self.dy = torch.zeros(4096), torch.ones(4096)
        self.grads = {k: torch.zeros(4096) for k in ("dx", "dweight")}

    def call(self, backward: bool, changes: dict) -> None:
        sizes = {"kind": 0, "input": 0, "N": 3, "H": 4, "W": 4, "C": 2, "O": 3}
        fields = sizes | self.tensors | {"y": self.y}
        grads = {"dy": self.dy, "weight": self.tensors["weight"]} | self.grads
        conv = CConv.of(**fields | {k: v for k, v in changes.items() if k in fields})
        if not backward:
            library.function("fd_winograd", FWD_SIGNATURE)(ctypes.byref(conv))
            return
        grad = CConvGrad.of(**grads | {k: v for k, v in changes.items() if k in grads})
        function = library.function("fd_winograd_backward", BWD_SIGNATURE)
        function(ctypes.byref(conv), ctypes.byref(grad))

    def refuses(self, backward: bool, message: str, **changes: object) -> None:
        with pytest.raises(RuntimeError, match=message):
            self.call(backward, changes)
        assert not any(x.any() for x in (self.y, self.tensors["index"], *self.grads.values()))

    @pytest.mark.parametrize("backward", [False, True])
    def test_refuses(self, backward):
        for name in ("x", "index", "weight", *(("dy", "dweight") if backward else ("y",))):
            self.refuses(backward, "null pointer", **{name: None})
        for wrong in ({"kind": 4}, {"kind": -1}, {"N": -1}, {"H": 0}, {"W": 3}, {"C": 0}, {"O": 0}):
            self.refuses(backward, "size", **wrong)
        for name in "NHCO":
            self.refuses(backward, "size", **{name: 2**40})
        self.refuses(backward, "size", C=2**10, O=2**10)
        self.refuses(backward, "dtype", input=1)
        self.refuses(backward, "dtype", input=3)

    def test_no_dx(self):
        self.call(True, {"dx": None, "weight": None})
        assert self.grads["dweight"][: 25 * 6].all() and not self.grads["dx"].any()

    def test_no_images(self):
        self.call(False, dict.fromkeys((*self.tensors, "y")) | {"N": 0})
        for x in self.grads.values():
            x.fill_(7)
        self.call(True, dict.fromkeys(("x", "index", "dy")) | {"N": 0})
        assert self.grads["dx"].eq(7).all() and not self.grads["dweight"][: 25 * 6].any()
