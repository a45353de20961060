"""lambda_return against its plain PyTorch reference: backend x dtype x shape."""

from __future__ import annotations

import ctypes

import pytest
import torch
from operator_common import drawn, gradients
from torch import Tensor

from fastdreamer import kernels
from fastdreamer.kernels import library
from fastdreamer.kernels.lambda_return import BWD_SIGNATURE, FWD_SIGNATURE, lambda_return

pytestmark = pytest.mark.operators

# A recursion in C++, a scan over time in Triton: up to 401 terms in another order.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
}
SHAPES = [(1024, 15), (16, 63), (63, 63), (41, 401), (1, 15), (7, 1), (0, 15), (5, 0)]
DTYPES = list(TOLERANCE)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@drawn
def lambda_return_inputs(
    shape: tuple[int, int], dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> list[Tensor]:
    """Reward, discount, value and a lambda of its own at every step."""
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    discount, lam = (torch.rand(shape, generator=g, dtype=dtype) for _ in range(2))
    return [x.requires_grad_(requires_grad) for x in (reward, discount, value, lam)]


@pytest.fixture
def operator(ops: kernels.Ops, backend: str):
    assert ops.served_by["lambda_return"] == backend
    return ops.lambda_return


def test_by_hand(operator):
    reward, discount, value = (torch.tensor([x]) for x in ([1.0, 2.0], [0.5, 0.5], [8.0, 4.0]))
    lam = torch.tensor(0.5)
    last = 2 + 0.5 * 4
    first = 1 + 0.5 * (0.5 * 8 + 0.5 * last)
    assert operator(reward, discount, value, lam).tolist() == [[first, last]]


@dtypes
@shapes
def test_values(operator, dtype, shape):
    inputs = lambda_return_inputs(shape, dtype)
    actual = operator(*inputs)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, lambda_return(*inputs), **TOLERANCE[dtype])


@dtypes
@shapes
def test_gradients(operator, dtype, shape):
    inputs = lambda_return_inputs(shape, dtype, requires_grad=True)
    actual, expected = gradients(operator, inputs), gradients(lambda_return, inputs)
    for name, x, y in zip(("reward", "discount", "value", "lam"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE[dtype], msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("lam_shape", [(), (1,), (15,), (7, 1), (1, 15)], ids=str)
def test_broadcasts_lam(operator, lam_shape):
    *inputs, _ = lambda_return_inputs((7, 15), requires_grad=True)
    lam = torch.full(lam_shape, 0.95, dtype=torch.float64, requires_grad=True)
    full = lam.detach().expand(7, 15).clone().requires_grad_()
    torch.testing.assert_close(operator(*inputs, lam), lambda_return(*inputs, full))
    *actual, dlam = gradients(operator, [*inputs, lam])
    *expected, dfull = gradients(lambda_return, [*inputs, full])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dlam, dfull.sum_to_size(lam_shape))


@dtypes
def test_strided_inputs(operator, dtype):
    """Time-major, stepped and expanded views give the results of their contiguous copies."""
    reward, discount, value, lam = lambda_return_inputs((41, 63), dtype)
    views = [
        reward.T.contiguous().T,
        discount.repeat_interleave(2, 1)[:, ::2],
        torch.cat([value, value])[:41],
        lam[:, :1].expand(41, 63),
    ]
    views = [x.detach().requires_grad_() for x in views]
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    assert not any(x.is_contiguous() for x in (views[0], views[1], views[3]))
    assert torch.equal(operator(*views), operator(*copies))
    for x, y in zip(gradients(operator, views), gradients(operator, copies), strict=True):
        assert torch.equal(x, y)


def test_gradcheck(operator):
    assert torch.autograd.gradcheck(operator, lambda_return_inputs((3, 5), requires_grad=True))


def test_repeats_bit_for_bit(operator):
    inputs = lambda_return_inputs((41, 63), torch.float32, requires_grad=True)
    for x, y in zip(gradients(operator, inputs), gradients(operator, inputs), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(operator(*inputs), operator(*inputs))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, compiled):
    inputs = lambda_return_inputs((3, 5), torch.float32, requires_grad)
    torch.library.opcheck(torch.ops.fastdreamer.lambda_return.default, inputs)
    backward = torch.ops.fastdreamer.lambda_return_backward.default
    tensors = [x.detach() for x in (inputs[0], *inputs)]
    torch.library.opcheck(backward, tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(compiled, dynamic):
    operator = compiled.lambda_return

    def doubled(*inputs: Tensor) -> Tensor:
        return 2 * operator(*inputs)

    torch._dynamo.reset()
    graph = torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 15), (6, 9)):
        inputs = lambda_return_inputs(shape, requires_grad=True)
        assert torch.equal(graph(*inputs), doubled(*inputs))
        for x, y in zip(gradients(graph, inputs), gradients(doubled, inputs), strict=True):
            assert torch.equal(x, y)


def test_refuses_shapes(operator):
    x = torch.ones(4, 15)
    for wrong in (torch.ones(4, 14), torch.ones(15, 4), torch.ones(15), torch.ones(1, 15)):
        with pytest.raises(ValueError, match=r"must all be \(N, T\)"):
            operator(x, wrong, x, x)
    for wrong in (torch.ones(14), torch.ones(4), torch.ones(1, 1, 1)):
        with pytest.raises(ValueError, match="does not broadcast"):
            operator(x, x, x, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_refuses_dtypes(compiled, dtype):
    x = torch.ones(4, 15)
    for inputs in ([x.to(dtype)] * 4, [x, x, x, x.to(dtype)]):
        with pytest.raises(TypeError, match="all float32 or all float64"):
            compiled.lambda_return(*inputs)


def test_refuses_devices(compiled):
    x = torch.ones(4, 15)
    with pytest.raises(ValueError, match="inputs on"):
        compiled.lambda_return(x, x, x, x.to("meta"))


def test_refuses_second_derivatives(compiled):
    inputs = lambda_return_inputs((3, 5), requires_grad=True)
    grads = torch.autograd.grad(compiled.lambda_return(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grads[0].sum().backward()


class TestCInterface:
    """The C functions, called as another program would."""

    NAMES = ("fd_lambda_return", "fd_lambda_return_backward")

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.matrix = torch.ones(2, 3)
        self.strides = (ctypes.c_int64 * 2)(3, 1)

    def arguments(self, name: str) -> list:
        inputs, outputs = (4, 1) if name == "fd_lambda_return" else (5, 4)
        self.outputs = [torch.zeros(2, 3) for _ in range(outputs)]
        tensors = [self.matrix.data_ptr(), self.strides] * inputs
        return tensors + [x.data_ptr() for x in self.outputs] + [2, 3, 0, None]

    def call(self, name: str, arguments: list) -> None:
        signature = FWD_SIGNATURE if name == "fd_lambda_return" else BWD_SIGNATURE
        library.function(name, signature)(*arguments)

    @pytest.mark.parametrize("name", NAMES)
    def test_null_pointers(self, name):
        pointers = len(self.arguments(name)) - 4
        for i in range(pointers):
            arguments = self.arguments(name)
            arguments[i] = None
            with pytest.raises(RuntimeError, match="null pointer"):
                self.call(name, arguments)
            assert not any(x.any() for x in self.outputs)

    @pytest.mark.parametrize("name", NAMES)
    def test_sizes_and_dtype(self, name):
        for i, wrong, message in ((-4, -1, "size"), (-3, -1, "size"), (-2, 2, "dtype")):
            arguments = self.arguments(name)
            arguments[i] = wrong
            with pytest.raises(RuntimeError, match=message):
                self.call(name, arguments)
            assert not any(x.any() for x in self.outputs)

    @pytest.mark.parametrize("name", NAMES)
    def test_empty_needs_no_pointers(self, name):
        count = len(self.arguments(name)) - 4
        self.call(name, [None] * count + [0, 3, 0, None])
        self.call(name, [None] * count + [2, 0, 0, None])
