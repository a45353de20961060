"""Lambda returns, the backward recursion over time. Legend: N rows, T time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library
from .register import register

SCHEMA = "(Tensor reward, Tensor discount, Tensor value, Tensor lam) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor dret, Tensor discount, Tensor value, Tensor lam, Tensor ret)"
    " -> (Tensor dreward, Tensor ddiscount, Tensor dvalue, Tensor dlam)"
)
SIZES = library.SIZE * 2 + library.DTYPE_AND_STREAM
FWD_SIGNATURE = library.MATRIX * 4 + library.OUTPUT + SIZES
BWD_SIGNATURE = library.MATRIX * 5 + library.OUTPUT * 4 + SIZES


def lambda_return(reward: Tensor, discount: Tensor, value: Tensor, lam: Tensor) -> Tensor:
    """Lambda returns, bootstrapped from the last value.

    ``ret[t] = reward[t] + discount[t] * ((1 - lam[t]) * value[t] + lam[t] * ret[t + 1])``
    for t = T-1 .. 0, with ``ret[T] = value[T - 1]``.

    Args:
        reward: (N, T) what the step from t to t + 1 earned, r_{t+1}.
        discount: (N, T) gamma times the probability c_{t+1} that the episode continues.
        value: (N, T) value of the state that the step reaches, v_{t+1}.
        lam: broadcastable to (N, T); a constant in imagination, 0.95 (1 - last) on replay.

    Returns:
        (N, T) returns, in reward units.

    Source: DreamerV3, "Critic Learning", eq. 7. This is the plain PyTorch form of
    ``torch.ops.fastdreamer.lambda_return``, and takes any floating dtype and device.
    """
    _check_shapes(reward, discount, value, lam)
    lam = lam.expand_as(reward)
    if reward.shape[1] == 0:
        return reward * discount * value * lam  # empty, with a gradient for every input
    ret, rets = value[:, -1], []
    for t in reversed(range(reward.shape[1])):
        mix = (1 - lam[:, t]) * value[:, t] + lam[:, t] * ret
        ret = reward[:, t] + discount[:, t] * mix
        rets.append(ret)
    return torch.stack(rets[::-1], 1)  # (N, T)


def _check_shapes(reward: Tensor, discount: Tensor, value: Tensor, lam: Tensor) -> None:
    if reward.ndim != 2 or discount.shape != reward.shape or value.shape != reward.shape:
        raise ValueError(
            "lambda_return: reward, discount and value must all be (N, T), got "
            f"{tuple(reward.shape)}, {tuple(discount.shape)}, {tuple(value.shape)}"
        )
    trailing = zip(lam.shape[::-1], reward.shape[::-1], strict=False)
    if lam.ndim > 2 or any(a != 1 and a != b for a, b in trailing):
        raise ValueError(
            f"lambda_return: lam of shape {tuple(lam.shape)} does not broadcast to "
            f"{tuple(reward.shape)}"
        )


def _check(reward: Tensor, discount: Tensor, value: Tensor, lam: Tensor) -> None:
    _check_shapes(reward, discount, value, lam)
    for x in (reward, discount, value, lam):
        if x.dtype != reward.dtype or x.dtype not in library.DTYPES:
            dtypes = [str(y.dtype) for y in (reward, discount, value, lam)]
            raise TypeError(f"lambda_return: all float32 or all float64, got {', '.join(dtypes)}")
        if x.device != reward.device:
            raise ValueError(f"lambda_return: inputs on {reward.device} and {x.device}")


def _cpu(reward: Tensor, discount: Tensor, value: Tensor, lam: Tensor) -> Tensor:
    _check(reward, discount, value, lam)
    ret = reward.new_empty(reward.shape)
    library.function("fd_lambda_return", FWD_SIGNATURE)(
        *library.matrix(reward),
        *library.matrix(discount),
        *library.matrix(value),
        *library.matrix(lam.expand_as(reward)),
        ret.data_ptr(),
        *reward.shape,
        library.DTYPES[reward.dtype],
        None,
    )
    return ret


def _fake(reward: Tensor, discount: Tensor, value: Tensor, lam: Tensor) -> Tensor:
    _check(reward, discount, value, lam)
    return reward.new_empty(reward.shape)


def _cpu_backward(
    dret: Tensor, discount: Tensor, value: Tensor, lam: Tensor, ret: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _fake_backward(dret, discount, value, lam, ret)
    library.function("fd_lambda_return_backward", BWD_SIGNATURE)(
        *library.matrix(dret),
        *library.matrix(discount),
        *library.matrix(value),
        *library.matrix(lam.expand_as(dret)),
        *library.matrix(ret),
        *(grad.data_ptr() for grad in grads),
        *dret.shape,
        library.DTYPES[dret.dtype],
        None,
    )
    return grads


def _fake_backward(
    dret: Tensor, discount: Tensor, value: Tensor, lam: Tensor, ret: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(dret, discount, value, lam)
    _check(ret, discount, value, lam)
    dreward, ddiscount, dvalue, dlam = (dret.new_empty(dret.shape) for _ in range(4))
    return dreward, ddiscount, dvalue, dlam


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _reward, discount, value, lam = inputs
    ctx.save_for_backward(discount, value, lam, output)


def _backward(ctx: Any, dret: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    discount, value, lam, ret = ctx.saved_tensors
    dreward, ddiscount, dvalue, dlam = torch.ops.fastdreamer.lambda_return_backward(
        dret, discount, value, lam, ret
    )
    return dreward, ddiscount, dvalue, dlam.sum_to_size(lam.shape)


register("lambda_return", SCHEMA, _cpu, _fake, (_setup_context, _backward))
register("lambda_return_backward", BACKWARD_SCHEMA, _cpu_backward, _fake_backward)
