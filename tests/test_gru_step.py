"""One step of either recurrent cell against its reference: cell x shape x backend.

Legend: B rows, D deter, U width of the input, G blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from operator_common import drawn, gradients
from torch import Tensor

from fastdreamer.kernels import gru_step as gru_step_module
from fastdreamer.kernels import library
from fastdreamer.kernels.gru_step import (
    BWD_SIGNATURE,
    FWD_SIGNATURE,
    _c_gru,
    block_gru_step,
    gru_step,
)

pytestmark = pytest.mark.operators

# Against float64: sums of up to a few hundred products, normed over a row.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
# B, D, U, G; empty, one row, several parts of rows, and widths beside a vector's length.
SHAPES = [
    (0, 8, 3, 2),
    (1, 24, 7, 8),
    (5, 3, 1, 1),
    (13, 40, 33, 8),
    (16, 64, 32, 4),
    (63, 41, 17, 1),
    (241, 16, 5, 2),
]
# Relative, of a whole gradient: every product and its inputs are rounded to 8 bits.
BFLOAT16_ERROR = 0.02
EPS = 1e-3
REFERENCES = {"gru_step": gru_step, "block_gru_step": block_gru_step}

names = pytest.mark.parametrize("name", REFERENCES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@drawn
def make_inputs(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """h, x and the cell's weights, all with a gradient."""
    g = torch.Generator().manual_seed(0)
    B, D, U, G = shape
    width = D // G
    vectors = [(D,), (D,), (G, width, 3 * width), (3 * D,)]
    weights = [(G, width + U, width), *vectors] if name == "block_gru_step" else []
    sizes = [(B, D), (B, U), *(weights or [(3 * D, D + U), (3 * D,), (3 * D,)])]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in sizes]


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


@names
@shapes
def test_values_and_gradients(compiled, isa, name, shape):
    inputs = make_inputs(name, shape)
    operator, reference, exact = getattr(compiled, name), REFERENCES[name], doubled(inputs)
    torch.testing.assert_close(operator(*inputs, EPS), reference(*exact, EPS).float(), **TOLERANCE)
    actual, expected = gradients(operator, inputs, EPS), gradients(reference, exact, EPS)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        size = float(y.abs().max()) + 1 if y.numel() else 1.0
        torch.testing.assert_close(
            x / size, y.float() / size, **TOLERANCE, msg=lambda m, i=i: f"gradient {i}: {m}"
        )


@names
def test_gradcheck(ops, name):
    inputs = make_inputs(name, (3, 4, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(getattr(ops, name), (*inputs, EPS))


@names
def test_float64_is_the_reference(compiled, name):
    inputs = make_inputs(name, SHAPES[3], torch.float64)
    assert torch.equal(getattr(compiled, name)(*inputs), REFERENCES[name](*inputs))


@names
def test_leading_dimensions(compiled, name):
    h, x, *weights = make_inputs(name, (12, *SHAPES[1][1:]))
    flat = getattr(compiled, name)(h, x, *weights)
    cube = getattr(compiled, name)(h.unflatten(0, (3, 4)), x.unflatten(0, (3, 4)), *weights)
    assert torch.equal(cube, flat.unflatten(0, (3, 4)))
    one = getattr(compiled, name)(h[0], x[0], *weights)
    torch.testing.assert_close(one, flat[0], **TOLERANCE)
    with pytest.raises(ValueError, match="differ in rows"):
        getattr(compiled, name)(h.unflatten(0, (3, 4)), x.unflatten(0, (4, 3)), *weights)


@names
def test_strided_inputs(compiled, name):
    inputs = make_inputs(name, SHAPES[4])
    views = [x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for x in inputs]
    views = [x.requires_grad_() for x in views]
    assert not views[0].is_contiguous()
    assert torch.equal(getattr(compiled, name)(*views), getattr(compiled, name)(*inputs))
    results = (gradients(getattr(compiled, name), x) for x in (views, inputs))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@names
def test_repeats_with_any_number_of_threads(compiled, threads, name):
    inputs = make_inputs(name, SHAPES[-1])
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(getattr(compiled, name)(*inputs))
    assert all(torch.equal(x, results[0]) for x in results)
    threads(2)
    repeated = [gradients(getattr(compiled, name), inputs) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*repeated, strict=True))


@names
def test_bfloat16(compiled, name):
    """States and matrices in bfloat16, the norm in float32; a CPU leaves it to the reference."""
    inputs = make_inputs(name, SHAPES[4])
    if compiled.backend == "cpp":
        half = [x.detach().bfloat16() for x in inputs]
        assert torch.equal(getattr(compiled, name)(*half), REFERENCES[name](*half))
        return
    half = [x.detach().bfloat16() if x.ndim > 1 else x.detach() for x in inputs]
    half = [x.requires_grad_() for x in half]
    actual, exact = gradients(getattr(compiled, name), half, EPS), doubled(half)
    for x, y, like in zip(actual, gradients(REFERENCES[name], exact, EPS), half, strict=True):
        assert x.dtype == like.dtype
        assert float((x - y).norm() / y.norm()) < BFLOAT16_ERROR


@names
def test_wide_states_are_the_references(compiled, monkeypatch, name):
    """Those that Triton's kernels do not hold in registers."""
    if compiled.backend == "cpp":
        pytest.skip("the C++ library takes any width")
    for limit in ("WIDEST_GRU", "WIDEST_BLOCK_GRU"):
        monkeypatch.setattr(gru_step_module, limit, 8)
    inputs = make_inputs(name, SHAPES[4])
    assert torch.equal(getattr(compiled, name)(*inputs, EPS), REFERENCES[name](*inputs, EPS))


@names
def test_nan_stays_in_its_row(compiled, isa, name):
    h, x, *weights = (t.detach() for t in make_inputs(name, SHAPES[3]))
    clean = getattr(compiled, name)(h, x, *weights)
    x[4, 0] = float("nan")
    spoilt = getattr(compiled, name)(h, x, *weights)
    assert spoilt[4].isnan().all()
    others = torch.arange(len(x)) != 4
    assert torch.equal(spoilt[others], clean[others])


@names
def test_opcheck(compiled, name):
    inputs = make_inputs(name, SHAPES[1])
    operator = getattr(torch.ops.fastdreamer, name)
    torch.library.opcheck(operator.default, (*inputs, EPS, torch.float32))
    with torch.no_grad():
        next_, *kept = operator(*inputs, EPS, torch.float32)
    tensors = [x.detach() for x in inputs]
    backward = getattr(torch.ops.fastdreamer, f"{name}_backward")
    torch.library.opcheck(backward.default, (next_, *tensors, *kept, EPS, torch.float32))


@names
def test_compiles_to_one_graph(compiled, name):
    def run(*inputs: Tensor) -> Tensor:
        return 2 * getattr(compiled, name)(*inputs)

    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(name, SHAPES[1])
    assert torch.equal(traced(*inputs), run(*inputs))
    for x, y in zip(gradients(traced, inputs), gradients(run, inputs), strict=True):
        assert torch.equal(x, y)


@names
def test_refuses_wrong_inputs(compiled, name):
    inputs = [x.detach() for x in make_inputs(name, SHAPES[3])]
    for i in range(len(inputs)):
        wrong = [*inputs[:i], inputs[i][..., :-1], *inputs[i + 1 :]]
        with pytest.raises(ValueError, match=f"^{name}: "):
            getattr(compiled, name)(*wrong)
    with pytest.raises(ValueError, match="h must be"):
        getattr(compiled, name)(inputs[0][:5], *inputs[1:])
    for wrong in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=f"{name}: all must be"):
            getattr(compiled, name)(inputs[0], inputs[1].to(wrong), *inputs[2:])
    with pytest.raises(ValueError, match="inputs on"):
        getattr(compiled, name)(inputs[0], inputs[1].to("meta"), *inputs[2:])


class TestCInterface:
    """The C functions, called as another program would."""

    functions = pytest.mark.parametrize("count", [5, 9], ids=["forward", "backward"])

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        h, x, *self.weights = (t.detach() for t in make_inputs("block_gru_step", SHAPES[1]))
        self.cell, self.memory = _c_gru(h, x, self.weights, EPS), torch.zeros(4096)

    def call(self, count: int, *arguments: object) -> None:
        name, signature = ("fd_gru_step", FWD_SIGNATURE)
        if count == 9:
            name, signature = "fd_gru_step_backward", BWD_SIGNATURE
        function: Callable = library.function(name, signature)
        function(*arguments)
        assert not self.memory.any()

    @functions
    def test_null_pointers(self, count):
        with pytest.raises(RuntimeError, match="null pointer"):
            self.call(count, None, 0, *[None] * count, 0)
        for i in range(count):
            pointers = [self.memory.data_ptr()] * count
            pointers[i] = None
            with pytest.raises(RuntimeError, match="null pointer"):
                self.call(count, ctypes.byref(self.cell), 1, *pointers, 0)

    @functions
    def test_no_rows(self, count):
        pointers = [None] * (count - 1) + [self.memory.data_ptr()]
        self.call(count, ctypes.byref(self.cell), 0, *pointers, 0)

    @functions
    @pytest.mark.parametrize(
        ("name", "value"),
        [("cell", 2), ("deter", 0), ("deter", 25), ("inputs", 0), ("blocks", 65), ("blocks", 0)],
    )
    def test_sizes(self, count, name, value):
        setattr(self.cell, name, value)
        with pytest.raises(RuntimeError, match="size"):
            self.call(count, ctypes.byref(self.cell), 1, *[self.memory.data_ptr()] * count, 0)

    @functions
    @pytest.mark.parametrize("name", ["hidden_weight", "hidden_bias", "gate_weight", "gate_bias"])
    def test_null_weights(self, count, name):
        setattr(self.cell, name, None)
        with pytest.raises(RuntimeError, match="null pointer"):
            self.call(count, ctypes.byref(self.cell), 1, *[self.memory.data_ptr()] * count, 0)
