"""What the tests of convolutions share."""

from __future__ import annotations

import torch
from torch import Tensor


def make_inputs(
    kind: str, norm: str | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """x, weight, bias, scale and shift, with a gradient; None for what the norm has not."""
    n, height, width, c, o = shape
    g = torch.Generator().manual_seed(0)
    k = 5 if kind in ("pool", "upsample") else 4
    channels = (c, o) if kind == "transpose" else (o, c)
    x = torch.randn(n, height, width, c, generator=g, dtype=dtype)
    weight = torch.randn(*channels, k, k, generator=g, dtype=dtype) / (c * k * k) ** 0.5
    bias, scale, shift = (torch.randn(o, generator=g, dtype=dtype) for _ in range(3))
    inputs = [x, weight, bias, scale if norm else None, shift if norm == "layer" else None]
    return [p if p is None else p.requires_grad_() for p in inputs]


def gradients(y: Tensor, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, [p for p in inputs if p is not None and p.requires_grad], dy)
