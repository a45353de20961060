"""norm_act against its plain PyTorch reference: kind x SiLU x shape x backend."""

from __future__ import annotations

import pytest
import torch
from operator_common import drawn, gradients
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.norm_act import BWD_SIGNATURE, FWD_SIGNATURE, norm_act
from fastdreamer.kernels.register import INTERPRETED

pytestmark = pytest.mark.operators

# Against float64: terms of order 1, and the rounding of their means over a row.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# One unit in the last place: the interpreter cuts off where a GPU rounds.
BFLOAT16_TOLERANCE = {"rtol": 2**-7, "atol": 1e-6}
WIDTHS = (1, 3, 4, 8, 12, 17, 24, 64, 72, 100, 130, 255, 1536)
SHAPES = [(63, 41), (0, 5), (2, 3, 5), (7,), *((1, n) for n in WIDTHS), *((37, n) for n in WIDTHS)]
WIDE = [(3, 5000), (5, 9000), (2, 17000)]  # beyond what Triton's kernels hold in registers
EPS = 1e-3

kinds = pytest.mark.parametrize("kind", ["layer", "rms"])
silus = pytest.mark.parametrize("silu", [True, False])
shapes = pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)


def norm_inputs(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """x, scale and, for LayerNorm, shift; all with a gradient."""
    x, scale, shift = draw(shape, dtype)
    return [x, scale, shift if kind == "layer" else None]


@drawn
def draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = 1 + 2 * torch.randn(shape, generator=g, dtype=dtype)
    scale, shift = (torch.randn(shape[-1], generator=g, dtype=dtype) for _ in range(2))
    return [p.requires_grad_() for p in (x, scale, shift)]


def grads(operator, inputs: list[Tensor | None], *options: object) -> tuple[Tensor, ...]:
    *tensors, shift = inputs
    if shift is None:
        return gradients(lambda x, scale: operator(x, scale, None, *options), tensors)
    return gradients(operator, [*tensors, shift], *options)


def close_to_largest(actual: Tensor, expected: Tensor) -> None:
    """Sums over rows or columns cancel: their error is relative to the largest terms."""
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    atol = 1e-5 * max(1.0, largest)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=atol)


@kinds
@silus
@shapes
def test_values_and_gradients(compiled, isa, kind, silu, shape):
    inputs = norm_inputs(shape, kind)
    y = compiled.norm_act(*inputs, kind, EPS, silu)
    assert y.is_contiguous()
    exact = [p if p is None else p.detach().double().requires_grad_() for p in inputs]
    expected = norm_act(*exact, kind, EPS, silu)
    torch.testing.assert_close(y, expected.float(), **TOLERANCE)
    actual = grads(compiled.norm_act, inputs, kind, EPS, silu)
    for x, z in zip(actual, grads(norm_act, exact, kind, EPS, silu), strict=True):
        close_to_largest(x, z)


def many(rows: int) -> int:
    """Fewer in Triton's interpreter, whose programs share them all the same."""
    return rows // 16 if INTERPRETED else rows


def test_many_rows(compiled, isa):
    """More rows than the fixed parts of the sums over rows hold at once."""
    inputs = norm_inputs((many(70_001), 24), "layer")
    exact = [p.detach().double().requires_grad_() for p in inputs]
    actual = grads(compiled.norm_act, inputs, "layer", EPS)
    for x, z in zip(actual, grads(norm_act, exact, "layer", EPS), strict=True):
        close_to_largest(x, z)


@kinds
def test_gradcheck(ops, kind):
    inputs = norm_inputs((5, 3), kind, torch.float64)
    for silu in (True, False):
        assert torch.autograd.gradcheck(ops.norm_act, (*inputs, kind, EPS, silu))


@kinds
def test_float64_is_exact(compiled, kind):
    inputs = norm_inputs((4, 9, 24), kind, torch.float64)
    torch.testing.assert_close(compiled.norm_act(*inputs, kind, EPS), norm_act(*inputs, kind, EPS))
    actual, expected = (grads(f, inputs, kind, EPS) for f in (compiled.norm_act, norm_act))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_takes_strided_inputs(compiled, kind, dtype):
    x, scale, shift = norm_inputs((4, 24, 5, 6), kind, dtype)
    scale, shift = norm_inputs((1, 48), "layer", dtype)[1:]
    tensors = [x.detach().permute(0, 2, 3, 1), scale.detach()[::2], shift.detach()[::2]]
    views = [*tensors[:2], tensors[2] if kind == "layer" else None]
    copies = [p if p is None else p.contiguous().clone() for p in views]
    views, copies = ([p if p is None else p.requires_grad_() for p in q] for q in (views, copies))
    y = compiled.norm_act(*views, kind, EPS)
    assert y.is_contiguous() and torch.equal(y, compiled.norm_act(*copies, kind, EPS))
    results = (grads(compiled.norm_act, q, kind, EPS) for q in (views, copies))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    y = compiled.norm_act(*views, kind, EPS)
    (dx,) = torch.autograd.grad(y.sum(), views[0])  # dy of stride 0
    assert dx.isfinite().all()


@kinds
@silus
@pytest.mark.parametrize("shape", [(150, 3), (150, 24), (37, 130), (7, 512)], ids=str)
def test_bfloat16(compiled, isa, kind, silu, shape):
    """Arithmetic in float32 between inputs and outputs in bfloat16; scale and shift in float32.

    With AVX-512 the C++ library's sigmoid is within 2^-12, a sixteenth of what rounding may cost.
    """
    x, *norm = norm_inputs(shape, kind)
    half = x.detach().bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    y, expected = (compiled.norm_act(z, *norm, kind, EPS, silu) for z in (half, full))
    assert y.dtype == torch.bfloat16
    values = y.float(), expected.detach()
    torch.testing.assert_close(*values, **BFLOAT16_TOLERANCE)
    dy = torch.ones_like(y)
    wanted = [p for p in norm if p is not None]
    dx, *actual = torch.autograd.grad(y, [half, *wanted], dy)
    expected_dx, *expected = torch.autograd.grad(expected, [full, *wanted], dy.float())
    assert all(a.dtype == torch.float32 for a in actual)
    if compiled.backend == "cpp" and silu and isa not in ("portable", "avx2"):
        torch.testing.assert_close(*values, rtol=2**-8 + 2**-12, atol=0)
        assert (dx.float() - expected_dx).norm() <= 2**-9 * expected_dx.norm()
        for a, b in zip(actual, expected, strict=True):
            assert (a - b).norm() <= 2**-12 * b.norm()
        return
    torch.testing.assert_close(dx.float(), expected_dx, **BFLOAT16_TOLERANCE)
    for a, b in zip(actual, expected, strict=True):
        close_to_largest(a, b)
    if compiled.backend == "cpp":  # but for the nearest bfloat16, the same
        assert torch.equal(y, values[1].bfloat16()) and torch.equal(dx, expected_dx.bfloat16())


def test_sigmoid_of_bfloat16(compiled, isa):
    """Its derivative as the gradient of the shift, which is not rounded, where the scale is 0."""
    v = torch.linspace(-80, 80, 20001, dtype=torch.float64)
    shift = v.float().requires_grad_()
    x = torch.randn(1, len(v), generator=torch.Generator().manual_seed(0)).bfloat16()
    y = compiled.norm_act(x, torch.zeros(len(v)), shift, "layer", EPS)
    (actual,) = torch.autograd.grad(y, shift, torch.ones_like(y))
    s = shift.detach().double().sigmoid()
    error = (actual - s * (1 + v * (1 - s))).abs()
    assert (error <= 2**-12 * s * (1 + v.abs())).all()


@kinds
def test_rows_alone(compiled, isa, kind):
    """Rows computed side by side are those computed one by one, to the last bit."""
    x, *norm = norm_inputs((13, 200), kind)
    options = (kind, EPS, True)
    y, *alone = (compiled.norm_act(z, *norm, *options) for z in (x, *x.split(1)))
    assert torch.equal(y, torch.cat(alone))
    dx = torch.autograd.grad(y.square().sum(), x)[0]
    assert torch.equal(dx, torch.autograd.grad(torch.cat(alone).square().sum(), x)[0])


def test_nan_stays_in_its_row(compiled, isa):
    for n in (24, 200):
        x, scale, shift = norm_inputs((40, n), "layer")
        x.data[3, n // 2] = float("nan")
        y = compiled.norm_act(x, scale, shift, "layer", EPS)
        (dx,) = torch.autograd.grad(y.sum(), x)
        for rows in (y.isnan(), dx.isnan()):
            assert rows[3].all() and rows.sum() == n


@kinds
@pytest.mark.parametrize("shape", [(5000, 24), (1001, 200)], ids=str)
def test_repeats_with_any_number_of_threads(compiled, threads, kind, shape):
    inputs = norm_inputs((many(shape[0]), shape[1]), kind)
    results = []
    for count in (1, 2, 2):
        threads(count)
        y = compiled.norm_act(*inputs, kind, EPS)
        results.append([y, *grads(compiled.norm_act, inputs, kind, EPS)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(compiled, kind, dtype):
    inputs = norm_inputs((6, 5), kind, dtype)
    torch.library.opcheck(torch.ops.fastdreamer.norm_act.default, (*inputs, kind, EPS))
    tensors = [p if p is None else p.detach() for p in (inputs[0], *inputs)]
    backward = torch.ops.fastdreamer.norm_act_backward.default
    torch.library.opcheck(backward, (*tensors, kind, EPS, True))


def test_compiles_to_one_graph(compiled):
    def doubled(*inputs: Tensor) -> Tensor:
        return 2 * compiled.norm_act(*inputs, "layer", EPS)

    torch._dynamo.reset()
    traced = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for shape in ((4, 15), (6, 9)):
        inputs = norm_inputs(shape, "layer")
        assert torch.equal(traced(*inputs), doubled(*inputs))
        for x, y in zip(gradients(traced, inputs), gradients(doubled, inputs), strict=True):
            assert torch.equal(x, y)


def test_refuses_wrong_inputs(ops):
    x, scale = torch.ones(4, 5), torch.ones(5)
    for wrong in (
        (x, torch.ones(4), None),
        (x, scale, torch.ones(4)),
        (torch.ones(()), scale, None),
    ):
        with pytest.raises(ValueError, match=r"x must be \(..., N\)"):
            ops.norm_act(*wrong, "layer", EPS)
    with pytest.raises(ValueError, match=r"N > 0"):
        ops.norm_act(torch.ones(4, 0), torch.ones(0), None, "layer", EPS)
    with pytest.raises(ValueError, match="kind must be layer or rms, not 'batch'"):
        ops.norm_act(x, scale, None, "batch", EPS)
    with pytest.raises(ValueError, match="RMSNorm has no shift"):
        ops.norm_act(x, scale, scale, "rms", EPS)


def test_refuses_dtypes_and_devices(compiled):
    x, scale = torch.ones(4, 5), torch.ones(5)
    both = (x.bfloat16(), scale.bfloat16())
    for wrong in ((x.half(), scale), (x, scale.double()), (x.long(), scale.long()), both):
        with pytest.raises(TypeError, match="all float32 or all float64"):
            compiled.norm_act(*wrong, None, "rms", EPS)
    with pytest.raises(ValueError, match="inputs on"):
        compiled.norm_act(x, scale.to("meta"), None, "rms", EPS)


class TestCInterface:
    """The C functions, called as another program would."""

    names = pytest.mark.parametrize("name", ["fd_norm_act", "fd_norm_act_backward"])

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.ones = torch.ones(2, 3)

    def pointers(self, name: str) -> list:
        inputs, outputs = (3, 1) if name == "fd_norm_act" else (4, 3)
        self.outputs = [torch.zeros(2, 3) for _ in range(outputs)]
        return [self.ones.data_ptr()] * inputs + [x.data_ptr() for x in self.outputs]

    def call(self, name: str, arguments: list) -> None:
        signature = FWD_SIGNATURE if name == "fd_norm_act" else BWD_SIGNATURE
        library.function(name, signature)(*arguments)

    @names
    def test_null_pointers(self, name):
        may_be_null = 2 if name == "fd_norm_act" else None  # shift
        for i in range(len(self.pointers(name))):
            if i == may_be_null:
                continue
            arguments = [*self.pointers(name), 2, 3, 1, 1, EPS, 0, None]
            arguments[i] = None
            with pytest.raises(RuntimeError, match="null pointer"):
                self.call(name, arguments)
            assert not any(x.any() for x in self.outputs)

    @names
    def test_sizes_and_dtype(self, name):
        for i, wrong, message in ((-7, -1, "size"), (-6, -1, "size"), (-2, 1, "dtype")):
            arguments = [*self.pointers(name), 2, 3, 1, 1, EPS, 0, None]
            arguments[i] = wrong
            with pytest.raises(RuntimeError, match=message):
                self.call(name, arguments)
            assert not any(x.any() for x in self.outputs)

    @names
    def test_no_columns_need_no_pointers(self, name):
        self.call(name, [None] * len(self.pointers(name)) + [2, 0, 1, 1, EPS, 0, None])

    def test_no_rows(self):
        self.call("fd_norm_act", [None] * 4 + [0, 3, 1, 1, EPS, 0, None])
        name = "fd_norm_act_backward"
        arguments = [*self.pointers(name), 0, 3, 1, 1, EPS, 0, None]
        for x in self.outputs:
            x.fill_(7)
        self.call(name, arguments)
        dx, dscale, dshift = self.outputs
        assert dx.eq(7).all() and not dscale[0].any() and not dshift[0].any()
