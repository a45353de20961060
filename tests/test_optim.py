"""The optimiser step against its reference: backend x tensors of odd sizes."""

from __future__ import annotations

import ctypes

import pytest
import torch
from operator_common import drawn
from torch import Tensor

from fastdreamer.kernels import library, optim

pytestmark = pytest.mark.operators

# Norms are added in float32, by the library in double; a step rounds some ten times.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.float64: {"rtol": 1e-12, "atol": 1e-15},
}
SHAPES = [(63, 41), (1,), (), (0,), (5, 0, 3), (16384,), (16385,), (3, 100, 129), (17, 2)]
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def inputs_of(dtype: torch.dtype = torch.float32) -> Lists:
    """Parameters, gradients of which every second is clipped, and moments from earlier steps."""
    tensors = draw(dtype)
    count = len(SHAPES)
    params, grads, nu, mu = (tensors[i : i + count] for i in range(0, 4 * count, count))
    return params, grads, nu, mu


@drawn
def draw(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    lists = [[torch.randn(shape, generator=g, dtype=dtype) for shape in SHAPES] for _ in range(4)]
    params, grads, nu, mu = lists
    params[-1].zero_()
    for grad in grads[::2]:
        grad.mul_(0.01)
    return [*params, *grads, *(x.square() for x in nu), *mu]


def steps(operator, lists: Lists, count: int = 3) -> list[Tensor]:
    """Parameters and moments after some steps, then the gradient's norms."""
    params, grads, nu, mu = ([x.clone() for x in tensors] for tensors in lists)
    norms = [operator(params, grads, nu, mu, step + 1, 0.01, 0.3) for step in range(count)]
    torch.testing.assert_close(grads, lists[1], rtol=0, atol=0, equal_nan=True)
    return [*params, *nu, *mu, *norms]


@pytest.fixture
def operator(compiled):
    assert compiled.served_by["agc_laprop"] == compiled.backend
    return compiled.agc_laprop


def test_equals_the_reference(operator, isa):
    lists = inputs_of()
    torch.testing.assert_close(
        steps(operator, lists), steps(optim.agc_laprop, lists), **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_reference_takes_steps_and_rates_as_tensors(dtype):
    """As a captured step does, whose count is on the device. 1 - 0.999 needs float64 in there."""

    def by_tensors(*args):
        lists, step, lr, clip = args[:4], *args[4:]
        rate = torch.tensor(lr, dtype=torch.float64)
        return optim.agc_laprop(*lists, torch.tensor(step), rate, clip)

    lists, tolerance = inputs_of(dtype), {torch.float32: 3e-7, torch.float64: 1e-15}[dtype]
    actual, expected = steps(by_tensors, lists), steps(optim.agc_laprop, lists)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_takes_steps_and_rates_as_tensors(operator):
    def by_tensors(*args):
        step, lr = torch.tensor(args[4]), torch.tensor(args[5], dtype=torch.float64)
        return operator(*args[:4], step, lr, args[6])

    lists = inputs_of()
    actual, expected = steps(by_tensors, lists), steps(operator, lists)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_many_tensors(operator):
    """More than the addresses that one of Triton's launches takes."""
    g = torch.Generator("cpu").manual_seed(0)
    shape = (100, 3)
    params, grads, nu, mu = (
        list(torch.randn(shape, generator=g, device="cpu").to(torch.get_default_device()))
        for _ in range(4)
    )
    lists = params, grads, [x.square() for x in nu], mu
    torch.testing.assert_close(
        steps(operator, lists), steps(optim.agc_laprop, lists), **TOLERANCE[torch.float32]
    )


def test_captured_with_its_gradients(operator, device):
    """In a CUDA graph, whose gradients lie elsewhere than those of the step before capturing."""
    if device != "cuda":
        pytest.skip("a graph needs a GPU")
    actual, expected = inputs_of(), inputs_of()
    step, scale = torch.ones((), dtype=torch.int64), torch.ones(())
    rate = torch.tensor(0.01)

    def run() -> None:
        operator(actual[0], [x * scale for x in actual[1]], *actual[2:], step, rate, 0.3)
        step.add_(1)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for count, factor in enumerate((1.0, 2.0, 3.0), start=1):
        if count > 1:
            scale.fill_(factor)
            graph.replay()
        grads = [x * factor for x in expected[1]]
        optim.agc_laprop(expected[0], grads, *expected[2:], count, 0.01, 0.3)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


def test_float64_equals_the_reference(operator):
    lists = inputs_of(torch.float64)
    torch.testing.assert_close(
        steps(operator, lists), steps(optim.agc_laprop, lists), **TOLERANCE[torch.float64]
    )


def test_norm_is_that_of_all_gradients(ops):
    lists = inputs_of()
    expected = torch.cat([x.flatten() for x in lists[1]]).double().norm().float()
    torch.testing.assert_close(steps(ops.agc_laprop, lists, 1)[-1], expected)


def test_rate_zero_leaves_the_parameters(operator, isa):
    params, grads, nu, mu = inputs_of()
    before = [x.clone() for x in params]
    operator(params, grads, nu, mu, 1, 0.0, 0.3)
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30, 0.0])
def test_extreme_gradients(operator, isa, value):
    lists = inputs_of()
    lists[1][0][3, 5] = value
    lists[1][-1].fill_(value)
    torch.testing.assert_close(
        steps(operator, lists),
        steps(optim.agc_laprop, lists),
        **TOLERANCE[torch.float32],
        equal_nan=True,
    )


@pytest.mark.parametrize("which", range(4))
def test_non_contiguous_tensors(operator, which):
    lists, copies = inputs_of(), inputs_of()
    lists[which][0] = lists[which][0].t().contiguous().t()
    assert not lists[which][0].is_contiguous()
    strided = lists[which][0]
    operator(*lists, 1, 0.01, 0.3)
    optim.agc_laprop(*copies, 1, 0.01, 0.3)
    assert lists[which][0] is strided
    for actual, expected in zip(lists, copies, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


def test_repeats_bit_for_bit_on_any_number_of_threads(operator, threads):
    runs = []
    for count in (1, 2, 2):
        threads(count)
        runs.append(steps(operator, inputs_of()))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_opcheck(compiled, dtype):
    lists = [tensors[:2] for tensors in inputs_of(dtype)]
    scalars = torch.tensor(1), torch.tensor(0.01, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastdreamer.agc_laprop.default, (*lists, *scalars, 0.3))


def test_compiles_to_one_graph(operator):
    def doubled(*lists: list[Tensor]) -> Tensor:
        return 2 * operator(*lists, 1, 0.01, 0.3)

    torch._dynamo.reset()
    traced = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    actual, expected = inputs_of(), inputs_of()
    assert torch.equal(traced(*actual), doubled(*expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_refuses_wrong_inputs(operator):
    x = torch.zeros(4, 3)
    for wrong, error, message in (
        ([x, x], ValueError, "lists of one length"),
        ([x[:2]], ValueError, "equal shapes"),
        ([x.double()], TypeError, "all float32 or all float64"),
        ([x.to("meta")], ValueError, "inputs on"),
    ):
        with pytest.raises(error, match=message):
            operator([x], wrong, [x], [x], 1, 0.01, 0.3)
    half = [x.bfloat16()]
    with pytest.raises(TypeError, match="all float32 or all float64"):
        operator(half, half, half, half, 1, 0.01, 0.3)
    with pytest.raises(ValueError, match="steps count from 1"):
        operator([x], [x], [x], [x], 0, 0.01, 0.3)


class TestCInterface:
    """The C function, called as another program would."""

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.tensors = [torch.ones(3) for _ in range(4)]
        self.norm = ctypes.c_double(-1)

    def call(self, wrong: dict[int, object]) -> None:
        arguments: list = [optim._pointers([x]) for x in self.tensors]
        arguments += [optim._sizes(self.tensors[:1]), 1, 1, 0.01, 0.3, 0.9, 0.999, 1e-20]
        arguments += [ctypes.addressof(self.norm), 0, None]
        for i, value in wrong.items():
            arguments[i] = value
        library.function("fd_agc_laprop", optim.AGC_LAPROP_SIGNATURE)(*arguments)

    def test_wrong_arguments(self):
        null = (ctypes.c_void_p * 1)(None)
        negative = (ctypes.c_int64 * 1)(-1)
        cases = [({i: wrong}, "null pointer") for i in range(4) for wrong in (None, null)]
        cases += [({4: None}, "null pointer"), ({12: None}, "null pointer"), ({13: 1}, "dtype")]
        cases += [({4: negative}, "size"), ({5: -1}, "size"), ({6: 0}, "size")]
        for wrong, message in cases:
            with pytest.raises(RuntimeError, match=message):
                self.call(wrong)
        assert all(torch.equal(x, torch.ones(3)) for x in self.tensors)
        assert self.norm.value == -1

    def test_empty_needs_no_pointers(self):
        self.call({**dict.fromkeys(range(5)), 5: 0})
        assert self.norm.value == 0
