"""What the tests of every operator share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor


def drawn(draw: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Let a function draw its tensors on the CPU, the same for every device, and move them."""

    @wraps(draw)
    def moved(*args: object, **kwargs: object) -> list[Tensor]:
        device = torch.get_default_device()
        with torch.device("cpu"):
            tensors = draw(*args, **kwargs)
        return [x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors]

    return moved


@drawn
def normal(*like: Tensor) -> list[Tensor]:
    """Standard normal tensors of the shapes and dtypes of these."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in like]


def gradients(
    operator: Callable[..., Tensor], inputs: Sequence[Tensor], *options: object
) -> tuple[Tensor, ...]:
    """Gradients of the inputs that have one, for a random gradient of the output."""
    ret = operator(*inputs, *options)
    (weight,) = normal(ret)
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad((ret * weight).sum(), wanted)
