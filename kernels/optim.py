"""One optimiser step over all parameters at once: LaProp with adaptive gradient clipping.

`agc_laprop` is the plain PyTorch form of ``torch.ops.fastdreamer.agc_laprop``, and takes any
floating dtype and device. The operator takes tensors of one dtype, float32 or float64: contiguous
float32 ones are changed by the compiled library or Triton's kernels, others by the plain form.
Lists of different lengths or shapes raise ValueError, other dtypes TypeError.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import library
from .register import register

AGC_LAPROP_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] nu, Tensor(c!)[] mu, Tensor step, "
    "Tensor lr, float clip, float beta1=0.9, float beta2=0.999, float eps=1e-20) -> Tensor"
)
LISTS = (ctypes.c_void_p,)
SIZES = (ctypes.c_void_p, ctypes.c_int64)  # sizes, count
AGC_LAPROP_SIGNATURE = (
    LISTS * 4 + SIZES + library.SIZE + (ctypes.c_double,) * 5 + LISTS + library.DTYPE_AND_STREAM
)


@torch.no_grad()
def adaptive_clip(grads: list[Tensor], params: list[Tensor], clip: float) -> list[Tensor]:
    """Scale each gradient so that its norm is at most ``clip`` times its parameter's.

    Norms are over whole tensors; a parameter's counts as at least 1e-3.
    Source: AGC (arXiv 2102.06171), per tensor as DreamerV3 (Nature) has it.
    """
    caps = torch.stack(torch._foreach_norm(params)).clamp(min=1e-3) * clip
    ratios = torch.stack(torch._foreach_norm(grads)) / caps
    return list(torch._foreach_div(grads, list(ratios.clamp(min=1).unbind())))


@torch.no_grad()
def laprop(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-20,
) -> None:
    """LaProp in place: momentum over normalised gradients, both bias-corrected.

    Args:
        params, grads, nu, mu: tensors of the same shapes; nu and mu start at zero.
        step: number of this step, from 1. lr: its learning rate. Either may be a scalar tensor on
            the parameters' device, which is read there: a captured step goes on counting.

    Source: LaProp (arXiv 2002.04839), eps outside the root.
    """
    if isinstance(step, Tensor):
        step = step.double()  # in float32 the first corrections would round to 1e-5
    correction, rate = 1 - betas[1] ** step, -lr / (1 - betas[0] ** step)
    if isinstance(correction, Tensor):
        correction = correction.to(params[0].dtype)
    if isinstance(rate, Tensor):
        rate = rate.to(params[0].dtype)
    torch._foreach_lerp_(nu, list(torch._foreach_mul(grads, grads)), 1 - betas[1])
    denominator = list(torch._foreach_sqrt(list(torch._foreach_div(nu, correction))))
    torch._foreach_add_(denominator, eps)
    torch._foreach_lerp_(mu, list(torch._foreach_div(grads, denominator)), 1 - betas[0])
    torch._foreach_add_(params, list(torch._foreach_mul(mu, rate)))


@torch.no_grad()
def agc_laprop(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
) -> Tensor:
    """`adaptive_clip`, then `laprop`, in place; see there for the arguments.

    Returns:
        Scalar norm of all gradients before clipping.
    """
    clipped = adaptive_clip(grads, params, clip)
    laprop(params, clipped, nu, mu, step, lr, (beta1, beta2), eps)
    return torch.stack(torch._foreach_norm(grads)).norm()


def compiled_agc_laprop(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
) -> Tensor:
    """`agc_laprop` by the operator; a GPU does not wait for the host, nor the host for it."""
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"agc_laprop: steps count from 1, got {step}")
    scalars = (
        x
        if isinstance(x, Tensor)
        else torch.full((), x, dtype=torch.float64, device=params[0].device)
        for x in (step, lr)
    )
    lists = (params, grads, nu, mu)
    return torch.ops.fastdreamer.agc_laprop(*lists, *scalars, clip, beta1, beta2, eps)


def _check(step: Tensor, lr: Tensor, *lists: list[Tensor]) -> None:
    if len({len(tensors) for tensors in lists}) > 1:
        lengths = ", ".join(str(len(tensors)) for tensors in lists)
        raise ValueError(f"agc_laprop: lists of one length, got {lengths}")
    for alike in zip(*lists, strict=True):
        shapes = [tuple(x.shape) for x in alike]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"agc_laprop: tensors of equal shapes, got {shapes}")
    tensors = [x for tensors in lists for x in tensors]
    for x in tensors:
        if x.dtype != tensors[0].dtype or x.dtype not in library.DTYPES:
            dtypes = f"{tensors[0].dtype} and {x.dtype}"
            raise TypeError(f"agc_laprop: all float32 or all float64, got {dtypes}")
    for x in (*tensors, step, lr):
        if x.device != tensors[0].device:
            raise ValueError(f"agc_laprop: inputs on {tensors[0].device} and {x.device}")


def _compiled(*changed: list[Tensor]) -> bool:
    """The library and the kernels can change these in place."""
    return all(
        x.dtype == torch.float32 and x.is_contiguous() for tensors in changed for x in tensors
    )


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _sizes(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors))


def _fake(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: Tensor,
    lr: Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
) -> Tensor:
    _check(step, lr, params, grads, nu, mu)
    return params[0].new_empty(())


def _cpu(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: Tensor,
    lr: Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
) -> Tensor:
    grad_norm = _fake(params, grads, nu, mu, step, lr, clip)
    scalars = (int(step.item()), lr.item(), clip, beta1, beta2, eps)
    if not _compiled(params, nu, mu):
        return agc_laprop(params, grads, nu, mu, *scalars)
    grads = [x.contiguous() for x in grads]
    norm = ctypes.c_double()
    library.function("fd_agc_laprop", AGC_LAPROP_SIGNATURE)(
        *map(_pointers, (params, grads, nu, mu)),
        _sizes(params),
        len(params),
        *scalars,
        ctypes.addressof(norm),
        library.DTYPES[torch.float32],
        None,
    )
    return grad_norm.fill_(norm.value)


register("agc_laprop", AGC_LAPROP_SCHEMA, _cpu, _fake)
