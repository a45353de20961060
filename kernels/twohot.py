"""Two-hot cross-entropy and mean over 255 bins, without ever storing a 255-wide target.

Two layouts of the bins: ``"symlog"`` (recipe 2023; equally spaced in symlog space, the target
is squashed) and ``"symexp"`` (recipe 2025; exponentially spaced in value space).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|), elementwise. Source: DreamerV3, eq. 1."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp|x| - 1), elementwise: the inverse of :func:`symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


@lru_cache
def bins(layout: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The (count,) bin positions, ascending and exactly antisymmetric around 0; ``count`` is odd.

    "symlog": -20..20 in symlog space. "symexp": symexp of those, in value space.
    Raises ValueError for an unknown layout or an even count.
    """
    if layout not in ("symlog", "symexp") or count % 2 == 0:
        raise ValueError(f"bins: layout symlog or symexp and odd count, got {layout!r}, {count}")
    with torch.inference_mode(False):  # what is kept may later take part in a backward pass
        half = torch.linspace(-20, 0, count // 2 + 1, dtype=dtype, device=device)
        if layout == "symexp":
            half = symexp(half)
        return torch.cat([half, -half[:-1].flip(0)])


def twohot_loss(logits: Tensor, target: Tensor, layout: str = "symlog") -> Tensor:
    """Cross-entropy between logits and the two-hot encoding of scalar targets.

    Args:
        logits: (..., K) unnormalised, K odd.
        target: (...) values in reward or return units; no gradient flows into them.
            Outside the bins all weight lies on the end bin.
        layout: "symlog" or "symexp".

    Returns:
        (...) loss in nats. Source: DreamerV3, "Critic Learning", eq. 8-9.
    """
    b = bins(layout, logits.shape[-1], logits.dtype, logits.device)
    y = target.detach().to(logits.dtype)
    if layout == "symlog":
        y = symlog(y)
    count = torch.searchsorted(b, y.contiguous(), right=True)  # bins <= y
    below, above = (count - 1).clamp(min=0), count.clamp(max=len(b) - 1)
    to_below, to_above = (b[below] - y).abs(), (b[above] - y).abs()
    # Where both are the same end bin the split does not matter; the two weights must sum to 1.
    same = below == above
    weight = torch.where(same, 1.0, to_above / (to_below + to_above).masked_fill(same, 1.0))
    logp = F.log_softmax(logits, -1)
    logp_below = logp.gather(-1, below.unsqueeze(-1)).squeeze(-1)
    logp_above = logp.gather(-1, above.unsqueeze(-1)).squeeze(-1)
    return -(weight * logp_below + (1 - weight) * logp_above)


def twohot_mean(logits: Tensor, layout: str = "symlog") -> Tensor:
    """Mean of the distribution over bins, in reward or return units.

    Args:
        logits: (..., K) unnormalised, K odd.
        layout: "symlog" gives symexp(sum p b), "symexp" gives sum p b.

    Returns:
        (...); exactly 0 for uniform logits, since the sum runs over symmetric pairs.
    """
    p = F.softmax(logits, -1)
    half = logits.shape[-1] // 2
    upper = bins(layout, logits.shape[-1], logits.dtype, logits.device)[half + 1 :]
    mean = ((p[..., half + 1 :] - p[..., :half].flip(-1)) * upper).sum(-1)
    return symexp(mean) if layout == "symlog" else mean
