"""twohot_loss and twohot_mean against their plain PyTorch references: layout x shape x targets."""

from __future__ import annotations

import pytest
import torch
from operator_common import drawn, gradients, normal
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.twohot import (
    LOSS_BACKWARD_SIGNATURE,
    LOSS_SIGNATURE,
    MEAN_SIGNATURE,
    bins,
    twohot_loss,
    twohot_mean,
)

pytestmark = pytest.mark.operators

# Sums of K exponentials of at most 1, in another order; losses are of order 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
WIDTHS = (1, 3, 9, 15, 17, 31, 33, 41, 65, 255)
SHAPES = [(63, 41), (0, 255), (2, 3, 255), (255,), (1, 255), *((37, n) for n in WIDTHS)]

layouts = pytest.mark.parametrize("layout", ["symlog", "symexp"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@drawn
def twohot_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits with a gradient, and targets of every magnitude, some beyond the bins."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.randn(shape[:-1], generator=g, dtype=torch.float64)
    target = target * torch.exp(22 * torch.rand(shape[:-1], generator=g, dtype=torch.float64))
    return [logits.to(dtype).requires_grad_(), target.to(dtype)]


@layouts
@shapes
def test_loss(compiled, isa, layout, shape):
    inputs = twohot_inputs(shape)
    loss = compiled.twohot_loss(*inputs, layout)
    torch.testing.assert_close(loss, twohot_loss(*inputs, layout), **TOLERANCE)
    actual = gradients(compiled.twohot_loss, inputs, layout)
    torch.testing.assert_close(actual, gradients(twohot_loss, inputs, layout), **TOLERANCE)


@layouts
@shapes
def test_mean(compiled, isa, layout, shape):
    logits, _ = twohot_inputs(shape)
    exact = logits.detach().double().requires_grad_()
    spread = bins(layout, shape[-1], torch.float32, logits.device).abs().amax().item()
    # Bins cancel in pairs, so rounding is relative to the largest; symexp multiplies it again.
    mean, expected = (
        f(x, layout).double() for f, x in ((compiled.twohot_mean, logits), (twohot_mean, exact))
    )
    if layout == "symlog":
        mean, expected = (torch.sign(m) * torch.log1p(m.abs()) for m in (mean, expected))
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6 * spread)
    (grad,) = gradients(lambda x: compiled.twohot_mean(x, layout), [logits])
    (expected,) = gradients(lambda x: twohot_mean(x, layout), [exact])
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(grad, expected.float(), rtol=1e-4, atol=1e-5 * largest)


@layouts
@pytest.mark.parametrize("count", WIDTHS)
def test_mean_of_equal_logits_is_zero(compiled, isa, layout, count):
    logits = torch.tensor([-1e4, -7.3, 0.0, 0.1, 88.0, 1e30])[:, None].expand(-1, count)
    assert compiled.twohot_mean(logits, layout).eq(0).all()


@layouts
def test_gradient_of_a_mean_of_zero(compiled, layout):
    """The sign in symexp has derivative 0 there, in the reference and so in the operator."""
    logits = torch.zeros(2, 255, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(f(logits, layout).sum(), logits)
        for f in (compiled.twohot_mean, twohot_mean)
    )
    atol = 1e-6 * expected[0].abs().amax().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@layouts
def test_bins_are_those_of_searchsorted(compiled, isa, layout):
    """Targets on every bin, a step beside it, between bins and beyond them."""
    b = bins("symexp", 255, torch.float32, torch.get_default_device())
    inf = torch.tensor(float("inf"))
    steps = [b, torch.nextafter(b, inf), torch.nextafter(b, -inf), (b[1:] + b[:-1]) / 2]
    target = torch.cat([*steps, torch.tensor([0.0, -0.0, 1e30, -1e30, inf, -inf])])
    logits = torch.zeros(len(target), 255, requires_grad=True)
    losses = [f(logits, target, layout) for f in (compiled.twohot_loss, twohot_loss)]
    actual, expected = (torch.autograd.grad(loss.sum(), logits)[0] for loss in losses)
    # Triton squashes targets itself: a unit in the last place of 20, over the distance of two bins.
    own_symlog = layout == "symlog" and compiled.backend != "cpp"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.2e-5 if own_symlog else 1e-6)
    torch.testing.assert_close(losses[0], torch.full_like(target, 255).log())


@pytest.mark.parametrize("count", [9, 255])
def test_nan_stays_in_its_row(ops, count):
    logits, target = twohot_inputs((20, count))
    logits.data[3, count // 2] = logits.data[5, 0] = logits.data[7, -1] = float("nan")
    logits.data[9, 2] = float("inf")
    target[11] = float("nan")
    bad = torch.zeros(20, dtype=torch.bool).index_fill(0, torch.tensor([3, 5, 7, 9]), True)
    assert torch.equal(ops.twohot_mean(logits).isnan(), bad)
    bad[11] = True
    loss = ops.twohot_loss(logits, target)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad))


@layouts
def test_gradcheck(ops, layout):
    logits, target = twohot_inputs((5, 7), torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.twohot_loss(x, target, layout), logits)
    if layout == "symlog":  # symexp bins reach 5e8: differences would be all rounding
        assert torch.autograd.gradcheck(lambda x: ops.twohot_mean(x / 9, layout) / 1e8, logits)


@layouts
def test_float64_is_exact(compiled, layout):
    inputs = twohot_inputs((4, 9, 255), torch.float64)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    actual, expected = (gradients(f, inputs, layout) for f in (compiled.twohot_loss, twohot_loss))
    torch.testing.assert_close(actual, expected, **exact)
    assert torch.equal(compiled.twohot_loss(*inputs, layout), twohot_loss(*inputs, layout))
    assert torch.equal(compiled.twohot_mean(inputs[0], layout), twohot_mean(inputs[0], layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_takes_strided_inputs(compiled, dtype):
    logits, target = twohot_inputs((41, 30), dtype)
    views = [logits.detach().t()[::2].requires_grad_(), target.new_ones(45)[::3]]
    copies = [x.detach().clone().contiguous().requires_grad_(x.requires_grad) for x in views]
    for operator in (compiled.twohot_loss, lambda x, _: compiled.twohot_mean(x)):
        assert torch.equal(operator(*views), operator(*copies))
        assert torch.equal(*(gradients(operator, x)[0] for x in (views, copies)))
    (grad,) = torch.autograd.grad(compiled.twohot_loss(*views).sum(), views[0])  # dloss of stride 0
    assert grad.isfinite().all()


def test_threads_do_not_change_a_bit(compiled, threads):
    logits, target = twohot_inputs((257, 255))
    results = []
    for count in (1, 2, 2):
        threads(count)
        grads = gradients(compiled.twohot_loss, [logits, target])
        results.append([compiled.twohot_loss(logits, target), compiled.twohot_mean(logits), *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(compiled, dtype):
    logits, target = twohot_inputs((6, 5), dtype)
    operators = torch.ops.fastdreamer
    torch.library.opcheck(operators.twohot_loss.default, (logits, target))
    torch.library.opcheck(operators.twohot_mean.default, (logits,))
    logits = logits.detach()
    stats = operators.twohot_loss(logits, target)[1]
    backward = operators.twohot_loss_backward.default
    torch.library.opcheck(backward, (target, logits, target, stats, "symlog"))
    backward = operators.twohot_mean_backward.default
    torch.library.opcheck(backward, (target, logits, target, "symlog"))


def test_compiles_to_one_graph(compiled):
    def both(logits: Tensor, target: Tensor) -> Tensor:
        return compiled.twohot_loss(logits, target, "symexp") + compiled.twohot_mean(logits)

    torch._dynamo.reset()
    graph = torch.compile(both, fullgraph=True, backend="aot_eager")
    for shape in ((4, 15), (6, 9)):
        inputs = twohot_inputs(shape)
        assert torch.equal(graph(*inputs), both(*inputs))
        assert torch.equal(*(gradients(f, inputs)[0] for f in (graph, both)))


def test_refuses_wrong_inputs(ops):
    logits, target = torch.ones(4, 5), torch.ones(4)
    for wrong in ((logits, torch.ones(5)), (logits, torch.ones(4, 1, 1)), (target[0], target[0])):
        with pytest.raises(ValueError, match=r"must be \(..., K\) and target \(...\)"):
            ops.twohot_loss(*wrong)
    with pytest.raises(ValueError, match="layout symlog or symexp"):
        ops.twohot_loss(logits, target, "linear")
    with pytest.raises(ValueError, match="odd count"):
        ops.twohot_loss(logits[:, :4], target)
    with pytest.raises(ValueError, match="odd count"):
        ops.twohot_mean(logits[:, :4])


def test_refuses_dtypes_devices_and_second_derivatives(compiled):
    logits, target = torch.ones(4, 5), torch.ones(4)
    with pytest.raises(TypeError, match="float32 or float64"):
        compiled.twohot_loss(logits.bfloat16(), target)
    with pytest.raises(TypeError, match="float32 or float64"):
        compiled.twohot_mean(logits.long())
    with pytest.raises(ValueError, match="inputs on"):
        compiled.twohot_loss(logits, target.to("meta"))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(
        compiled.twohot_loss(logits, target).sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_of_several_targets_add_up(ops, dtype):
    logits, targets = normal(torch.zeros(7, 3, 41, dtype=dtype), torch.zeros(7, 3, 4, dtype=dtype))
    logits, targets = logits.requires_grad_(), 5 * targets
    together = ops.twohot_loss(logits, targets, "symexp")
    apart = torch.stack([ops.twohot_loss(logits, t, "symexp") for t in targets.unbind(-1)]).sum(0)
    torch.testing.assert_close(together, apart)
    (weight,) = normal(together)
    (x,), (y,) = (torch.autograd.grad(z, logits, weight) for z in (together, apart))
    torch.testing.assert_close(x, y)


class TestCInterface:
    """The C functions, called as another program would."""

    SIGNATURES = (
        ("fd_twohot_loss", LOSS_SIGNATURE, 2, [1]),
        ("fd_twohot_loss_backward", LOSS_BACKWARD_SIGNATURE, 1, [1]),
        ("fd_twohot_mean", MEAN_SIGNATURE, 1, []),
    )
    functions = pytest.mark.parametrize(("name", "signature", "outputs", "targets"), SIGNATURES)

    @pytest.fixture(autouse=True)
    def _built(self, cpp):
        self.ones = torch.ones(2, 3)

    def arguments(self, signature: tuple, outputs: int, targets: list[int]) -> list:
        self.outputs = [torch.zeros(2, 3) for _ in range(outputs)]
        inputs = [self.ones.data_ptr()] * (len(signature) - 4 - len(targets) - outputs)
        return inputs + [x.data_ptr() for x in self.outputs] + targets + [2, 3, 0, None]

    @functions
    def test_refuses(self, name, signature, outputs, targets):
        count = len(signature) - 4 - len(targets)
        pointers = [(i, None, "null pointer") for i in range(count)]
        sizes = [(count, 0, "size")] * len(targets)
        sizes += [(-4, -1, "size"), (-3, 0, "size"), (-3, 2, "size"), (-2, 1, "dtype")]
        for i, wrong, message in (*pointers, *sizes):
            arguments = self.arguments(signature, outputs, targets)
            arguments[i] = wrong
            with pytest.raises(RuntimeError, match=message):
                library.function(name, signature)(*arguments)
            assert not any(x.any() for x in self.outputs)

    @functions
    def test_no_rows_need_no_pointers(self, name, signature, outputs, targets):
        pointers = [None] * (len(signature) - 4 - len(targets))
        library.function(name, signature)(*pointers, *targets, 0, 3, 0, None)
