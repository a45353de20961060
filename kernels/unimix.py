"""Unimix softmax: log-probabilities, entropy, KL and straight-through samples of categoricals.

Legend: K classes; all other axes are batch axes, N rows in all. "Log-probabilities" are normalised.

The functions without an underscore are the plain PyTorch form of the operators of the same names
under ``torch.ops.fastdreamer``, and take any floating dtype and device. The operators take tensors
of equal shapes, all float32 or all float64; float32 is computed by the C++ library on a CPU and by
Triton's kernels on a GPU, float64 by the plain form. They raise ValueError for wrong shapes and
TypeError for other dtypes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .register import register


def unimix(logits: Tensor, mix: float = 0.01) -> Tensor:
    """Log-probabilities of a softmax mixed with ``mix`` of the uniform distribution.

    Args:
        logits: (..., K) unnormalised, floating.
        mix: weight of the uniform distribution, in [0, 1]; 0 gives the plain log-softmax.

    Returns:
        (..., K) log(mix / K + (1 - mix) softmax(logits)).

    Source: DreamerV3 (arXiv 2301.04104), "World Model Learning", 1 % unimix.
    """
    if mix == 0:
        return F.log_softmax(logits, -1)
    return torch.log((1 - mix) * F.softmax(logits, -1) + mix / logits.shape[-1])


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats, (..., K) log-probabilities -> (...)."""
    return -(logp.exp() * logp).sum(-1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats of two categoricals, both (..., K) log-probabilities -> (...)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def balanced_kl(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) twice, both (..., K) log-probabilities -> (...), (...) nats.

    The gradient of the first goes to ``logq`` only (dynamics loss), that of the second to ``logp``
    only (representation loss). Source: DreamerV3, eq. 5.
    """
    return kl(logp.detach(), logq), kl(logp, logq.detach())


def sample(logp: Tensor, noise: Tensor) -> Tensor:
    """One-hot Gumbel-max sample with straight-through gradient to the probabilities.

    Args:
        logp: (..., K) log-probabilities.
        noise: (..., K) standard Gumbel noise; zeros give the mode (first index on ties).

    Returns:
        (..., K) exactly one-hot in value; its gradient is that of ``logp.exp()``.
    """
    index = (logp.detach() + noise).argmax(-1, keepdim=True)
    onehot = torch.zeros_like(logp).scatter_(-1, index, 1.0)
    if not logp.requires_grad:
        return onehot
    probs = logp.exp()
    return onehot + (probs - probs.detach())


def _unimix_grad(dlogp: Tensor, logp: Tensor, mix: float) -> Tensor:
    p = logp.exp()
    share = p - mix / logp.shape[-1]  # of the softmax
    d = dlogp * (share / p) if mix else dlogp
    along = d.sum(-1, keepdim=True) / (1 - mix) if mix < 1 else 0
    return d - share * along


def _entropy_grad(dentropy: Tensor, logp: Tensor) -> Tensor:
    return -dentropy.unsqueeze(-1) * logp.exp() * (logp + 1)


def _kl_grad(dp: Tensor, dq: Tensor, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    p = logp.exp()
    return dp.unsqueeze(-1) * p * (logp - logq + 1), -dq.unsqueeze(-1) * p


def _sample_grad(donehot: Tensor, logp: Tensor) -> Tensor:
    return donehot * logp.exp()


def _check(operator: str, *inputs: Tensor, per_row: tuple[Tensor, ...] = ()) -> None:
    """All of ``inputs`` must be (..., K) and all of ``per_row`` (...), of one dtype and device."""
    first, shape = inputs[0], inputs[0].shape
    if first.ndim == 0 or shape[-1] == 0 or any(x.shape != shape for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"{operator}: all must be (..., K) of the same shape, got {shapes}")
    if any(x.shape != shape[:-1] for x in per_row):
        shapes = ", ".join(str(tuple(x.shape)) for x in per_row)
        raise ValueError(f"{operator}: gradients must be {tuple(shape[:-1])}, got {shapes}")
    for x in (*inputs, *per_row):
        if x.dtype != first.dtype or x.dtype not in library.DTYPES:
            dtypes = f"{first.dtype} and {x.dtype}"
            raise TypeError(f"{operator}: all float32 or all float64, got {dtypes}")
        if x.device != first.device:
            raise ValueError(f"{operator}: inputs on {first.device} and {x.device}")


def _fill(
    outputs: tuple[Tensor, ...],
    operator: str,
    plain: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    *options: float,
) -> None:
    """Compute ``outputs`` by ``fd_<operator>`` where they are float32, else by ``plain``.

    The last of ``inputs`` is (..., K).
    """
    if outputs[0].dtype != torch.float32:
        values = plain(*inputs, *options)
        for out, value in zip(
            outputs, values if isinstance(values, tuple) else (values,), strict=True
        ):
            out.copy_(value)
        return
    inputs = tuple(x.contiguous() for x in inputs)
    pointers = [x.data_ptr() for x in (*inputs, *outputs)]
    classes = inputs[-1].shape[-1]
    library.function(f"fd_{operator}", signature(len(pointers), len(options)))(
        *pointers,
        inputs[-1].numel() // classes,
        classes,
        *options,
        library.DTYPES[torch.float32],
        None,
    )


def signature(pointers: int, options: int = 0) -> tuple[Any, ...]:
    """The argument types of a C function of this stem."""
    floats = (ctypes.c_float,) * options
    return library.OUTPUT * pointers + library.SIZE * 2 + floats + library.DTYPE_AND_STREAM


def _unimix_fake(logits: Tensor, mix: float = 0.01) -> Tensor:
    _check("unimix", logits)
    if not 0 <= mix <= 1:
        raise ValueError(f"unimix: mix must be in 0..1, got {mix}")
    return logits.new_empty(logits.shape)


def _unimix_cpu(logits: Tensor, mix: float = 0.01) -> Tensor:
    logp = _unimix_fake(logits, mix)
    _fill((logp,), "unimix", unimix, (logits,), mix)
    return logp


def _unimix_backward_fake(dlogp: Tensor, logp: Tensor, mix: float) -> Tensor:
    _check("unimix", dlogp, logp)
    return logp.new_empty(logp.shape)


def _unimix_backward_cpu(dlogp: Tensor, logp: Tensor, mix: float) -> Tensor:
    dlogits = _unimix_backward_fake(dlogp, logp, mix)
    _fill((dlogits,), "unimix_backward", _unimix_grad, (dlogp, logp), mix)
    return dlogits


def _unimix_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mix = inputs[1]
    ctx.save_for_backward(output)


def _unimix_backward(ctx: Any, dlogp: Tensor) -> tuple[Tensor, None]:
    return torch.ops.fastdreamer.unimix_backward(dlogp, *ctx.saved_tensors, ctx.mix), None


def _entropy_fake(logp: Tensor) -> Tensor:
    _check("entropy", logp)
    return logp.new_empty(logp.shape[:-1])


def _entropy_cpu(logp: Tensor) -> Tensor:
    nats = _entropy_fake(logp)
    _fill((nats,), "entropy", entropy, (logp,))
    return nats


def _entropy_backward_fake(dentropy: Tensor, logp: Tensor) -> Tensor:
    _check("entropy", logp, per_row=(dentropy,))
    return logp.new_empty(logp.shape)


def _entropy_backward_cpu(dentropy: Tensor, logp: Tensor) -> Tensor:
    dlogp = _entropy_backward_fake(dentropy, logp)
    _fill((dlogp,), "entropy_backward", _entropy_grad, (dentropy, logp))
    return dlogp


def _entropy_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _entropy_backward(ctx: Any, dentropy: Tensor) -> Tensor:
    return torch.ops.fastdreamer.entropy_backward(dentropy, *ctx.saved_tensors)


def _kl_fake(logp: Tensor, logq: Tensor) -> Tensor:
    _check("kl", logp, logq)
    return logp.new_empty(logp.shape[:-1])


def _kl_cpu(logp: Tensor, logq: Tensor) -> Tensor:
    nats = _kl_fake(logp, logq)
    _fill((nats,), "kl", kl, (logp, logq))
    return nats


def _kl_backward_fake(dp: Tensor, dq: Tensor, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    _check("kl", logp, logq, per_row=(dp, dq))
    return logp.new_empty(logp.shape), logp.new_empty(logp.shape)


def _kl_backward_cpu(dp: Tensor, dq: Tensor, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    grads = _kl_backward_fake(dp, dq, logp, logq)
    _fill(grads, "kl_backward", _kl_grad, (dp, dq, logp, logq))
    return grads


def _kl_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _kl_backward(ctx: Any, dkl: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fastdreamer.kl_backward(dkl, dkl, *ctx.saved_tensors)


def _balanced_kl_fake(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    return _kl_fake(logp, logq), _kl_fake(logp, logq)


def _balanced_kl_cpu(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    nats = _kl_cpu(logp, logq)
    return nats, nats.clone()  # an operator's results may not share memory


def _balanced_kl_backward(ctx: Any, dq: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fastdreamer.kl_backward(dp, dq, *ctx.saved_tensors)


def _sample_fake(logp: Tensor, noise: Tensor) -> Tensor:
    _check("sample", logp, noise)
    return logp.new_empty(logp.shape)


def _sample_cpu(logp: Tensor, noise: Tensor) -> Tensor:
    onehot = _sample_fake(logp, noise)
    _fill((onehot,), "sample", sample, (logp, noise))
    return onehot


def _sample_backward_fake(donehot: Tensor, logp: Tensor) -> Tensor:
    _check("sample", donehot, logp)
    return logp.new_empty(logp.shape)


def _sample_backward_cpu(donehot: Tensor, logp: Tensor) -> Tensor:
    dlogp = _sample_backward_fake(donehot, logp)
    _fill((dlogp,), "sample_backward", _sample_grad, (donehot, logp))
    return dlogp


def _sample_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _sample_backward(ctx: Any, donehot: Tensor) -> tuple[Tensor, None]:
    return torch.ops.fastdreamer.sample_backward(donehot, *ctx.saved_tensors), None


register(
    "unimix",
    "(Tensor logits, float mix=0.01) -> Tensor",
    _unimix_cpu,
    _unimix_fake,
    (_unimix_setup, _unimix_backward),
)
register(
    "unimix_backward",
    "(Tensor dlogp, Tensor logp, float mix) -> Tensor",
    _unimix_backward_cpu,
    _unimix_backward_fake,
)
register(
    "entropy",
    "(Tensor logp) -> Tensor",
    _entropy_cpu,
    _entropy_fake,
    (_entropy_setup, _entropy_backward),
)
register(
    "entropy_backward",
    "(Tensor dentropy, Tensor logp) -> Tensor",
    _entropy_backward_cpu,
    _entropy_backward_fake,
)
register("kl", "(Tensor logp, Tensor logq) -> Tensor", _kl_cpu, _kl_fake, (_kl_setup, _kl_backward))
register(
    "balanced_kl",
    "(Tensor logp, Tensor logq) -> (Tensor dynamics, Tensor representation)",
    _balanced_kl_cpu,
    _balanced_kl_fake,
    (_kl_setup, _balanced_kl_backward),
)
register(
    "kl_backward",
    "(Tensor dp, Tensor dq, Tensor logp, Tensor logq) -> (Tensor dlogp, Tensor dlogq)",
    _kl_backward_cpu,
    _kl_backward_fake,
)
register(
    "sample",
    "(Tensor logp, Tensor noise) -> Tensor",
    _sample_cpu,
    _sample_fake,
    (_sample_setup, _sample_backward),
)
register(
    "sample_backward",
    "(Tensor donehot, Tensor logp) -> Tensor",
    _sample_backward_cpu,
    _sample_backward_fake,
)
