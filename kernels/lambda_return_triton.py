# mypy: disable-error-code=no-untyped-def
"""Lambda returns in Triton: a thread goes through the time of its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lambda_return import _fake, _fake_backward
from .launch import launch
from .register import serve

ROWS = 32  # of a program, which is one warp


# ret[t] = reward[t] + discount[t] ((1 - lam[t]) value[t] + lam[t] ret[t + 1]),
# ret[T] = value[T - 1]
@triton.jit
def lambda_return_fwd_kernel(
    reward_ptr,
    discount_ptr,
    value_ptr,
    lam_ptr,
    ret_ptr,
    reward_n,
    reward_t,
    discount_n,
    discount_t,
    value_n,
    value_t,
    lam_n,
    lam_t,
    N,
    T,
    ROWS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = tl.zeros([ROWS], tl.int64) + (T - 1)
    ret = tl.load(value_ptr + n * value_n + t * value_t, n < N)
    for _ in range(T):
        reward = tl.load(reward_ptr + n * reward_n + t * reward_t, n < N)
        discount = tl.load(discount_ptr + n * discount_n + t * discount_t, n < N)
        value = tl.load(value_ptr + n * value_n + t * value_t, n < N)
        lam = tl.load(lam_ptr + n * lam_n + t * lam_t, n < N)
        ret = reward + discount * ((1 - lam) * value + lam * ret)
        tl.store(ret_ptr + n * T + t, ret, n < N)
        t -= 1


# G[t] = dret[t] + discount[t - 1] lam[t - 1] G[t - 1] is the whole gradient of ret[t]; then
#   dreward = G               ddiscount = G ((1 - lam) value + lam ret[t + 1])
#   dvalue = G discount (1 - lam)        dlam = G discount (ret[t + 1] - value)
# and value[T - 1] also receives what reaches ret[T].
@triton.jit
def lambda_return_bwd_kernel(
    dret_ptr,
    discount_ptr,
    value_ptr,
    lam_ptr,
    ret_ptr,
    dreward_ptr,
    ddiscount_ptr,
    dvalue_ptr,
    dlam_ptr,
    dret_n,
    dret_t,
    discount_n,
    discount_t,
    value_n,
    value_t,
    lam_n,
    lam_t,
    ret_n,
    ret_t,
    N,
    T,
    ROWS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = tl.zeros([ROWS], tl.int64)
    carried = tl.zeros([ROWS], dret_ptr.dtype.element_ty)
    for _ in range(T):
        at, inside = n * T + t, n < N
        g = tl.load(dret_ptr + n * dret_n + t * dret_t, inside) + carried
        discount = tl.load(discount_ptr + n * discount_n + t * discount_t, inside)
        value = tl.load(value_ptr + n * value_n + t * value_t, inside)
        lam = tl.load(lam_ptr + n * lam_n + t * lam_t, inside)
        last = t == T - 1
        later = tl.load(ret_ptr + n * ret_n + (t + 1) * ret_t, inside & (t + 1 < T))
        later = tl.where(last, value, later)
        gd = g * discount
        carried = gd * lam
        dvalue = gd * (1 - lam)
        tl.store(dreward_ptr + at, g, inside)
        tl.store(ddiscount_ptr + at, g * ((1 - lam) * value + lam * later), inside)
        tl.store(dvalue_ptr + at, tl.where(last, dvalue + carried, dvalue), inside)
        tl.store(dlam_ptr + at, gd * (later - value), inside)
        t += 1


def lambda_return(reward: Tensor, discount: Tensor, value: Tensor, lam: Tensor) -> Tensor:
    ret = _fake(reward, discount, value, lam)
    matrices = (reward, discount, value, lam.expand_as(reward))
    _launch(lambda_return_fwd_kernel, matrices, (ret,))
    return ret


def lambda_return_backward(
    dret: Tensor, discount: Tensor, value: Tensor, lam: Tensor, ret: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _fake_backward(dret, discount, value, lam, ret)
    matrices = (dret, discount, value, lam.expand_as(dret), ret)
    _launch(lambda_return_bwd_kernel, matrices, grads)
    return grads


def _launch(
    kernel: triton.JITFunction, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
) -> None:
    N, T = inputs[0].shape
    if T == 0:
        return
    strides = (stride for x in inputs for stride in x.stride())
    grid = (triton.cdiv(N, ROWS),)
    launch(kernel, grid, *inputs, *outputs, *strides, N, T, num_warps=1, ROWS=ROWS)


def presets() -> None:
    """The launches of a learner: imagined and replayed returns."""
    for shape in ((1024, 15), (16, 64)):
        for dtype in (torch.float32, torch.float64):
            x = torch.empty(shape, dtype=dtype, device="meta")
            lambda_return(x, x, x, x)
            lambda_return_backward(x, x, x, x, x)


serve("lambda_return", lambda_return)
serve("lambda_return_backward", lambda_return_backward)
