"""The posterior scan as an operator: schema, fake, autograd, and the libraries' functions.

Its reference, and what decides who serves a call, are in `rssm_observe`.

Legend: B batch, T time, D deter, S stoch, K classes, A action, U hidden, G blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import library
from .library import Arguments
from .register import products_in, register
from .rssm_observe_weights import flatten, last_state, unflatten, weight_gradients, widths_of
from .rssm_weights import (
    SOMEWHERE,
    RSSMWeights,
    Sizes,
    c_model,
    check_weights,
    contiguous,
    drawn,
    placeholder_model,
)


def observe(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastdreamer.rssm_observe(
        flatten(weights),
        start_deter.detach(),
        drawn(start_stoch.detach()),
        drawn(weights.initial_stoch),
        action,
        embedded,
        is_first,
        noise,
        weights.eps,
        weights.mix,
        compute,
    )[:3]


@torch.compiler.assume_constant_result
def takes(sizes: Sizes, rows: int, steps: int, compute: torch.dtype, device: torch.device) -> bool:
    """Whether the GPU takes a scan and its backward pass."""
    return _ask(sizes, rows, steps, compute, device)


@cache
def _ask(sizes: Sizes, rows: int, steps: int, compute: torch.dtype, device: torch.device) -> bool:
    model = placeholder_model(sizes)
    scan = CObserve(rows, steps, *[SOMEWHERE] * (len(CObserve._fields_) - 2))
    grad = CObserveGrad(*[SOMEWHERE] * len(CObserveGrad._fields_))
    return library.takes("fd_rssm_observe", device, compute, model, scan) and library.takes(
        "fd_rssm_observe_backward", device, compute, model, scan, grad
    )


_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


class CObserve(Arguments):
    """``fd_observe``."""

    _fields_: ClassVar = [
        ("B", _SIZE),
        ("T", _SIZE),
        *(
            (k, _POINTER)
            for k in (
                *("start_deter", "start_index", "initial_deter", "initial_index", "action"),
                *("embedded", "is_first", "noise", "deter", "index", "logp"),
                *("inputs", "hidden", "gates", "posterior"),
            )
        ),
    ]


class CObserveGrad(Arguments):
    """``fd_observe_grad``."""

    _fields_: ClassVar = [
        (k, _POINTER)
        for k in (
            *("ddeter", "dstoch", "dlogp", "dinputs", "dhidden", "dgates"),
            *("dposterior", "dlogits", "dinitial", "dnorm"),
        )
    ]


SCHEMA = (
    "(Tensor[] weights, Tensor start_deter, Tensor start_index, Tensor initial_index, "
    "Tensor action, Tensor embedded, Tensor is_first, Tensor noise, float eps, float mix, "
    "ScalarType compute) -> "
    "(Tensor deter, Tensor stoch, Tensor logp, Tensor index, Tensor inputs, Tensor hidden, "
    "Tensor gates, Tensor posterior)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] weights, Tensor start_deter, Tensor start_index, Tensor initial_index, "
    "Tensor action, Tensor is_first, Tensor deter, Tensor logp, Tensor index, "
    "Tensor inputs, Tensor hidden, Tensor gates, Tensor posterior, Tensor ddeter, Tensor dstoch, "
    "Tensor dlogp, float eps, float mix, ScalarType compute) -> "
    "(Tensor dinputs, Tensor dhidden, Tensor dgates, Tensor dposterior, Tensor dlogits, "
    "Tensor dinitial, Tensor dnorm)"
)


def _fake(
    tensors: list[Tensor],
    start_deter: Tensor,
    start_index: Tensor,
    initial_index: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
    eps: float,
    mix: float,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    weights = unflatten(tensors, noise.shape[-1], eps, mix)
    _check(weights, start_deter, start_index, initial_index, action, embedded, is_first, noise)
    (rows, steps), deter = is_first.shape, start_deter.shape[1]
    inputs, hidden, units = widths_of(weights)
    widths = (deter, inputs, hidden, 3 * deter, units)
    first, *kept = (embedded.new_empty(rows, steps, width) for width in widths)
    stoch, logp = torch.empty_like(noise), torch.empty_like(noise)
    index = start_index.new_empty(rows, steps, noise.shape[-2])
    return (first, stoch, logp, index, *kept)


def _check(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_index: Tensor,
    initial_index: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> None:
    if is_first.dtype != torch.bool or is_first.ndim != 2:
        raise TypeError(
            f"rssm_observe: is_first must be bool (B, T), got {is_first.dtype} "
            f"{tuple(is_first.shape)}"
        )
    (rows, steps), deter = is_first.shape, weights.initial_deter.shape[0]
    stoch, units = initial_index.shape[0], weights.posterior[0].weight.shape[0]
    expected = {
        "start_deter": (start_deter, (rows, deter)),
        "start_index": (start_index, (rows, stoch)),
        "action": (action, (rows, steps, action.shape[-1])),
        "embedded": (embedded, (rows, steps, units)),
        "noise": (noise, (rows, steps, *weights.initial_stoch.shape)),
        "initial_index": (initial_index, (weights.initial_stoch.shape[0],)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"rssm_observe: {name} must be {shape}, got {tuple(x.shape)}")
        dtype = torch.int32 if name.endswith("index") else torch.float32
        if x.dtype != dtype:
            raise TypeError(f"rssm_observe: {name} must be {dtype}, got {x.dtype}")
    check_weights("rssm_observe", weights, action.shape[-1], weights.posterior)


def _compute(
    tensors: list[Tensor],
    start_deter: Tensor,
    start_index: Tensor,
    initial_index: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
    eps: float,
    mix: float,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    starts = [x.contiguous() for x in (start_deter, start_index, initial_index, action, is_first)]
    embedded, noise = embedded.contiguous(), noise.contiguous()
    arguments: list[Any] = [*starts[:4], embedded, starts[4], noise, eps, mix, compute]
    outputs = _fake(tensors, *arguments)
    weights = contiguous(unflatten(tensors, noise.shape[-1], eps, mix))
    scan = _scan(weights, starts, outputs)
    scan.embedded, scan.noise = embedded.data_ptr(), noise.data_ptr()
    model = c_model(weights, action.shape[-1], weights.posterior)
    deter, stoch, _logp, index, *_ = outputs
    library.launch("fd_rssm_observe", deter, compute, model, scan)
    stoch.zero_().scatter_(-1, index.long().unsqueeze(-1), 1.0)
    return outputs


def _scan(weights: RSSMWeights, starts: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
    start_deter, start_index, initial_index, action, is_first = starts
    deter, _stoch, logp, index, inputs, hidden, gates, posterior = outputs
    (rows, steps) = is_first.shape
    return CObserve.of(
        B=rows,
        T=steps,
        start_deter=start_deter,
        start_index=start_index,
        initial_deter=weights.initial_deter,
        initial_index=initial_index,
        action=action,
        embedded=inputs,  # the backward pass does not read it, nor the noise
        is_first=is_first,
        noise=logp,
        deter=deter,
        index=index,
        logp=logp,
        inputs=inputs,
        hidden=hidden if hidden.numel() else None,
        gates=gates,
        posterior=posterior,
    )


def _fake_backward(
    tensors: list[Tensor],
    start_deter: Tensor,
    start_index: Tensor,
    initial_index: Tensor,
    action: Tensor,
    is_first: Tensor,
    deter: Tensor,
    logp: Tensor,
    index: Tensor,
    inputs: Tensor,
    hidden: Tensor,
    gates: Tensor,
    posterior: Tensor,
    ddeter: Tensor,
    dstoch: Tensor,
    dlogp: Tensor,
    eps: float,
    mix: float,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    weights = unflatten(tensors, logp.shape[-1], eps, mix)
    before, middle, units = widths_of(weights)
    norms = 2 * (before + (middle or 3 * deter.shape[-1]) + units)
    kept = [torch.empty_like(x) for x in (inputs, hidden, gates, posterior, logp)]
    return (*kept, torch.empty_like(weights.initial_deter), deter.new_empty(norms))


def _compute_backward(tensors: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    grads = _fake_backward(tensors, *args)
    *inputs, ddeter, dstoch, dlogp, eps, mix, compute = args
    start_deter, start_index, initial_index, action, is_first, deter, logp, *kept = inputs
    weights = contiguous(unflatten(tensors, logp.shape[-1], eps, mix))
    starts = [x.contiguous() for x in (start_deter, start_index, initial_index, action, is_first)]
    scan = _scan(weights, starts, (deter, deter, logp, *kept))
    incoming = [x.contiguous() for x in (ddeter, dstoch, dlogp)]
    dinputs, dhidden, dgates, dposterior, dlogits, dinitial, dnorm = grads
    grad = CObserveGrad.of(
        ddeter=incoming[0],
        dstoch=incoming[1],
        dlogp=incoming[2],
        dinputs=dinputs,
        dhidden=dhidden if dhidden.numel() else None,
        dgates=dgates,
        dposterior=dposterior,
        dlogits=dlogits,
        dinitial=dinitial,
        dnorm=dnorm,
    )
    model = c_model(weights, action.shape[-1], weights.posterior)
    library.launch("fd_rssm_observe_backward", deter, compute, model, scan, grad)
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, start_deter, start_index, initial, action, _embedded, is_first, _noise = inputs[:8]
    ctx.eps, ctx.mix, ctx.compute = inputs[8:]
    ctx.count = len(tensors)
    starts = (start_deter, start_index, initial, action, is_first)
    ctx.save_for_backward(*tensors, *starts, *output)
    ctx.mark_non_differentiable(*output[3:])


def _backward(
    ctx: Any, ddeter: Tensor, dstoch: Tensor, dlogp: Tensor, *_: Tensor | None
) -> tuple[Any, ...]:
    tensors, saved = list(ctx.saved_tensors[: ctx.count]), ctx.saved_tensors[ctx.count :]
    *starts, deter, stoch, logp, index, inputs, hidden, gates, posterior = saved
    kept = (inputs, hidden, gates, posterior)
    grads = torch.ops.fastdreamer.rssm_observe_backward(
        tensors,
        *starts,
        deter,
        logp,
        index,
        *kept,
        ddeter,
        dstoch,
        dlogp,
        ctx.eps,
        ctx.mix,
        ctx.compute,
    )
    weights = unflatten(tensors, logp.shape[-1], ctx.eps, ctx.mix)
    last = last_state(weights, starts, deter, stoch)
    with products_in(ctx.compute, deter):
        dweights = weight_gradients(weights, last, deter, kept, grads)
    dweights = [dweight.to(deter.dtype) for dweight in dweights]
    return (dweights, None, None, None, None, grads[3], None, None, None, None, None)


register("rssm_observe", SCHEMA, _compute, _fake, (_setup_context, _backward), _compute)
register(
    "rssm_observe_backward",
    BACKWARD_SCHEMA,
    _compute_backward,
    _fake_backward,
    cuda=_compute_backward,
)
