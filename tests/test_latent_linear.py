"""A linear layer that knows its inputs' latents to be one-hot, against the plain product."""

from __future__ import annotations

import pytest
import torch
from operator_common import drawn, normal
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.latent_linear import SIGNATURE, compiled_latent_linear, latent_linear

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
    """feat, index, weight, bias, start, classes."""
    D, K, first = shape[1], shape[3], shape[-1]
    return *draw(shape, dtype), 0 if first else D, K


@drawn
def draw(shape: tuple, dtype: torch.dtype) -> list[Tensor]:
    N, D, S, K, outputs, first = shape
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-1, K, (N, S), generator=g, dtype=torch.int32)
    stoch = (index.unsqueeze(-1) == torch.arange(K)).to(dtype).flatten(1)
    deter = torch.randn(N, D, generator=g, dtype=dtype)
    feat = torch.cat([stoch, deter] if first else [deter, stoch], 1)
    weight = torch.randn(outputs, D + S * K, generator=g, dtype=dtype).requires_grad_()
    bias = torch.randn(outputs, generator=g, dtype=dtype).requires_grad_()
    return [feat, index, weight, bias]


def gradients(operator, inputs: tuple) -> list[Tensor]:
    y = operator(*inputs)
    return [y, *torch.autograd.grad(y, inputs[2:4], normal(y))]


@pytest.fixture
def by_rows(compiled, monkeypatch) -> None:
    """Triton's operator takes the rows whatever the sizes."""
    if compiled.backend == "triton":
        from fastdreamer.kernels import latent_linear_triton

        for limit in ("FEWEST_ROWS", "FEWEST_CLASSES"):
            monkeypatch.setattr(latent_linear_triton, limit, 0)
            monkeypatch.setattr(latent_linear_triton, f"{limit}_BACKWARD", 0)


@shapes
def test_values_and_gradients(compiled, isa, by_rows, shape):
    inputs = make_inputs(shape)
    actual, expected = gradients(compiled_latent_linear, inputs), gradients(latent_linear, inputs)
    for name, x, y in zip(("y", "dweight", "dbias"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_more_axes_and_no_bias(compiled, by_rows):
    feat, index, weight, _, start, classes = make_inputs(SHAPES[1])
    shaped = feat.unflatten(0, (13, 10)), index.unflatten(0, (13, 10))
    actual = compiled_latent_linear(*shaped, weight, None, start, classes)
    expected = latent_linear(feat, index, weight, None, start, classes)
    torch.testing.assert_close(actual.flatten(0, 1), expected, **TOLERANCE)


def test_gradcheck(compiled):
    feat, index, weight, bias, start, classes = make_inputs(SHAPES[0], torch.float64)

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        return latent_linear(feat, index, weight, bias, start, classes)

    assert torch.autograd.gradcheck(run, (weight, bias))
    assert torch.equal(
        run(weight, bias), compiled_latent_linear(feat, index, weight, bias, start, classes)
    )


def test_repeats_with_any_number_of_threads(compiled, by_rows, threads):
    inputs = make_inputs(SHAPES[3])
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(compiled_latent_linear(*inputs[:3], None, *inputs[4:]))
        weight = inputs[2]
        results[-1] = [results[-1], *torch.autograd.grad(results[-1].sum(), weight)]
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
    latents = slice(SHAPES[3][1], None)  # the rest of the gradient is PyTorch's product
    assert all(torch.equal(results[0][1][:, latents], x[1][:, latents]) for x in results[1:])


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_takes_the_product_where_it_costs_less(compiled, by_rows, monkeypatch, precision):
    if compiled.backend == "cpp":
        pytest.skip("in C++ the number of classes decides")
    from fastdreamer.kernels import latent_linear_triton

    if precision == "highest":
        monkeypatch.setattr(latent_linear_triton, "FEWEST_ROWS", 131)
        monkeypatch.setattr(latent_linear_triton, "FEWEST_CLASSES_BACKWARD", 33)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    inputs = make_inputs(SHAPES[1])
    pairs = zip(
        gradients(compiled_latent_linear, inputs), gradients(latent_linear, inputs), strict=True
    )
    assert all(torch.equal(x, y) for x, y in pairs)


def test_opcheck(compiled, by_rows):
    feat, index, weight, _, start, classes = make_inputs(SHAPES[0])
    operator = torch.ops.fastdreamer.latent_linear.default
    torch.library.opcheck(operator, (feat, index, weight, start, classes))


def test_compiles_to_one_graph(compiled, by_rows):
    inputs = make_inputs(SHAPES[0])
    torch._dynamo.reset()
    traced = torch.compile(compiled_latent_linear, fullgraph=True, backend="aot_eager")
    pairs = zip(gradients(traced, inputs), gradients(compiled_latent_linear, inputs), strict=True)
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


def test_classes_out_of_range(compiled, by_rows):
    """An error in C++; a GPU, whose host does not wait for its kernels, takes them for -1."""
    feat, index, weight, bias, start, classes = make_inputs(SHAPES[0])
    outside, none = torch.full_like(index, classes), torch.full_like(index, -1)
    if compiled.backend == "cpp":
        with pytest.raises(RuntimeError, match="size is out of range"):
            compiled_latent_linear(feat, outside, weight, bias, start, classes)
        return
    results = (
        gradients(compiled_latent_linear, (feat, i, weight, bias, start, classes))
        for i in (outside, none)
    )
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_refuses_dtypes_and_gradients(compiled):
    feat, index, weight, bias, start, classes = make_inputs(SHAPES[0])
    with pytest.raises(TypeError, match=r"index must be torch\.int32"):
        compiled_latent_linear(feat, index.long(), weight, bias, start, classes)
    with pytest.raises(ValueError, match="no gradient for feat"):
        compiled_latent_linear(feat.clone().requires_grad_(), index, weight, bias, start, classes)


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
