"""A linear layer that knows its inputs' latents to be one-hot, against the plain product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.latent_linear import SIGNATURE, latent_linear, latent_linear_cpp

pytestmark = pytest.mark.operators

# Sums of up to a hundred rows in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
# N, D, S, K, outputs, whether the latents come first
SHAPES = [
    (63, 5, 3, 16, 41, True),
    (130, 24, 4, 32, 160, False),
    (1, 8, 1, 17, 1, True),
    (300, 7, 5, 18, 255, False),
    (0, 8, 2, 16, 8, True),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_inputs(shape: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    N, D, S, K, outputs, first = shape
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-1, K, (N, S), generator=g, dtype=torch.int32)
    stoch = (index.unsqueeze(-1) == torch.arange(K)).to(dtype).flatten(1)
    deter = torch.randn(N, D, generator=g, dtype=dtype)
    feat = torch.cat([stoch, deter] if first else [deter, stoch], 1)
    weight = torch.randn(outputs, D + S * K, generator=g, dtype=dtype).requires_grad_()
    bias = torch.randn(outputs, generator=g, dtype=dtype).requires_grad_()
    return feat, index, weight, bias, 0 if first else D, K


def gradients(operator, inputs: tuple) -> list[Tensor]:
    y = operator(*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, inputs[2:4], dy)]


@shapes
def test_values_and_gradients(isa, shape):
    inputs = make_inputs(shape)
    actual, expected = gradients(latent_linear_cpp, inputs), gradients(latent_linear, inputs)
    for name, x, y in zip(("y", "dweight", "dbias"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_more_axes_and_no_bias(cpp):
    feat, index, weight, _, start, classes = make_inputs(SHAPES[1])
    shaped = feat.unflatten(0, (13, 10)), index.unflatten(0, (13, 10))
    actual = latent_linear_cpp(*shaped, weight, None, start, classes)
    expected = latent_linear(feat, index, weight, None, start, classes)
    torch.testing.assert_close(actual.flatten(0, 1), expected, **TOLERANCE)


def test_gradcheck(cpp):
    feat, index, weight, bias, start, classes = make_inputs(SHAPES[0], torch.float64)

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        return latent_linear(feat, index, weight, bias, start, classes)

    assert torch.autograd.gradcheck(run, (weight, bias))
    assert torch.equal(
        run(weight, bias), latent_linear_cpp(feat, index, weight, bias, start, classes)
    )


def test_repeats_with_any_number_of_threads(cpp, threads):
    inputs = make_inputs(SHAPES[3])
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(latent_linear_cpp(*inputs[:3], None, *inputs[4:]))
        weight = inputs[2]
        results[-1] = [results[-1], *torch.autograd.grad(results[-1].sum(), weight)]
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
    latents = slice(SHAPES[3][1], None)  # the rest of the gradient is PyTorch's product
    assert all(torch.equal(results[0][1][:, latents], x[1][:, latents]) for x in results[1:])


def test_opcheck(cpp):
    feat, index, weight, _, start, classes = make_inputs(SHAPES[0])
    operator = torch.ops.fastdreamer.latent_linear.default
    torch.library.opcheck(operator, (feat, index, weight, start, classes))


def test_compiles_to_one_graph(cpp):
    inputs = make_inputs(SHAPES[0])
    torch._dynamo.reset()
    compiled = torch.compile(latent_linear_cpp, fullgraph=True, backend="aot_eager")
    pairs = zip(gradients(compiled, inputs), gradients(latent_linear_cpp, inputs), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_refuses(ops):
    feat, index, weight, bias, start, classes = make_inputs(SHAPES[0])
    run = ops.latent_linear
    wrong = [
        (feat[1:], index, weight, bias, start, classes),
        (feat, index, weight[:, 1:], bias, start, classes),
        (feat, index, weight, bias, 1, classes),
        (feat, index, weight, bias, start, 2 * classes),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="latent_linear: feat"):
            run(*arguments)


def test_cpp_refuses_dtypes_and_gradients(cpp):
    feat, index, weight, bias, start, classes = make_inputs(SHAPES[0])
    with pytest.raises(TypeError, match=r"index must be torch\.int32"):
        latent_linear_cpp(feat, index.long(), weight, bias, start, classes)
    with pytest.raises(ValueError, match="no gradient for feat"):
        latent_linear_cpp(feat.clone().requires_grad_(), index, weight, bias, start, classes)
    with pytest.raises(RuntimeError, match="size is out of range"):
        latent_linear_cpp(feat, index + classes, weight, bias, start, classes)


@pytest.mark.parametrize("name", ["fd_latent_gather", "fd_latent_scatter"])
def test_c_interface(cpp, name):
    memory, index = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    arguments = [memory.data_ptr(), index.data_ptr(), memory.data_ptr(), 2, 2, 4, 4, 0, None]
    function = library.function(name, SIGNATURE)
    function(*arguments)
    changes = {0: None, 1: None, 2: None, 3: -1, 4: 0, 5: 0, 6: 0, 7: 1}
    for position, value in changes.items():
        changed = [*arguments]
        changed[position] = value
        with pytest.raises(RuntimeError, match=r"null pointer|size|dtype"):
            function(*changed)
    function(*(None,) * 3, 0, *arguments[4:])
