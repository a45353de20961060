"""Two-hot cross-entropy and mean over 255 bins, without ever storing a 255-wide target.

Two layouts of the bins: ``"symlog"`` (recipe 2023; equally spaced in symlog space, the target
is squashed) and ``"symexp"`` (recipe 2025; exponentially spaced in value space).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .register import register

LOSS_SCHEMA = '(Tensor logits, Tensor target, str layout="symlog") -> (Tensor loss, Tensor stats)'
LOSS_BACKWARD_SCHEMA = (
    "(Tensor dloss, Tensor logits, Tensor target, Tensor stats, str layout) -> Tensor"
)
MEAN_SCHEMA = '(Tensor logits, str layout="symlog") -> Tensor'
MEAN_BACKWARD_SCHEMA = "(Tensor dmean, Tensor logits, Tensor mean, str layout) -> Tensor"
SIZES = library.SIZE * 2 + library.DTYPE_AND_STREAM
LOSS_SIGNATURE = library.OUTPUT * 5 + library.SIZE + SIZES
LOSS_BACKWARD_SIGNATURE = library.OUTPUT * 6 + library.SIZE + SIZES
MEAN_SIGNATURE = library.OUTPUT * 3 + SIZES


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
    _check_bins(layout, count)
    with torch.inference_mode(False):  # what is kept may later take part in a backward pass
        half = torch.linspace(0, -20, count // 2 + 1, dtype=dtype, device=device).flip(0)
        if layout == "symexp":
            half = symexp(half)
        return torch.cat([half, -half[:-1].flip(0)])


def _check_bins(layout: str, count: int) -> None:
    if layout not in ("symlog", "symexp") or count % 2 == 0:
        raise ValueError(f"bins: layout symlog or symexp and odd count, got {layout!r}, {count}")


def twohot_loss(logits: Tensor, target: Tensor, layout: str = "symlog") -> Tensor:
    """Cross-entropy between logits and the two-hot encoding of scalar targets.

    Args:
        logits: (..., K) unnormalised, K odd.
        target: (...) or (..., M) values in reward or return units; no gradient flows into them.
            Outside the bins all weight lies on the end bin; NaN gives NaN.
        layout: "symlog" or "symexp".

    Returns:
        (...) loss in nats; of M targets, the sum of their losses.

    Raises:
        ValueError: shapes that do not fit, an unknown layout or an even K.

    Source: DreamerV3, "Critic Learning", eq. 8-9. This is the plain PyTorch form of
    ``torch.ops.fastdreamer.twohot_loss``, and takes any floating dtype and device; the operator
    computes float32 in C++ or Triton, and float64 in PyTorch.
    """
    _check_shapes(logits, target)
    below, above, weight = _place(logits, target, layout)
    logp = F.log_softmax(logits, -1)
    return -(weight * logp.gather(-1, below) + (1 - weight) * logp.gather(-1, above)).sum(-1)


def _check_shapes(logits: Tensor, target: Tensor) -> None:
    if (
        logits.ndim == 0
        or target.shape[: logits.ndim - 1] != logits.shape[:-1]
        or (target.ndim > logits.ndim)
    ):
        raise ValueError(
            "twohot_loss: logits must be (..., K) and target (...) or (..., M), got "
            f"{tuple(logits.shape)}, {tuple(target.shape)}"
        )


def _in_bin_space(target: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    y = target.detach().to(dtype)
    return (symlog(y) if layout == "symlog" else y).contiguous()


def _place(logits: Tensor, target: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """The bins below and above each target, and the weight of the one below; each (..., M)."""
    b = bins(layout, logits.shape[-1], logits.dtype, logits.device)
    y = _in_bin_space(target, layout, logits.dtype)
    y = y.unsqueeze(-1) if y.ndim < logits.ndim else y
    count = torch.searchsorted(b, y, right=True)  # bins <= y
    below, above = (count - 1).clamp(min=0), count.clamp(max=len(b) - 1)
    to_below, to_above = (b[below] - y).abs(), (b[above] - y).abs()
    # Where both are the same end bin the split does not matter; the two weights must sum to 1.
    same = (below == above) & ~y.isnan()
    weight = torch.where(same, 1.0, to_above / (to_below + to_above).masked_fill(same, 1.0))
    return below, above, weight


def twohot_mean(logits: Tensor, layout: str = "symlog") -> Tensor:
    """Mean of the distribution over bins, in reward or return units.

    Args:
        logits: (..., K) unnormalised, K odd.
        layout: "symlog" gives symexp(sum p b), "symexp" gives sum p b.

    Returns:
        (...); exactly 0 for uniform logits, since the sum runs over symmetric pairs.

    Raises:
        ValueError: an unknown layout or an even K.

    This is the plain PyTorch form of ``torch.ops.fastdreamer.twohot_mean``, and takes any
    floating dtype and device; the operator computes float32 in C++ or Triton, and float64 in
    PyTorch.
    """
    p = F.softmax(logits, -1)
    half = logits.shape[-1] // 2
    upper = bins(layout, logits.shape[-1], logits.dtype, logits.device)[half + 1 :]
    mean = ((p[..., half + 1 :] - p[..., :half].flip(-1)) * upper).sum(-1)
    return symexp(mean) if layout == "symlog" else mean


def compiled_twohot_loss(logits: Tensor, target: Tensor, layout: str = "symlog") -> Tensor:
    """:func:`twohot_loss` by its operator, which also returns what its gradient needs."""
    return torch.ops.fastdreamer.twohot_loss(logits, target, layout)[0]


def _check_logits(name: str, logits: Tensor, layout: str) -> None:
    if logits.dtype not in library.DTYPES:
        raise TypeError(f"{name}: logits must be float32 or float64, got {logits.dtype}")
    _check_bins(layout, logits.shape[-1])


def _sizes(logits: Tensor) -> tuple[Any, ...]:
    K = logits.shape[-1]
    return logits.numel() // K, K, library.DTYPES[logits.dtype], None


def _targets(logits: Tensor, target: Tensor) -> int:
    """M."""
    return target.shape[-1] if target.ndim == logits.ndim else 1


def _loss_cpu(logits: Tensor, target: Tensor, layout: str = "symlog") -> tuple[Tensor, Tensor]:
    loss, stats = _loss_fake(logits, target, layout)
    logits = logits.contiguous()
    if logits.dtype == torch.float64:
        top = logits.amax(-1)
        total = (logits - top.unsqueeze(-1)).exp().sum(-1)
        return twohot_loss(logits, target, layout), torch.stack([top, total], -1)
    y = _in_bin_space(target, layout, logits.dtype)
    library.function("fd_twohot_loss", LOSS_SIGNATURE)(
        logits.data_ptr(),
        y.data_ptr(),
        bins(layout, logits.shape[-1], logits.dtype, logits.device).data_ptr(),
        loss.data_ptr(),
        stats.data_ptr(),
        _targets(logits, target),
        *_sizes(logits),
    )
    return loss, stats


def _loss_fake(logits: Tensor, target: Tensor, layout: str = "symlog") -> tuple[Tensor, Tensor]:
    _check_shapes(logits, target)
    _check_logits("twohot_loss", logits, layout)
    if target.device != logits.device:
        raise ValueError(f"twohot_loss: inputs on {logits.device} and {target.device}")
    lead = logits.shape[:-1]
    return logits.new_empty(lead), logits.new_empty((*lead, 2))


def _loss_backward_cpu(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, layout: str
) -> Tensor:
    dlogits = _loss_backward_fake(dloss, logits, target, stats, layout)
    dloss, logits, stats = dloss.contiguous(), logits.contiguous(), stats.contiguous()
    if logits.dtype == torch.float64:
        below, above, weight = _place(logits, target, layout)
        dlogits.copy_(below.shape[-1] * (logits - stats[..., :1]).exp() / stats[..., 1:])
        dlogits.scatter_add_(-1, below, -weight)
        dlogits.scatter_add_(-1, above, weight - 1)
        return dlogits.mul_(dloss.unsqueeze(-1))
    y = _in_bin_space(target, layout, logits.dtype)
    library.function("fd_twohot_loss_backward", LOSS_BACKWARD_SIGNATURE)(
        dloss.data_ptr(),
        logits.data_ptr(),
        y.data_ptr(),
        bins(layout, logits.shape[-1], logits.dtype, logits.device).data_ptr(),
        stats.data_ptr(),
        dlogits.data_ptr(),
        _targets(logits, target),
        *_sizes(logits),
    )
    return dlogits


def _loss_backward_fake(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, layout: str
) -> Tensor:
    _loss_fake(logits, target, layout)
    lead = logits.shape[:-1]
    if dloss.shape != lead or stats.shape != (*lead, 2):
        raise ValueError(
            f"twohot_loss: dloss {tuple(dloss.shape)} and stats {tuple(stats.shape)} for logits "
            f"{tuple(logits.shape)}"
        )
    if dloss.dtype != logits.dtype or stats.dtype != logits.dtype:
        raise TypeError(f"twohot_loss: {dloss.dtype}, {stats.dtype} for logits {logits.dtype}")
    return logits.new_empty(logits.shape)


def _loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.layout = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _loss_backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    dlogits = torch.ops.fastdreamer.twohot_loss_backward(dloss, *ctx.saved_tensors, ctx.layout)
    return dlogits, None, None


def _mean_cpu(logits: Tensor, layout: str = "symlog") -> Tensor:
    mean = _mean_fake(logits, layout)
    logits = logits.contiguous()
    if logits.dtype == torch.float64:
        return twohot_mean(logits, layout)
    library.function("fd_twohot_mean", MEAN_SIGNATURE)(
        logits.data_ptr(),
        bins(layout, logits.shape[-1], logits.dtype, logits.device).data_ptr(),
        mean.data_ptr(),
        *_sizes(logits),
    )
    return symexp(mean) if layout == "symlog" else mean


def _mean_fake(logits: Tensor, layout: str = "symlog") -> Tensor:
    _check_logits("twohot_mean", logits, layout)
    return logits.new_empty(logits.shape[:-1])


def _mean_backward_cpu(dmean: Tensor, logits: Tensor, mean: Tensor, layout: str) -> Tensor:
    logits = logits.contiguous()
    b = bins(layout, logits.shape[-1], logits.dtype, logits.device)
    if layout == "symlog":
        # symexp'(m) = 1 + |symexp(m)|, and 0 at 0 as autograd has it for the sign in it.
        dmean = dmean * (1 + mean.abs()) * mean.sign().square()
    p, dp = F.softmax(logits, -1), dmean.unsqueeze(-1) * b
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)


def _mean_backward_fake(dmean: Tensor, logits: Tensor, mean: Tensor, layout: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _mean_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.layout = inputs
    ctx.save_for_backward(logits, output)


def _mean_backward(ctx: Any, dmean: Tensor) -> tuple[Tensor, None]:
    dlogits = torch.ops.fastdreamer.twohot_mean_backward(dmean, *ctx.saved_tensors, ctx.layout)
    return dlogits, None


register("twohot_loss", LOSS_SCHEMA, _loss_cpu, _loss_fake, (_loss_setup_context, _loss_backward))
register("twohot_loss_backward", LOSS_BACKWARD_SCHEMA, _loss_backward_cpu, _loss_backward_fake)
register("twohot_mean", MEAN_SCHEMA, _mean_cpu, _mean_fake, (_mean_setup_context, _mean_backward))
register("twohot_mean_backward", MEAN_BACKWARD_SCHEMA, _mean_backward_cpu, _mean_backward_fake)
