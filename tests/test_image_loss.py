"""image_loss against its plain PyTorch reference: shift and sigmoid x shape x instruction set."""

from __future__ import annotations

import pytest
import torch
from operator_common import drawn, gradients
from torch import Tensor

from fastdreamer import kernels
from fastdreamer.kernels import library
from fastdreamer.kernels.image_loss import BACKWARD_SIGNATURE, SIGNATURE, image_loss

pytestmark = pytest.mark.operators

# Sums of up to 12288 squares in another order; gradients of up to 2 e.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
SHAPES = [(2, 3, 64, 64, 3), (7, 5, 3, 1), (1, 1, 1, 1), (4, 4, 4), (41, 5, 9, 2), (0, 8, 8, 3)]
OPTIONS = [(0.0, True), (0.5, False), (0.25, True), (0.0, False)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
options = pytest.mark.parametrize(("shift", "squash"), OPTIONS)


@drawn
def image_loss_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=g, dtype=dtype)
    return [x.requires_grad_(), torch.randint(256, shape, generator=g, dtype=torch.uint8)]


def test_by_hand(ops):
    x = torch.tensor([0.0, 2.0]).reshape(1, 1, 2, 1)
    target = torch.tensor([255, 51], dtype=torch.uint8).reshape(1, 1, 2, 1)
    torch.testing.assert_close(ops.image_loss(x, target, 0.5, False), torch.tensor([0.25 + 5.29]))
    p = 1 / (1 + torch.tensor(-2.0).exp())
    expected = (0.25 + (p - 0.2).square()).reshape(1)
    torch.testing.assert_close(ops.image_loss(x, target, 0.0, True), expected)


@options
@shapes
def test_equals_the_reference(cpp, isa, shape, shift, squash):
    assert cpp.served_by["image_loss"] == "cpp"
    inputs = image_loss_inputs(shape)
    actual, expected = (f(*inputs, shift, squash) for f in (cpp.image_loss, image_loss))
    assert actual.is_contiguous() and actual.shape == shape[:-3]
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    (actual,), (expected,) = (
        gradients(f, inputs, shift, squash) for f in (cpp.image_loss, image_loss)
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@options
def test_far_from_0_and_not_numbers(cpp, isa, shift, squash):
    """Far predictions, whose sigmoid is 0 or 1, and NaN in its own image alone."""
    x, target = image_loss_inputs((3, 4, 4, 3))
    x = (1e4 * x.detach()).requires_grad_()
    x.data[1, 2, 2, 1] = float("nan")
    loss = cpp.image_loss(x, target, shift, squash)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    expected = image_loss(x, target, shift, squash)
    (dexpected,) = torch.autograd.grad(expected.sum(), x)
    assert loss.isnan().tolist() == [False, True, False] and dx.isnan().sum() == 1
    torch.testing.assert_close((loss, dx), (expected, dexpected), **TOLERANCE, equal_nan=True)


def test_strided_inputs(cpp):
    """A part of the channels, as a decoder of two images gives it."""
    x, target = image_loss_inputs((5, 8, 8, 6))
    part, of_target = x[..., 2:5], target[..., 2:5]
    copies = part.detach().contiguous().requires_grad_(), of_target.contiguous()
    assert torch.equal(
        cpp.image_loss(part, of_target, 0.5, True), cpp.image_loss(*copies, 0.5, True)
    )
    (dx,) = gradients(lambda x: cpp.image_loss(x[..., 2:5], of_target, 0.5, True), [x])
    (dcopy,) = gradients(cpp.image_loss, copies, 0.5, True)
    assert torch.equal(dx[..., 2:5], dcopy) and not dx[..., :2].any() and not dx[..., 5:].any()


@options
def test_gradcheck(ops, shift, squash):
    x, target = image_loss_inputs((2, 3, 4, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.image_loss(x, target, shift, squash), x)


def test_repeats_bit_for_bit_on_any_threads(cpp, threads):
    inputs = image_loss_inputs((41, 16, 16, 3))
    loss, grads = cpp.image_loss(*inputs, 0.0, True), gradients(cpp.image_loss, inputs, 0.0, True)
    threads(3)
    assert torch.equal(cpp.image_loss(*inputs, 0.0, True), loss)
    assert torch.equal(gradients(cpp.image_loss, inputs, 0.0, True)[0], grads[0])


def test_opcheck(cpp):
    x, target = image_loss_inputs((2, 4, 4, 3))
    operators = torch.ops.fastdreamer
    torch.library.opcheck(operators.image_loss.default, (x, target, 0.5, True))
    backward = (torch.ones(2), x.detach(), target, 0.5, True)
    torch.library.opcheck(operators.image_loss_backward.default, backward)


def test_compiles_to_one_graph(cpp):
    def doubled(x, target):
        return 2 * cpp.image_loss(x, target, 0.0, True)

    inputs = image_loss_inputs((2, 4, 4, 3))
    traced = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*inputs), doubled(*inputs))
    assert torch.equal(gradients(traced, inputs)[0], gradients(doubled, inputs)[0])


def test_refuses_what_does_not_fit(ops):
    x, target = image_loss_inputs((2, 4, 4, 3))
    for wrong in (target[:1], target[..., 0]):
        with pytest.raises(ValueError, match=r"must both be \(\.\.\., H, W, C\)"):
            ops.image_loss(x, wrong, 0.0, True)
    with pytest.raises(ValueError, match=r"must both be"):
        ops.image_loss(x[0, 0], target[0, 0], 0.0, True)
    with pytest.raises(TypeError, match=r"target must be torch.uint8, got torch.float32"):
        ops.image_loss(x, target.float(), 0.0, True)


def test_operator_refuses_other_types_and_gradients(cpp):
    x, target = image_loss_inputs((2, 4, 4, 3))
    operators = torch.ops.fastdreamer
    with pytest.raises(TypeError, match=r"x must be torch.float32, got torch.float64"):
        operators.image_loss(x.double(), target, 0.0, True)
    with pytest.raises(ValueError, match=r"dloss must be \(2,\) of torch.float32"):
        operators.image_loss_backward(torch.ones(3), x.detach(), target, 0.0, True)
    (grad,) = torch.autograd.grad(cpp.image_loss(x, target, 0.0, True).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("name", "signature", "pointers"),
    [("fd_image_loss", SIGNATURE, 3), ("fd_image_loss_backward", BACKWARD_SIGNATURE, 4)],
)
def test_c_interface_checks_its_arguments(cpp, name, signature, pointers):
    tensors = [torch.zeros(2, 3) for _ in range(pointers)]
    data, run = [x.data_ptr() for x in tensors], library.function(name, signature)
    for i in range(pointers):
        with pytest.raises(RuntimeError, match="null pointer"):
            run(*data[:i], None, *data[i + 1 :], 2, 3, 0.0, 1, 0, None)
    for sizes, dtype, message in (((-1, 3), 0, "size"), ((2, 0), 0, "size"), ((2, 3), 1, "dtype")):
        with pytest.raises(RuntimeError, match=message):
            run(*data, *sizes, 0.0, 1, dtype, None)
    assert not any(x.any() for x in tensors)
    run(*[None] * pointers, 0, 3, 0.0, 1, 0, None)


def test_the_reference_is_a_backend():
    assert kernels.resolve("reference").image_loss is image_loss
