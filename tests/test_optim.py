"""The optimisers' steps against their references: backend x tensors of odd sizes."""

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
# Adam's moment is a sum of terms up to 4 that cancel, each of them rounded to 2e-7.
ADAM_TOLERANCE = TOLERANCE | {torch.float32: {"rtol": 1e-5, "atol": 3e-7}}
SHAPES = [(63, 41), (1,), (), (0,), (5, 0, 3), (16384,), (16385,), (3, 100, 129), (17, 2)]
CLIPS = {"agc_laprop": 0.3, "clip_adam": 100.0}  # the norm of all gradients is 197
RATE = 0.02
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


def steps(operator, lists: Lists, clip: float, count: int = 3) -> list[Tensor]:
    """Parameters and moments after some steps, then the gradient's norms."""
    params, grads, nu, mu = ([x.clone() for x in tensors] for tensors in lists)
    norms = [operator(params, grads, nu, mu, step + 1, 0.01, clip) for step in range(count)]
    torch.testing.assert_close(grads, lists[1], rtol=0, atol=0, equal_nan=True)
    return [*params, *nu, *mu, *norms]


@pytest.fixture(params=CLIPS)
def name(request):
    return request.param


@pytest.fixture
def clip(name):
    return CLIPS[name]


@pytest.fixture
def reference(name):
    return getattr(optim, name)


@pytest.fixture
def operator(compiled, name):
    assert compiled.served_by[name] == compiled.backend
    return getattr(compiled, name)


def tolerance_of(reference, dtype: torch.dtype) -> dict[str, float]:
    return (ADAM_TOLERANCE if reference is optim.clip_adam else TOLERANCE)[dtype]


def assert_same_steps(operator, reference, lists: Lists, clip: float, **options: bool) -> None:
    actual, expected = steps(operator, lists, clip), steps(reference, lists, clip)
    tolerance = tolerance_of(reference, lists[0][0].dtype)
    torch.testing.assert_close(actual, expected, **tolerance, **options)


def test_equals_the_reference(operator, reference, clip, isa):
    assert_same_steps(operator, reference, inputs_of(), clip)


@pytest.mark.parametrize("clip", [100.0, 1000.0])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_clip_adam_equals_pytorch(dtype, clip):
    """Clipped and not, from the start, over enough steps for the corrections to change."""
    params, grads, *_ = inputs_of(dtype)
    nu, mu = ([torch.zeros_like(x) for x in params] for _ in range(2))
    theirs = [torch.nn.Parameter(x.clone()) for x in params]
    adam = torch.optim.Adam(theirs, lr=1e-3, eps=1e-5)
    for step in range(20):
        scale = 1 + step % 3
        now = [x * scale for x in grads]
        for parameter, grad in zip(theirs, now, strict=True):
            parameter.grad = grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs, clip)
        adam.step()
        norm = optim.clip_adam(params, now, nu, mu, step + 1, 1e-3, clip, eps=1e-5)
        assert torch.equal(norm, expected) and (norm > clip) == (clip < 150 * scale)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    expected = [x.data for x in theirs]
    torch.testing.assert_close(params, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_reference_takes_steps_and_rates_as_tensors(reference, clip, dtype):
    """As a captured step does, whose count is on the device. 1 - 0.999 needs float64 in there."""

    def by_tensors(*args):
        lists, step, lr, clip = args[:4], *args[4:]
        rate = torch.tensor(lr, dtype=torch.float64)
        return reference(*lists, torch.tensor(step), rate, clip)

    lists, tolerance = inputs_of(dtype), {torch.float32: 3e-7, torch.float64: 1e-15}[dtype]
    actual, expected = steps(by_tensors, lists, clip), steps(reference, lists, clip)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_takes_steps_and_rates_as_tensors(operator, clip):
    def by_tensors(*args):
        step, lr = torch.tensor(args[4]), torch.tensor(args[5], dtype=torch.float64)
        return operator(*args[:4], step, lr, args[6])

    lists = inputs_of()
    actual, expected = steps(by_tensors, lists, clip), steps(operator, lists, clip)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_many_tensors(operator, reference, clip):
    """More than the addresses that one of Triton's launches takes."""
    g = torch.Generator("cpu").manual_seed(0)
    shape = (100, 3)
    params, grads, nu, mu = (
        list(torch.randn(shape, generator=g, device="cpu").to(torch.get_default_device()))
        for _ in range(4)
    )
    lists = params, grads, [x.square() for x in nu], mu
    assert_same_steps(operator, reference, lists, clip)


def test_captured_with_its_gradients(operator, reference, clip, device):
    """In a CUDA graph, whose gradients lie elsewhere than those of the step before capturing."""
    if device != "cuda":
        pytest.skip("a graph needs a GPU")
    actual, expected = inputs_of(), inputs_of()
    step, scale = torch.ones((), dtype=torch.int64), torch.ones(())
    rate = torch.tensor(0.01)

    def run() -> None:
        operator(actual[0], [x * scale for x in actual[1]], *actual[2:], step, rate, clip)
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
        reference(expected[0], grads, *expected[2:], count, 0.01, clip)
    torch.testing.assert_close(actual, expected, **tolerance_of(reference, torch.float32))


def test_what_captured_steps_read_is_kept(device):
    """However many other lists of tensors are stepped after the capture."""
    cut = pytest.importorskip("fastdreamer.kernels.optim_triton", exc_type=ImportError).cut
    place = torch.device(device)
    first = cut((5, 3000), place)
    for size in range(1, 50):
        cut((size,), place)
    assert all(x is y for x, y in zip(first, cut((5, 3000), place), strict=True))


def test_float64_equals_the_reference(operator, reference, clip):
    assert_same_steps(operator, reference, inputs_of(torch.float64), clip)


def test_norm_is_that_of_all_gradients(ops, name, clip):
    lists = inputs_of()
    expected = torch.cat([x.flatten() for x in lists[1]]).double().norm().float()
    torch.testing.assert_close(steps(getattr(ops, name), lists, clip, 1)[-1], expected)


def test_rate_zero_leaves_the_parameters(operator, clip, isa):
    params, grads, nu, mu = inputs_of()
    before = [x.clone() for x in params]
    operator(params, grads, nu, mu, 1, 0.0, clip)
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30, 0.0])
def test_extreme_gradients(operator, reference, clip, isa, value):
    lists = inputs_of()
    lists[1][0][3, 5] = value
    lists[1][-1].fill_(value)
    assert_same_steps(operator, reference, lists, clip, equal_nan=True)


@pytest.mark.parametrize("which", range(4))
def test_non_contiguous_tensors(operator, reference, clip, which):
    lists, copies = inputs_of(), inputs_of()
    lists[which][0] = lists[which][0].t().contiguous().t()
    assert not lists[which][0].is_contiguous()
    strided = lists[which][0]
    operator(*lists, 1, 0.01, clip)
    reference(*copies, 1, 0.01, clip)
    assert lists[which][0] is strided
    for actual, expected in zip(lists, copies, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


def test_repeats_bit_for_bit_on_any_number_of_threads(operator, clip, threads):
    runs = []
    for count in (1, 2, 2):
        threads(count)
        runs.append(steps(operator, inputs_of(), clip))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_opcheck(compiled, name, clip, dtype):
    lists = [tensors[:2] for tensors in inputs_of(dtype)]
    scalars = torch.tensor(1), torch.tensor(0.01, dtype=torch.float64)
    overload = getattr(torch.ops.fastdreamer, name).default
    torch.library.opcheck(overload, (*lists, *scalars, clip))


def test_compiles_to_one_graph(operator, clip):
    def doubled(*lists: list[Tensor]) -> Tensor:
        return 2 * operator(*lists, 1, 0.01, clip)

    torch._dynamo.reset()
    traced = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    actual, expected = inputs_of(), inputs_of()
    assert torch.equal(traced(*actual), doubled(*expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def wrong_for(x: Tensor) -> list[tuple[list[Tensor], type[Exception], str]]:
    return [
        ([x, x], ValueError, "equal shapes"),
        ([x[:2]], ValueError, "equal shapes"),
        ([x.double()], TypeError, "all float32 or all float64"),
        ([x.to("meta")], ValueError, "on one device"),
    ]


def test_refuses_wrong_inputs(operator, clip):
    x = torch.zeros(4, 3)
    for wrong, error, message in wrong_for(x):
        with pytest.raises(error, match=message):
            operator([x], wrong, [x], [x], 1, 0.01, clip)
    half = [x.bfloat16()]
    with pytest.raises(TypeError, match="all float32 or all float64"):
        operator(half, half, half, half, 1, 0.01, clip)
    with pytest.raises(ValueError, match="steps count from 1"):
        operator([x], [x], [x], [x], 0, 0.01, clip)


class TestEMA:
    """The moving average: targets and parameters."""

    @pytest.fixture
    def operator(self, compiled):
        assert compiled.served_by["ema"] == compiled.backend
        return compiled.ema

    @pytest.mark.parametrize("rate", [RATE, 0.0, 0.7, 1.0])
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_equals_the_reference(self, operator, isa, dtype, rate):
        targets, params, *_ = inputs_of(dtype)
        params[0][3, 5] = torch.nan
        expected = [(1 - rate) * t + rate * p for t, p in zip(targets, params, strict=True)]
        plain, before = [x.clone() for x in targets], [x.clone() for x in params]
        operator(targets, params, rate)
        optim.ema(plain, params, rate)
        atol = {torch.float32: 1e-6, torch.float64: 2e-15}[dtype]  # values are 5 at most
        for actual in (targets, plain):
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)
        torch.testing.assert_close(params, before, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("which", range(2))
    def test_non_contiguous_tensors(self, operator, which):
        lists, copies = inputs_of()[:2], inputs_of()[:2]
        lists[which][0] = lists[which][0].t().contiguous().t()
        operator(*lists, RATE)
        optim.ema(*copies, RATE)
        torch.testing.assert_close(lists, copies, **TOLERANCE[torch.float32])

    def test_opcheck(self, compiled):
        lists = [tensors[:2] for tensors in inputs_of()[:2]]
        torch.library.opcheck(torch.ops.fastdreamer.ema.default, (*lists, RATE))

    def test_compiles_to_one_graph(self, operator):
        def double(targets: list[Tensor], params: list[Tensor]) -> None:
            operator(targets, [2 * x for x in params], RATE)

        torch._dynamo.reset()
        traced = torch.compile(double, fullgraph=True, backend="aot_eager")
        actual, expected = inputs_of()[:2], inputs_of()[:2]
        traced(*actual)
        double(*expected)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def test_refuses_wrong_inputs(self, operator):
        x = torch.zeros(4, 3)
        for wrong, error, message in wrong_for(x):
            with pytest.raises(error, match=message):
                operator([x], wrong, RATE)

    def test_c_function_refuses_wrong_arguments(self, cpp):
        x, y = torch.ones(3), torch.zeros(3)
        call = library.function("fd_ema", optim.EMA_SIGNATURE)
        null, negative = (ctypes.c_void_p * 1)(None), (ctypes.c_int64 * 1)(-1)
        right = [optim._pointers([x]), optim._pointers([y]), optim._sizes([x]), 1, RATE, 0, None]
        cases = [(i, wrong, "null pointer") for i in range(2) for wrong in (None, null)]
        cases += [
            (2, None, "null pointer"),
            (2, negative, "size"),
            (3, -1, "size"),
            (5, 1, "dtype"),
        ]
        for i, wrong, message in cases:
            with pytest.raises(RuntimeError, match=message):
                call(*right[:i], wrong, *right[i + 1 :])
        assert torch.equal(x, torch.ones(3))
        call(None, None, None, 0, RATE, 0, None)


class TestCInterface:
    """The C functions, called as another program would."""

    @pytest.fixture(autouse=True)
    def _built(self, cpp, name):
        self.name, self.tensors = name, [torch.ones(3) for _ in range(4)]
        self.norm = ctypes.c_double(-1)

    def call(self, wrong: dict[int, object]) -> None:
        arguments: list = [optim._pointers([x]) for x in self.tensors]
        arguments += [optim._sizes(self.tensors[:1]), 1, 1, 0.01, 0.3, 0.9, 0.999, 1e-20]
        arguments += [ctypes.addressof(self.norm), 0, None]
        for i, value in wrong.items():
            arguments[i] = value
        library.function(f"fd_{self.name}", optim.STEP_SIGNATURE)(*arguments)

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
