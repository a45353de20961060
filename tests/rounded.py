"""The references with factors of products in bfloat16, as the compiled scans compute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """The nearest bfloat16 of each element, in the type of x."""
    return x.float().bfloat16().to(x.dtype)


class _Factor(torch.autograd.Function):
    """Rounded; its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class _Product(torch.autograd.Function):
    """Not rounded; its gradient, a factor of further products, is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return rounded(dy)


@contextmanager
def rounding() -> Iterator[None]:
    """Lets PyTorch's linear and einsum round their factors, forward and backward."""
    linear, einsum = torch.nn.functional.linear, torch.einsum

    def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = _Product.apply(linear(_Factor.apply(x), _Factor.apply(weight)))
        return y if bias is None else y + bias

    def rounded_einsum(how: str, x: Tensor, weight: Tensor) -> Tensor:
        return _Product.apply(einsum(how, _Factor.apply(x), _Factor.apply(weight)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", rounded_linear)
        patch.setattr(torch, "einsum", rounded_einsum)
        yield


def doubled(tree: Any) -> Any:
    """The same tensors in float64."""
    if isinstance(tree, Tensor):
        exact = tree.detach()
        exact = exact.double() if exact.is_floating_point() else exact
        return exact.requires_grad_(tree.requires_grad)
    if isinstance(tree, tuple | list):
        parts = [doubled(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
