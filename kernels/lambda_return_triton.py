# mypy: disable-error-code=no-untyped-def
"""Lambda returns in Triton: an associative scan over time, BLOCK_N rows at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lambda_return import _fake, _fake_backward
from .launch import launch
from .register import serve

TILE = 128  # elements of a program's block
LONGEST = 64  # steps of a block; longer rows go block by block


@triton.jit
def follow(a0, b0, a1, b1):
    """x -> b0 + a0 x, then x -> b1 + a1 x."""
    return a0 * a1, b1 + a1 * b0


# ret[t] = b[t] + a[t] ret[t + 1], a = discount lam, b = reward + discount (1 - lam) value
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
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    later = tl.load(value_ptr + row * value_n + (T - 1) * value_t, row < N, other=0)
    n = row[:, None]
    for block in range(tl.cdiv(T, BLOCK_T)):
        first = (tl.cdiv(T, BLOCK_T) - 1 - block) * BLOCK_T
        t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
        inside = (n < N) & (t < T)
        reward = tl.load(reward_ptr + n * reward_n + t * reward_t, inside, other=0)
        discount = tl.load(discount_ptr + n * discount_n + t * discount_t, inside, other=0)
        value = tl.load(value_ptr + n * value_n + t * value_t, inside, other=0)
        lam = tl.load(lam_ptr + n * lam_n + t * lam_t, inside, other=0)
        a = tl.where(t < T, discount * lam, 1)  # beyond T the return stays
        a, b = tl.associative_scan((a, reward + discount * (1 - lam) * value), 1, follow, True)
        ret = b + a * later[:, None]
        tl.store(ret_ptr + n * T + t, ret, inside)
        later = tl.sum(tl.where(t == first, ret, 0), 1)


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
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    earlier = tl.zeros([BLOCK_N], dret_ptr.dtype.element_ty)
    for block in range(tl.cdiv(T, BLOCK_T)):
        first = block * BLOCK_T
        t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
        inside = (n < N) & (t < T)
        before, last = inside & (t > 0), t == T - 1
        discount_at = discount_ptr + n * discount_n + t * discount_t
        lam_at = lam_ptr + n * lam_n + t * lam_t
        a = tl.load(discount_at - discount_t, before, other=0)
        a *= tl.load(lam_at - lam_t, before, other=0)
        dret = tl.load(dret_ptr + n * dret_n + t * dret_t, inside, other=0)
        discount, lam = tl.load(discount_at, inside, other=0), tl.load(lam_at, inside, other=0)
        value = tl.load(value_ptr + n * value_n + t * value_t, inside, other=0)
        after = tl.load(ret_ptr + n * ret_n + (t + 1) * ret_t, inside & (t + 1 < T), other=0)
        after = tl.where(last, value, after)
        a, b = tl.associative_scan((a, dret), 1, follow)
        g = b + a * earlier[:, None]
        earlier = tl.sum(tl.where(t == first + BLOCK_T - 1, g, 0), 1)
        gd, at = g * discount, n * T + t
        tl.store(dreward_ptr + at, g, inside)
        tl.store(ddiscount_ptr + at, g * ((1 - lam) * value + lam * after), inside)
        tl.store(dvalue_ptr + at, tl.where(last, gd, gd * (1 - lam)), inside)
        tl.store(dlam_ptr + at, gd * (after - value), inside)


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
    steps = min(triton.next_power_of_2(T), LONGEST)
    rows = TILE // steps
    strides = (stride for x in inputs for stride in x.stride())
    launch(
        kernel,
        (triton.cdiv(N, rows),),
        *inputs,
        *outputs,
        *strides,
        N,
        T,
        num_warps=1,
        BLOCK_N=rows,
        BLOCK_T=steps,
    )


def presets() -> None:
    """The launches of a learner: imagined and replayed returns."""
    for shape in ((1024, 15), (16, 64)):
        for dtype in (torch.float32, torch.float64):
            x = torch.empty(shape, dtype=dtype, device="meta")
            lambda_return(x, x, x, x)
            lambda_return_backward(x, x, x, x, x)


serve("lambda_return", lambda_return)
serve("lambda_return_backward", lambda_return_backward)
