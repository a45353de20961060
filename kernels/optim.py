"""One optimiser step over all parameters at once, and the moving average of them.

LaProp with adaptive gradient clipping, Adam with clipping by the global norm, and the target
critic's average. `agc_laprop`, `clip_adam` and `ema` are the plain PyTorch forms of the operators
``torch.ops.fastdreamer.<name>``, and take any floating dtype and device. The operators take tensors
of one dtype, float32 or float64: contiguous float32 ones are changed by the compiled library or
Triton's kernels, others by the plain form. Lists of different lengths or shapes raise ValueError,
other dtypes TypeError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import library
from .register import register

STEP_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] nu, Tensor(c!)[] mu, Tensor step, "
    "Tensor lr, float clip, float beta1=0.9, float beta2=0.999, float eps={eps}) -> Tensor"
)
LISTS = (ctypes.c_void_p,)
SIZES = (ctypes.c_void_p, ctypes.c_int64)  # sizes, count
STEP_SIGNATURE = (
    LISTS * 4 + SIZES + library.SIZE + (ctypes.c_double,) * 5 + LISTS + library.DTYPE_AND_STREAM
)
EMA_SIGNATURE = LISTS * 2 + SIZES + (ctypes.c_double,) + library.DTYPE_AND_STREAM


@torch.no_grad()
def adaptive_clip(grads: list[Tensor], params: list[Tensor], clip: float) -> list[Tensor]:
    """Scale each gradient so that its norm is at most ``clip`` times its parameter's.

    Norms are over whole tensors; a parameter's counts as at least 1e-3.
    Source: AGC (arXiv 2102.06171), per tensor as DreamerV3 (Nature) has it.
    """
    caps = torch.stack(torch._foreach_norm(params)).clamp(min=1e-3) * clip
    ratios = torch.stack(torch._foreach_norm(grads)) / caps
    return list(torch._foreach_div(grads, list(ratios.clamp(min=1).unbind())))


Scalar = int | float | Tensor


def _corrected(step: Scalar, lr: Scalar, betas: tuple[float, float]) -> tuple[Scalar, Scalar]:
    """What divides the average of squares, and the negative rate over what divides the other's."""
    if isinstance(step, Tensor):
        step = step.double()  # in float32 the first corrections would round to 1e-5
    return 1 - betas[1] ** step, -lr / (1 - betas[0] ** step)


def _like(params: list[Tensor], x: Scalar) -> Any:
    """A scalar tensor in the parameters' type; numbers as they are."""
    return x.to(params[0].dtype) if isinstance(x, Tensor) else x


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
    correction, rate = _corrected(step, lr, betas)
    correction, rate = _like(params, correction), _like(params, rate)
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


@torch.no_grad()
def clip_adam(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """Adam in place, on gradients scaled so that the norm of all of them is at most ``clip``.

    Args:
        params, grads, nu, mu, step, lr: as of `laprop`; nu averages squares, mu gradients.

    Returns:
        Scalar norm of all gradients before clipping.

    Source: Adam (arXiv 1412.6980), eps outside the root. Equals ``clip_grad_norm_``, which adds
    1e-6 to the norm, before ``torch.optim.Adam``.
    """
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    grads = list(torch._foreach_mul(grads, (clip / (norm + 1e-6)).clamp(max=1)))
    correction, rate = _corrected(step, lr, (beta1, beta2))
    root, rate = _like(params, correction**0.5), _like(params, rate)
    torch._foreach_lerp_(mu, grads, 1 - beta1)
    torch._foreach_mul_(nu, beta2)
    torch._foreach_addcmul_(nu, grads, grads, 1 - beta2)
    denominator = list(torch._foreach_div(list(torch._foreach_sqrt(nu)), root))
    torch._foreach_add_(denominator, eps)
    steps = list(torch._foreach_div(mu, denominator))
    torch._foreach_add_(params, list(torch._foreach_mul(steps, rate)))
    return norm


@torch.no_grad()
def ema(targets: list[Tensor], params: list[Tensor], rate: float) -> None:
    """Exponential moving average in place: targets += rate (params - targets)."""
    torch._foreach_lerp_(targets, params, rate)


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
    lists, scalars = (params, grads, nu, mu), _scalars("agc_laprop", params, step, lr)
    return torch.ops.fastdreamer.agc_laprop(*lists, *scalars, clip, beta1, beta2, eps)


def compiled_clip_adam(
    params: list[Tensor],
    grads: list[Tensor],
    nu: list[Tensor],
    mu: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    clip: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """`clip_adam` by the operator; a GPU does not wait for the host, nor the host for it."""
    lists, scalars = (params, grads, nu, mu), _scalars("clip_adam", params, step, lr)
    return torch.ops.fastdreamer.clip_adam(*lists, *scalars, clip, beta1, beta2, eps)


def _scalars(
    operator: str, params: list[Tensor], step: int | Tensor, lr: float | Tensor
) -> list[Tensor]:
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"{operator}: steps count from 1, got {step}")
    form: dict[str, Any] = {"dtype": torch.float64, "device": params[0].device}
    return [x if isinstance(x, Tensor) else torch.full((), x, **form) for x in (step, lr)]


def check(operator: str, lists: Sequence[list[Tensor]], scalars: Sequence[Tensor] = ()) -> None:
    """Raise ValueError or TypeError, with the operator's name, for what it does not take."""
    shapes = [[x.shape for x in tensors] for tensors in lists]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{operator}: lists of tensors of equal shapes, got {shapes}")
    tensors = [x for tensors in lists for x in tensors]
    dtypes, devices = {x.dtype for x in tensors}, {x.device for x in (*tensors, *scalars)}
    if len(dtypes) > 1 or not dtypes <= library.DTYPES.keys():
        raise TypeError(f"{operator}: all float32 or all float64, got {dtypes}")
    if len(devices) > 1:
        raise ValueError(f"{operator}: inputs on one device, got {devices}")


def changeable(*changed: list[Tensor]) -> bool:
    """Whether the library and the kernels can change these in place."""
    return all(
        x.dtype == torch.float32 and x.is_contiguous() for tensors in changed for x in tensors
    )


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _sizes(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors))


def _step_operator(name: str, reference: Callable[..., Tensor], eps: float) -> None:
    """Register an operator of `STEP_SCHEMA`, which the library has as ``fd_<name>``."""

    def fake(
        params: list[Tensor],
        grads: list[Tensor],
        nu: list[Tensor],
        mu: list[Tensor],
        step: Tensor,
        lr: Tensor,
        *_: float,
    ) -> Tensor:
        check(name, (params, grads, nu, mu), (step, lr))
        return params[0].new_empty(())

    def cpu(
        params: list[Tensor],
        grads: list[Tensor],
        nu: list[Tensor],
        mu: list[Tensor],
        step: Tensor,
        lr: Tensor,
        clip: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = eps,
    ) -> Tensor:
        grad_norm = fake(params, grads, nu, mu, step, lr)
        scalars = (int(step.item()), lr.item(), clip, beta1, beta2, eps)
        if not changeable(params, nu, mu):
            return reference(params, grads, nu, mu, *scalars)
        grads = [x.contiguous() for x in grads]
        norm = ctypes.c_double()
        library.function(f"fd_{name}", STEP_SIGNATURE)(
            *map(_pointers, (params, grads, nu, mu)),
            _sizes(params),
            len(params),
            *scalars,
            ctypes.addressof(norm),
            library.DTYPES[torch.float32],
            None,
        )
        return grad_norm.fill_(norm.value)

    register(name, STEP_SCHEMA.format(eps=eps), cpu, fake)


def _fake_ema(targets: list[Tensor], params: list[Tensor], rate: float) -> None:
    check("ema", (targets, params))


def _cpu_ema(targets: list[Tensor], params: list[Tensor], rate: float) -> None:
    check("ema", (targets, params))
    if not changeable(targets):
        ema(targets, params, rate)
        return
    params = [x.contiguous() for x in params]
    lists = (*map(_pointers, (targets, params)), _sizes(targets), len(targets))
    dtype = library.DTYPES[torch.float32]
    library.function("fd_ema", EMA_SIGNATURE)(*lists, rate, dtype, None)


_step_operator("agc_laprop", agc_laprop, 1e-20)
_step_operator("clip_adam", clip_adam, 1e-8)
register("ema", "(Tensor(a!)[] targets, Tensor[] params, float rate) -> ()", _cpu_ema, _fake_ema)
