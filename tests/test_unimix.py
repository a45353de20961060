"""The categorical operators against their references: operator x backend x shape."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import pytest
import torch
from operator_common import drawn, normal
from torch import Tensor

from fastdreamer import kernels
from fastdreamer.kernels import library, unimix
from fastdreamer.kernels.unimix import signature

pytestmark = pytest.mark.operators

# exp and log are within 2 units in the last place, and sums of K terms add in another order.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
CLASSES = (2, 3, 4, 8, 9, 16, 18, 32, 64, 65)
SHAPES = [(63, 41), (0, 4), (3, 0, 4), (4,), (1, 1), (2, 3, 5, 4)]
SHAPES += [(rows, k) for k in CLASSES for rows in (1, 41)]
OPERATORS = ("unimix", "log_softmax", "entropy", "kl", "balanced_kl", "sample")
REFERENCE = kernels.resolve("reference")

operators = pytest.mark.parametrize("name", OPERATORS)


def with_mix(ops: kernels.Ops, name: str):
    """The operator as a function of tensors alone."""
    if name in ("unimix", "log_softmax"):
        mix = 0.01 if name == "unimix" else 0.0
        return lambda x: ops.unimix(x, mix)
    return getattr(ops, name)


@drawn
def inputs_of(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = (2 * torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    if name not in ("unimix", "log_softmax"):
        x, y = (unimix.unimix(z) for z in (x, y))
    count = 2 if name in ("kl", "balanced_kl", "sample") else 1
    if name == "sample":
        y = -torch.empty(shape, dtype=dtype).exponential_(generator=g).log()
    return [x.requires_grad_(grad), y.requires_grad_(grad and name != "sample")][:count]


@drawn
def levels_of(classes: int) -> list[Tensor]:
    return [torch.randint(0, 3, (257, classes), generator=torch.Generator().manual_seed(0))]


def results(operator, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of a weighted sum of them."""
    outputs = operator(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, normal(*outputs), strict=True))
    leaves = [x for x in inputs if x.requires_grad]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total, leaves)]


@operators
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(compiled, isa, name, shape):
    served_by = compiled.served_by["unimix" if name == "log_softmax" else name]
    assert served_by == compiled.backend
    inputs = inputs_of(name, shape, grad=True)
    actual = results(with_mix(compiled, name), inputs)
    expected = results(with_mix(REFERENCE, name), inputs)
    assert all(x.is_contiguous() for x in actual)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@operators
def test_a_thousand_classes(compiled, isa, name):
    """Sums of so many terms leave rounding of the order of the largest result."""
    inputs = inputs_of(name, (5, 1000), grad=True)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    actual = results(with_mix(compiled, name), inputs)
    for x, y in zip(actual, results(with_mix(REFERENCE, name), exact), strict=True):
        assert (x - y).abs().max() <= 1e-6 * y.abs().max()


def test_more_than_two_to_the_31_elements(compiled, device):
    if device == "cpu":
        pytest.skip("8.6 GB: --device cuda")
    logp = torch.zeros(2**25 + 3, 64)
    logp[-3:] = -1
    nats = compiled.entropy(logp)
    assert nats[:-3].eq(0).all()
    torch.testing.assert_close(nats[-3:], 64 / torch.ones(3).exp(), **TOLERANCE[torch.float32])


@operators
@pytest.mark.parametrize("shape", [(41, 18), (0, 4), (4,)], ids=str)
def test_float64_equals_the_reference(compiled, name, shape):
    inputs = inputs_of(name, shape, torch.float64, grad=True)
    actual = results(with_mix(compiled, name), inputs)
    expected = results(with_mix(REFERENCE, name), inputs)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["unimix", "log_softmax", "entropy", "kl"])
def test_gradcheck(ops, name):
    assert torch.autograd.gradcheck(
        with_mix(ops, name), inputs_of(name, (3, 5), torch.float64, grad=True)
    )


def test_balanced_kl_gives_each_side_its_own_gradient(ops):
    inputs = inputs_of("balanced_kl", (7, 4), grad=True)
    for wanted, other, output in ((1, 0, 0), (0, 1, 1)):
        nats = ops.balanced_kl(*inputs)[output]
        grads = torch.autograd.grad(nats.sum(), inputs, allow_unused=True)
        assert grads[other] is None or not grads[other].any()
        detached = [x if i == wanted else x.detach() for i, x in enumerate(inputs)]
        (expected,) = torch.autograd.grad(REFERENCE.kl(*detached).sum(), inputs[wanted])
        torch.testing.assert_close(grads[wanted], expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("classes", CLASSES)
def test_sample_takes_the_first_of_equals(compiled, isa, classes):
    (levels,) = levels_of(classes)
    logp = levels.float()
    noise = torch.zeros_like(logp).masked_fill(levels == 1, float("-inf"))
    noise[0] = float("-inf")
    noise[1, -1] = noise[2, 0] = float("nan")
    onehot = compiled.sample(logp, noise)
    assert torch.equal(onehot, REFERENCE.sample(logp, noise))
    assert torch.equal(onehot.sum(-1), torch.ones(257))


@pytest.mark.parametrize("name", ["unimix", "log_softmax", "entropy", "kl"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf"), 1e4, -1e4])
def test_extreme_inputs(compiled, isa, name, value):
    inputs = [x.detach() for x in inputs_of(name, (35, 18))]
    for x in inputs:
        x[3, 5] = x[34, 17] = value
    if name in ("entropy", "kl") and value > 0:
        inputs = [x.clamp(max=0) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    actual, expected = with_mix(compiled, name)(*inputs), with_mix(REFERENCE, name)(*inputs)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32], equal_nan=True)


@pytest.mark.parametrize("mix", [0.5, 1.0])
def test_unimix_of_much_noise(compiled, isa, mix):
    inputs = inputs_of("unimix", (35, 18), grad=True)
    actual = results(lambda x: compiled.unimix(x, mix), inputs)
    expected = results(lambda x: REFERENCE.unimix(x, mix), inputs)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


def test_unimix_mixes_one_percent_by_default(ops):
    (x,) = inputs_of("unimix", (35, 18), grad=True)
    for actual, expected in zip(
        results(ops.unimix, [x]), results(with_mix(ops, "unimix"), [x]), strict=True
    ):
        assert torch.equal(actual, expected)


@operators
def test_non_contiguous_inputs(compiled, name):
    views = [x.detach().mT[:, ::2] for x in inputs_of(name, (36, 41))]
    assert not any(x.is_contiguous() for x in views)
    copies = [x.contiguous() for x in views]
    for inputs in (views, copies):
        inputs[0].requires_grad_()
    for x, y in zip(*(results(with_mix(compiled, name), z) for z in (views, copies)), strict=True):
        assert torch.equal(x, y)


@operators
def test_repeats_bit_for_bit_on_any_number_of_threads(compiled, threads, name):
    inputs, runs = inputs_of(name, (4099, 18), grad=True), []
    for count in (1, 2, 2):
        threads(count)
        runs.append(results(with_mix(compiled, name), inputs))
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_opcheck(compiled, dtype, grad):
    namespace, row = torch.ops.fastdreamer, torch.ones(3, dtype=dtype)
    for name in ("unimix", "entropy", "kl", "balanced_kl", "sample"):
        inputs = inputs_of(name, (3, 5), dtype, grad)
        torch.library.opcheck(getattr(namespace, name).default, inputs)
    p, q = (x.detach() for x in inputs_of("kl", (3, 5), dtype))
    torch.library.opcheck(namespace.unimix_backward.default, (p, q, 0.01))
    torch.library.opcheck(namespace.entropy_backward.default, (row, p))
    torch.library.opcheck(namespace.kl_backward.default, (row, row, p, q))
    torch.library.opcheck(namespace.sample_backward.default, (p, q))


@operators
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(compiled, name, dynamic):
    operator = with_mix(compiled, name)

    def doubled(*inputs: Tensor):
        outputs = operator(*inputs)
        return tuple(2 * y for y in outputs) if isinstance(outputs, tuple) else 2 * outputs

    torch._dynamo.reset()
    graph = torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 15), (6, 9)):
        inputs = inputs_of(name, shape, grad=True)
        for x, y in zip(results(graph, inputs), results(doubled, inputs), strict=True):
            assert torch.equal(x, y)


def test_refuses_wrong_inputs(compiled):
    x = torch.zeros(4, 3)
    for operator in (compiled.kl, compiled.balanced_kl, compiled.sample):
        with pytest.raises(ValueError, match=r"must be \(\.\.\., K\) of the same shape"):
            operator(x, x[:2])
        with pytest.raises(TypeError, match="all float32 or all float64"):
            operator(x, x.double())
        with pytest.raises(ValueError, match="inputs on"):
            operator(x, x.to("meta"))
    for operator in (compiled.unimix, compiled.entropy):
        for wrong in (torch.zeros(()), torch.zeros(4, 0)):
            with pytest.raises(ValueError, match=r"must be \(\.\.\., K\)"):
                operator(wrong)
        for dtype in (torch.bfloat16, torch.int64):
            with pytest.raises(TypeError, match="all float32 or all float64"):
                operator(x.to(dtype))
    for mix in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="mix must be in"):
            compiled.unimix(x, mix)
    with pytest.raises(ValueError, match="gradients must be"):
        torch.ops.fastdreamer.entropy_backward(torch.zeros(3), x)


def test_refuses_second_derivatives(compiled):
    (x,) = inputs_of("entropy", (3, 5), grad=True)
    (grad,) = torch.autograd.grad(compiled.entropy(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


class TestCInterface:
    """The C functions, called as another program would: (pointers, options) of each."""

    FUNCTIONS: ClassVar = {
        "fd_unimix": (2, 1),
        "fd_unimix_backward": (3, 1),
        "fd_entropy": (2, 0),
        "fd_entropy_backward": (3, 0),
        "fd_kl": (3, 0),
        "fd_kl_backward": (6, 0),
        "fd_sample": (3, 0),
        "fd_sample_backward": (3, 0),
    }
    names = pytest.mark.parametrize("name", FUNCTIONS)

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.tensors = [torch.zeros(2, 3) for _ in range(6)]

    def call(self, name: str, N: int = 2, K: int = 3, dtype: int = 0, null: int | None = None):
        pointers, options = self.FUNCTIONS[name]
        data = [x.data_ptr() for x in self.tensors[:pointers]]
        if null is not None:
            data[null] = None
        function = library.function(name, signature(pointers, options))
        function(*data, N, K, *[0.01] * options, dtype, None)

    @names
    def test_wrong_arguments(self, name):
        for i in range(self.FUNCTIONS[name][0]):
            with pytest.raises(RuntimeError, match="null pointer"):
                self.call(name, null=i)
        for wrong, message in (({"N": -1}, "size"), ({"K": 0}, "size"), ({"dtype": 1}, "dtype")):
            with pytest.raises(RuntimeError, match=message):
                self.call(name, **wrong)
        assert not any(x.any() for x in self.tensors)

    @names
    def test_empty_needs_no_pointers(self, name):
        self.call(name, N=0, null=0)

    def test_mix_out_of_range(self):
        function = library.function("fd_unimix", signature(2, 1))
        x = ctypes.c_void_p(self.tensors[0].data_ptr())
        with pytest.raises(RuntimeError, match="size is out of range"):
            function(x, x, 2, 3, 1.5, 0, None)
