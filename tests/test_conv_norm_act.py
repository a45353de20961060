"""conv_norm_act against its plain PyTorch reference: kind x norm x shape x instruction set.

Legend: N images, H rows, W columns, C channels before and O after.
"""

from __future__ import annotations

import ctypes
from itertools import cycle, pairwise

import pytest
import torch
from conv_common import gradients, make_inputs
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.conv_norm_act import (
    BLOCK,
    BWD_SIGNATURE,
    FWD_SIGNATURE,
    KINDS,
    CConv,
    CConvGrad,
    conv_norm_act,
    conv_norm_act_cpp,
)

pytestmark = pytest.mark.operators

OPERATOR = torch.ops.fastdreamer.conv_norm_act.default
BACKWARD = torch.ops.fastdreamer.conv_norm_act_backward.default
EPS = 0.1  # so that no norm of few channels amplifies the rounding before it
# Every channel count beside a tile's and a vector's, even sizes, one image to several blocks.
CHANNELS = (1, 3, 5, 8, 12, 16, 17, 24, 33)
SHAPES = [  # N, H, W, C, O
    *((3, 6, 4, c, o) for c, o in pairwise(CHANNELS)),
    *((2, 4, 4, o, c) for c, o in pairwise(CHANNELS)),
    (1, 4, 4, 2, 2),
    (15, 4, 6, 3, 4),
    (16, 8, 4, 4, 3),
    (37, 10, 14, 3, 7),
    (2, 64, 64, 3, 8),
    (2, 26, 50, 8, 3),
    (0, 8, 4, 3, 5),
    # Of "pool" these go by row_filter.h.
    (17, 30, 16, 8, 12),
    (18, 2, 8, 5, 7),
    (3, 14, 12, 17, 2),
    (1, 6, 40, 1, 13),
]

kinds = pytest.mark.parametrize("kind", KINDS)
NORMS = ("layer", "rms", None)
norms = pytest.mark.parametrize("norm", NORMS)
cases = pytest.mark.parametrize(("shape", "norm"), list(zip(SHAPES, cycle(NORMS))), ids=str)


def doubled(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if p is None else p.detach().double().requires_grad_() for p in inputs]


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Sums of products cancel: their error is relative to the largest of them."""
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected.float(), rtol=1e-5, atol=1e-5 * max(1.0, largest),
        msg=lambda m: f"{what}: {m}",
    )  # fmt: skip


@kinds
@cases
def test_values_and_gradients(cpp, isa, kind, norm, shape):
    inputs = make_inputs(kind, norm, shape)
    exact = doubled(inputs)
    options = kind, norm or "rms", EPS
    y, expected = OPERATOR(*inputs, *options)[0], conv_norm_act(*exact, *options)
    assert y.is_contiguous()
    close(y, expected, "y")
    for a, b in zip(gradients(y, inputs), gradients(expected, exact), strict=True):
        close(a, b, "gradient")


@kinds
def test_pixels(cpp, isa, kind):
    """uint8 is converted as PyTorch does, bit for bit, whatever the width's remainder."""
    for shape in ((18, 6, 4, 3, 5), (2, 64, 64, 3, 8)):
        _, *weights = make_inputs(kind, "rms", shape)
        g = torch.Generator().manual_seed(0)
        x = torch.randint(256, shape[:4], dtype=torch.uint8, generator=g)
        floats = x.float() / 255 - 0.5
        options = kind, "rms", EPS
        y, expected = (OPERATOR(p, *weights, *options)[0] for p in (x, floats))
        assert torch.equal(y, expected)
        for a, b in zip(gradients(y, weights), gradients(expected, weights), strict=True):
            assert torch.equal(a, b)
        close(y, conv_norm_act(x, *doubled(weights), *options), "y")


@kinds
@pytest.mark.parametrize(
    "shape", [(18, 6, 4, 3, 5), (2, 26, 50, 8, 3), (37, 4, 4, 17, 33)], ids=str
)
def test_bfloat16(cpp, isa, kind, shape):
    """Images and their gradients are those of float32, rounded, in whatever order they are kept."""
    x, *weights = make_inputs(kind, "layer", shape)
    half = x.detach().bfloat16().requires_grad_()
    x = half.detach().float().requires_grad_()
    options = kind, "layer", EPS
    y, expected = (
        OPERATOR(half, *weights, *options, torch.bfloat16)[0],
        OPERATOR(x, *weights, *options)[0],
    )
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    dx, *grads = torch.autograd.grad(y, [half, *weights], dy)
    exact, *others = torch.autograd.grad(expected, [x, *weights], dy.float())
    assert torch.equal(dx, exact.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@kinds
def test_mixed_precision(cpp, kind):
    """Images are bfloat16 between products, float32 at the end; computed in float32."""
    inputs = make_inputs(kind, "rms", (BLOCK, 6, 4, 3, 5))
    x, *rest = inputs
    options = kind, "rms", EPS
    with torch.autocast("cpu", torch.bfloat16):
        y = cpp.conv_norm_act(*inputs, *options)
        last = cpp.conv_norm_act(x.bfloat16(), *rest[:2], None, None, *options)
    assert torch.equal(y, OPERATOR(*inputs, *options)[0].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):  # also the operator by itself
        assert torch.equal(y, OPERATOR(*inputs, *options, torch.bfloat16)[0])
    x = x.bfloat16().float()
    assert torch.equal(last, OPERATOR(x, *rest[:2], None, None, *options)[0])


def test_equal_maxima_and_nan(cpp, isa):
    """The gradient goes to the first of equal maxima and to a NaN, as in PyTorch's pooling.

    Where minimal filtering rounds otherwise equal maxima apart, it goes to another of them; 10
    columns go without.
    """
    x, weight, _bias, *_ = make_inputs("pool", None, (3, 6, 10, 2, 20))
    x.data.round_()
    weight.data.zero_()[:, :, 2, 2] = 1
    x.data[1, 2, 3] = float("nan")
    inputs = [x, weight, None, None, None]
    y, expected = (f(*inputs, "pool", "rms", EPS) for f in (OPERATOR, conv_norm_act))
    torch.testing.assert_close(y[0], expected, equal_nan=True)
    (dx,), (exact,) = (torch.autograd.grad(v.sum(), x) for v in (y[0], expected))
    torch.testing.assert_close(dx, exact, equal_nan=True)


@pytest.mark.parametrize("kind", ["pool", "upsample"])
def test_nan_stays_in_its_image(cpp, isa, kind):
    inputs = make_inputs(kind, "layer", (20, 4, 4, 3, 8))
    inputs[0].data[3, 1, 1] = float("nan")
    y = OPERATOR(*inputs, kind, "layer", EPS)[0]
    (dx,) = torch.autograd.grad(y.sum(), inputs[0])
    for images in (y.isnan(), dx.isnan()):
        assert images[3].any() and images.sum() == images[3].sum()


@kinds
def test_threads_do_not_change_a_bit(cpp, threads, kind):
    inputs = make_inputs(kind, "layer", (150, 8, 4, 3, 8))
    results = []
    for count in (1, 2, 2):
        threads(count)
        y = OPERATOR(*inputs, kind, "layer", EPS)[0]
        results.append([y, *gradients(y, inputs)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@kinds
@norms
def test_gradcheck(ops, kind, norm):
    inputs = make_inputs(kind, norm, (2, 4, 2, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(ops.conv_norm_act, (*inputs, kind, norm or "rms", EPS))


@kinds
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 40])
def test_every_way_gives_the_same(cpp, kind, count):
    """Few images, other types and strided ones are served too, in whatever way."""
    inputs = make_inputs(kind, "layer", (count, 4, 6, 3, 8))
    options = kind, "layer", EPS
    expected = conv_norm_act(*inputs, *options)
    exact = doubled(inputs)
    torch.testing.assert_close(cpp.conv_norm_act(*exact, *options), conv_norm_act(*exact, *options))
    strided = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wanted = gradients(expected, inputs)
    for x in (inputs[0], strided):
        y = cpp.conv_norm_act(x, *inputs[1:], *options)
        close(y, expected, "y")
        for a, b in zip(gradients(y, inputs), wanted, strict=True):
            close(a, b, "gradient")
    y = cpp.conv_norm_act(*inputs, *options)
    assert torch.autograd.grad(y.sum(), inputs[1])[0].isfinite().all()  # dy of stride 0


@kinds
def test_many_channels(cpp, kind):
    """Beyond some channels PyTorch is faster: whatever computes them, they are the same."""
    inputs = make_inputs(kind, "layer", (18, 4, 6, 40, 48))
    exact = doubled(inputs)
    y, expected = (
        f(*p, kind, "layer", EPS) for f, p in ((cpp.conv_norm_act, inputs), (conv_norm_act, exact))
    )
    close(y, expected, "y")
    for a, b in zip(gradients(y, inputs), gradients(expected, exact), strict=True):
        close(a, b, "gradient")


@kinds
@norms
def test_opcheck(cpp, kind, norm):
    inputs = make_inputs(kind, norm, (3, 4, 2, 2, 5))
    options = kind, norm or "rms", EPS
    torch.library.opcheck(OPERATOR, (*inputs, *options))
    half = inputs[0].detach().bfloat16().requires_grad_()
    torch.library.opcheck(OPERATOR, (half, *inputs[1:], *options, torch.bfloat16))
    x, weight, bias, scale, shift = (None if p is None else p.detach() for p in inputs)
    y, z, index = OPERATOR(x, weight, bias, scale, shift, *options)
    for wants_dx in (True, False):
        tensors = (torch.ones_like(y), x, weight, scale, shift, z, index)
        torch.library.opcheck(BACKWARD, (*tensors, *options, wants_dx))


@kinds
@pytest.mark.parametrize("channels", [(3, 8), (40, 48)], ids=str)
def test_compiles_to_one_graph(cpp, kind, channels):
    def twice(*inputs: Tensor) -> Tensor:
        return 2 * cpp.conv_norm_act(*inputs, kind, "layer", EPS)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(kind, "layer", (BLOCK, 4, 6, *channels))
    assert torch.equal(compiled(*inputs), twice(*inputs))
    for a, b in zip(*(gradients(f(*inputs), inputs) for f in (compiled, twice)), strict=True):
        assert torch.equal(a, b)


def test_refuses_wrong_shapes(ops):
    x, weight, bias = torch.ones(16, 4, 4, 3), torch.ones(5, 3, 5, 5), torch.ones(5)
    for wrong in (
        (x[0], weight, bias, None, None),
        (x[:, 1:], weight, bias, None, None),
        (x[:, :, 1:], weight, bias, None, None),
        (x[:, :0], weight, bias, None, None),
        (x[..., 1:], weight, bias, None, None),
        (x, weight[0], bias, None, None),
        (x, weight[:, :, 1:], bias, None, None),
        (x, weight[:0], bias[:0], None, None),
        (x, weight, bias[1:], None, None),
        (x, weight, bias, bias[1:], None),
        (x, weight, bias, bias, bias[1:]),
    ):
        with pytest.raises(ValueError, match=r"pool takes x \(N, H, W, C\) with H and W even"):
            ops.conv_norm_act(*wrong, "pool", "layer", EPS)
    with pytest.raises(ValueError, match="kind must be one of"):
        ops.conv_norm_act(x, weight, bias, None, None, "unpool", "rms", EPS)
    with pytest.raises(ValueError, match="shift without a scale"):
        ops.conv_norm_act(x, weight, bias, None, bias, "pool", "layer", EPS)
    for norm, shift in (("batch", None), ("rms", bias)):
        with pytest.raises(ValueError, match=r"norm|RMSNorm|kind"):
            ops.conv_norm_act(x, weight, bias, bias, shift, "pool", norm, EPS)


def test_operator_refuses_dtypes_and_devices(cpp):
    x, weight, bias = torch.ones(16, 4, 4, 3), torch.ones(5, 3, 5, 5), torch.ones(5)
    options = None, None, "pool", "rms", EPS
    for wrong in (
        (x.double(), weight, bias),
        (x, weight.bfloat16(), bias),
        (x.int(), weight, bias),
    ):
        with pytest.raises(TypeError, match="all float32, or x bfloat16 or uint8"):
            OPERATOR(*wrong, *options)
    with pytest.raises(ValueError, match="inputs on"):
        OPERATOR(x, weight.to("meta"), bias, *options)
    y, z, index = OPERATOR(x, weight, bias, bias, None, *options[2:])
    for wrong in ((y[1:], z, index), (y.double(), z, index), (y, z[:0], index), (y, z, index[:0])):
        with pytest.raises(ValueError, match=r"dy|forward pass"):
            BACKWARD(wrong[0], x, weight, bias, None, *wrong[1:], *options[2:], True)
    with pytest.raises(TypeError, match="no gradient"):
        BACKWARD(y, x.byte(), weight, bias, None, z, index, *options[2:], True)


def test_the_library_serves_a_batch(cpp, monkeypatch):
    """The batches of training take the library's path, which the goldens rely on."""
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", None)
    for kind in KINDS:
        conv_norm_act_cpp(*make_inputs(kind, "rms", (32, 4, 4, 3, 8)), kind, "rms", EPS)


class TestCInterface:
    """The C functions, called as another program would."""

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.tensors = {k: torch.ones(4096) for k in ("x", "weight", "bias", "scale", "shift")}
        self.tensors["index"] = torch.zeros(4096, dtype=torch.int32)
        self.outputs = {k: torch.zeros(4096) for k in ("y", "z")}
        names = ("dx", "dweight", "dbias", "dscale", "dshift")
        self.dy, self.grads = torch.ones(4096), {k: torch.zeros(4096) for k in names}

    def call(self, backward: bool, changes: dict) -> None:
        sizes = {
            "kind": 0,
            "input": 0,
            "output": 0,
            "centred": 1,
            "eps": EPS,
            "N": 3,
            "H": 4,
            "W": 4,
            "C": 2,
        }
        fields = sizes | {"O": 3} | self.tensors | self.outputs
        grads = {"dy": self.dy, "weight": self.tensors["weight"]} | self.grads
        fields |= {k: v for k, v in changes.items() if k in fields}
        conv = CConv.of(**fields)
        if not backward:
            library.function("fd_conv_norm_act", FWD_SIGNATURE)(ctypes.byref(conv))
            return
        grad = CConvGrad.of(**grads | {k: v for k, v in changes.items() if k in grads})
        function = library.function("fd_conv_norm_act_backward", BWD_SIGNATURE)
        function(ctypes.byref(conv), ctypes.byref(grad))

    def refuses(self, backward: bool, message: str, **changes: object) -> None:
        with pytest.raises(RuntimeError, match=message):
            self.call(backward, changes)
        assert not any(x.any() for x in (*self.outputs.values(), *self.grads.values()))

    @pytest.mark.parametrize("backward", [False, True])
    def test_refuses(self, backward):
        own = ("dy", "dweight", "dshift") if backward else ("y", "weight")
        for name in ("x", "z", "index", *own):
            self.refuses(backward, "null pointer", **{name: None})
        for wrong in ({"kind": 4}, {"kind": -1}, {"N": -1}, {"H": 0}, {"W": 3}, {"C": 0}, {"O": 0}):
            self.refuses(backward, "size", **wrong)
        for name in "NHCO":
            self.refuses(backward, "size", **{name: 2**40})
        self.refuses(backward, "size", C=2**10, O=2**10)
        self.refuses(backward, "dtype", input=1)
        self.refuses(backward, "dtype", output=3)
        if backward:
            self.refuses(backward, "dtype", input=3)

    def test_no_images(self):
        self.call(False, dict.fromkeys((*self.tensors, *self.outputs)) | {"N": 0})
        for x in self.grads.values():
            x.fill_(7)
        self.call(True, dict.fromkeys(("x", "z", "index", "dy")) | {"N": 0})
        assert self.grads["dx"].eq(7).all() and not self.grads["dweight"][: 25 * 6].any()
