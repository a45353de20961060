"""The posterior scan over observations, forward and backward over the whole sequence.

Legend: B batch, T time, D deter, S stoch, K classes, A action, U hidden, G blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .gru_step import block_weight_gradients
from .library import Arguments
from .register import register
from .rssm_weights import (
    MAX_BLOCKS,
    SOMEWHERE,
    BlockGRUWeights,
    GRUWeights,
    Layer,
    RSSMWeights,
    Sizes,
    c_model,
    check_weights,
    compute_type,
    contiguous,
    drawn,
    placeholder_model,
    sizes_of,
)
from .unimix import sample


def observe_step(
    weights: RSSMWeights,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One posterior step; where ``is_first``, from the initial state and a zero action.

    Args:
        deter: (B, D), stoch: (B, S, K) the last state. action: (B, A) that followed it.
        embedded: (B, U) the embedding's share of the posterior's first layer, with its bias.
        is_first: (B,) bool. noise: (B, S, K) Gumbel; zeros draw the mode.

    Returns:
        deter (B, D), stoch (B, S, K) one-hot, its log-probabilities (B, S, K).
    """
    first = is_first[:, None]
    deter = torch.where(first, weights.initial_deter, deter)
    stoch = torch.where(first[..., None], weights.initial_stoch, stoch)
    action = action.masked_fill(first, 0)
    deter = weights.cell.step(stoch.flatten(-2), action, deter, weights.eps)
    hidden, out = weights.posterior
    x = hidden.activate(F.linear(deter, hidden.weight) + embedded, weights.eps)
    logp = weights.latent([out], x)
    return deter, sample(logp, noise), logp


def rssm_observe(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior scan; differentiable in the weights and ``embedded``, not in the start.

    Args:
        start_deter: (B, D). start_stoch: (B, S, K) one-hot, or zeros.
        action: (B, T, A), ``action[:, t]`` the one taken *before* observation t.
        embedded: (B, T, U). is_first: (B, T) bool. noise: (B, T, S, K) Gumbel.

    Returns:
        deter (B, T, D), stoch (B, T, S, K) one-hot with straight-through gradient, and its
        log-probabilities (B, T, S, K).

    Source: DreamerV3, eq. 3.
    """
    state: tuple[Tensor, ...] = (start_deter.detach(), start_stoch.detach())
    steps = []
    for args in zip(*(x.unbind(1) for x in (action, embedded, is_first, noise)), strict=True):
        steps.append(observe_step(weights, state[0], state[1], *args))
        state = steps[-1]
    if not steps:
        return start_deter[:, None][:, :0], noise, noise
    deter, stoch, logp = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    return deter, stoch, logp


def rssm_observe_cpp(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rssm_observe` by the C++ library, in float32.

    Other types, cells of more than 64 blocks, and a single step, which packing the weights would
    take longer than, are served by the reference.
    """
    scan = (start_deter, start_stoch, action, embedded, is_first, noise)
    served = embedded.dtype == torch.float32 and weights.blocks <= MAX_BLOCKS
    if not served or embedded.shape[1] == 1:
        return rssm_observe(weights, *scan)
    return _operator(weights, *scan, torch.float32)


def rssm_observe_cuda(
    weights: RSSMWeights,
    start_deter: Tensor,
    start_stoch: Tensor,
    action: Tensor,
    embedded: Tensor,
    is_first: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rssm_observe` by the CUDA library, from and to float32.

    It multiplies in bfloat16 where autocast says so, else in float32. Other types, and models that
    the library does not take, are served by the reference.
    """
    scan = (start_deter, start_stoch, action, embedded, is_first, noise)
    compute = compute_type()
    if compute == torch.bfloat16:
        embedded = embedded.float()
    sizes = sizes_of(weights, action.shape[-1], weights.posterior)
    fits = weights.blocks <= MAX_BLOCKS and _takes(sizes, *is_first.shape, compute, action.device)
    if embedded.dtype != torch.float32 or not fits:
        return rssm_observe(weights, *scan)
    return _operator(weights, *scan[:3], embedded, is_first, noise, compute)


@torch.compiler.assume_constant_result
def _takes(sizes: Sizes, rows: int, steps: int, compute: torch.dtype, device: torch.device) -> bool:
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


def _operator(
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
        _flatten(weights),
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


def _flatten(weights: RSSMWeights) -> list[Tensor]:
    """Every tensor that a gradient flows to, in the order of :func:`_unflatten`."""
    cell, (hidden, out) = weights.cell, weights.posterior
    parts: list[Tensor | None] = []
    for item in cell:
        parts += [item] if isinstance(item, Tensor) else item
    return [x for x in (*parts, *hidden, *out, weights.initial_deter) if x is not None]


def _unflatten(tensors: list[Tensor], classes: int, eps: float, mix: float) -> RSSMWeights:
    *tensors, initial = tensors
    cell: GRUWeights | BlockGRUWeights
    if len(tensors) == 11:
        weight, scale, shift, *rest = tensors
        cell = GRUWeights(Layer(weight, None, scale, shift), *rest[:3])
        first, first_scale, first_shift, out, bias = rest[3:]
        hidden = Layer(first, None, first_scale, first_shift)
    else:
        deter, stoch, action = (Layer(*tensors[i : i + 3]) for i in (0, 3, 6))
        cell = BlockGRUWeights(deter, stoch, action, *tensors[9:14])
        first, first_scale, out, bias = tensors[14:]
        hidden = Layer(first, None, first_scale)
    zeros = initial.new_zeros(out.shape[0] // classes, classes)
    return RSSMWeights(cell, (hidden, Layer(out, bias)), (), initial, zeros, eps, mix)


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


def _widths(weights: RSSMWeights) -> tuple[int, int, int]:
    """Units before the norms: of the input layers, of the hidden layer (blocks only), U."""
    deter, units = weights.initial_deter.shape[0], weights.posterior[0].weight.shape[0]
    return (units, 0, units) if isinstance(weights.cell, GRUWeights) else (3 * units, deter, units)


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
    weights = _unflatten(tensors, noise.shape[-1], eps, mix)
    _check(weights, start_deter, start_index, initial_index, action, embedded, is_first, noise)
    (rows, steps), deter = is_first.shape, start_deter.shape[1]
    inputs, hidden, units = _widths(weights)
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
    weights = contiguous(_unflatten(tensors, noise.shape[-1], eps, mix))
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
    weights = _unflatten(tensors, logp.shape[-1], eps, mix)
    before, middle, units = _widths(weights)
    norms = 2 * (before + (middle or 3 * deter.shape[-1]) + units)
    kept = [torch.empty_like(x) for x in (inputs, hidden, gates, posterior, logp)]
    return (*kept, torch.empty_like(weights.initial_deter), deter.new_empty(norms))


def _compute_backward(tensors: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    grads = _fake_backward(tensors, *args)
    *inputs, ddeter, dstoch, dlogp, eps, mix, compute = args
    start_deter, start_index, initial_index, action, is_first, deter, logp, *kept = inputs
    weights = contiguous(_unflatten(tensors, logp.shape[-1], eps, mix))
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
    weights = _unflatten(tensors, logp.shape[-1], ctx.eps, ctx.mix)
    last = _last_state(weights, starts, deter, stoch)
    half = ctx.compute == torch.bfloat16
    with torch.autocast(deter.device.type, torch.bfloat16, enabled=half):
        dweights = _weight_gradients(weights, last, deter, kept, grads)
    dweights = [dweight.to(deter.dtype) for dweight in dweights]
    return (dweights, None, None, None, None, grads[3], None, None, None, None, None)


def _last_state(
    weights: RSSMWeights, starts: Sequence[Tensor], deter: Tensor, stoch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each step started from: deter (N, D), stoch (N, S K), action (N, A); N = B T."""
    start_deter, start_index, initial_index, action, is_first = starts
    first = is_first.bool().unsqueeze(-1)

    def onehot(index: Tensor) -> Tensor:
        classes = torch.arange(stoch.shape[-1], device=index.device)
        return (index.unsqueeze(-1) == classes).to(stoch.dtype)

    before = torch.cat([start_deter.unsqueeze(1), deter[:, :-1]], 1)
    before = torch.where(first, weights.initial_deter, before)
    drawn_before = torch.cat([onehot(start_index).unsqueeze(1), stoch[:, :-1]], 1)
    drawn_before = torch.where(first.unsqueeze(-1), onehot(initial_index), drawn_before)
    action = action.masked_fill(first, 0)
    return before.flatten(0, 1), drawn_before.flatten(2).flatten(0, 1), action.flatten(0, 1)


def _weight_gradients(
    weights: RSSMWeights,
    last: tuple[Tensor, Tensor, Tensor],
    deter: Tensor,
    kept: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> list[Tensor]:
    """One product for each weight over all steps, in the order of :func:`_flatten`."""
    inputs, hidden, _gates, posterior = (x.flatten(0, 1) for x in kept)
    dinputs, dhidden, dgates, dposterior, dlogits = (x.flatten(0, 1) for x in grads[:5])
    *_, dinitial, dnorm = grads
    cell, (first, _out), eps = weights.cell, weights.posterior, weights.eps
    before, drawn_before, action = last
    before_width, middle, units = _widths(weights)
    sizes = [before_width] * 2 + [middle or 3 * before.shape[1]] * 2 + [units] * 2
    dscale, dshift, dcell_scale, dcell_shift, dfirst_scale, dfirst_shift = dnorm.split(sizes)
    if isinstance(cell, GRUWeights):
        x = cell.input.activate(inputs, eps)
        dgate_weight = dgates.T @ torch.cat([before, x], 1)
        dinput = dinputs.T @ torch.cat([drawn_before, action], 1)
        dcell = [dinput, dscale, dshift, dgate_weight, dcell_scale, dcell_shift]
    else:
        dcell = _block_gradients(cell, last, inputs, hidden, dinputs, dhidden, dgates, eps)
        for i, part in enumerate(dscale.chunk(3)):
            dcell.insert(3 * i + 2, part)
        dcell.insert(11, dcell_scale)
    dlogits = dlogits.flatten(1)
    dhead = [dposterior.T @ deter.flatten(0, 1), dfirst_scale]
    dhead += [] if first.shift is None else [dfirst_shift]
    dhead += [dlogits.T @ first.activate(posterior, eps), dlogits.sum(0)]
    return [*dcell, *dhead, dinitial]


def _block_gradients(
    cell: BlockGRUWeights,
    last: tuple[Tensor, Tensor, Tensor],
    inputs: Tensor,
    hidden: Tensor,
    dinputs: Tensor,
    dhidden: Tensor,
    dgates: Tensor,
    eps: float,
) -> list[Tensor]:
    """Gradients of the block cell's weights and biases, without the norms' scales."""
    before, drawn_before, action = last
    action = action / action.abs().clamp(min=1)
    layers = (cell.deter, cell.stoch, cell.action)
    grads, parts = [], []
    for layer, x, source, dx in zip(
        layers, inputs.chunk(3, 1), (before, drawn_before, action), dinputs.chunk(3, 1), strict=True
    ):
        parts.append(layer.activate(x, eps))
        grads += [dx.T @ source, dx.sum(0)]
    z = F.silu(F.rms_norm(hidden, cell.scale.shape, cell.scale, eps))
    x = torch.cat(parts, 1)
    return grads + block_weight_gradients(before, x, z, dhidden, dgates, cell.hidden.shape[0])


register("rssm_observe", SCHEMA, _compute, _fake, (_setup_context, _backward), _compute)
register(
    "rssm_observe_backward",
    BACKWARD_SCHEMA,
    _compute_backward,
    _fake_backward,
    cuda=_compute_backward,
)
