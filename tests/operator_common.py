"""What the tests of every operator share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(
    operator: Callable[..., Tensor], inputs: Sequence[Tensor], *options: object
) -> tuple[Tensor, ...]:
    """Gradients of the inputs that have one, for a random gradient of the output."""
    ret = operator(*inputs, *options)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ret.shape, generator=generator, dtype=torch.float64).to(ret.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad((ret * weight).sum(), wanted)
