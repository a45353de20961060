# mypy: disable-error-code=no-untyped-def
"""`latent_linear` on a GPU: rows of the weight where they cost less than the product, or it.

In bfloat16 or TF32 the product's tensor cores win at every size. In float32 a row of N takes
2 S K O operations in the product (some 50 TFLOP/s on an H100), and reads 4 S O bytes of the
transposed weight by rows, from the L2 cache (some 5 TB/s): from 20 classes on the rows take less,
and from 32 on enough to pay for the transposition with a few hundred of N. The gradient adds as
many bytes and a sort of N S indices, some 60 us. These are calculations, not yet measurements.

Legend: N rows, S stoch, K classes, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .latent_linear import _fake, _fake_backward, _parts
from .launch import launch
from .register import serve

FEWEST_CLASSES, FEWEST_ROWS = 32, 256
FEWEST_CLASSES_BACKWARD, FEWEST_ROWS_BACKWARD = 64, 1024


@triton.jit(do_not_specialize=["rows"])
def latent_gather_kernel(
    index_ptr,  # (N, S)
    table_ptr,  # (S K, O)
    y_ptr,  # (N, O)
    rows,
    S,
    K,
    outputs,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # y[n] += sum over s of table[s K + index[n, s]]
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    at, inside = n[:, None] * outputs + col, (n[:, None] < rows) & (col < outputs)
    y = tl.load(y_ptr + at, inside, 0.0)
    for s in range(S):
        k = tl.load(index_ptr + n * S + s, n < rows, -1)
        drawn = ((k >= 0) & (k < K))[:, None]
        row = (s * K + k).to(tl.int64)[:, None]
        y += tl.load(table_ptr + row * outputs + col, drawn & (col < outputs), 0.0)
    tl.store(y_ptr + at, y, inside)


@triton.jit
def latent_scatter_kernel(
    order_ptr,  # (N S,) places in the index, by class
    start_ptr,  # (S K + 1,) where each class begins in the order
    dy_ptr,  # (N, O)
    dtable_ptr,  # (S K, O)
    S,
    outputs,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # dtable[s K + k] = sum of dy[n] over the n that drew k, always in the same order
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    start, end = tl.load(start_ptr + row).to(tl.int32), tl.load(start_ptr + row + 1).to(tl.int32)
    sums = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for first in range(start, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        n = tl.load(order_ptr + place, place < end, 0) // S
        inside = (place < end)[:, None] & (col < outputs)[None, :]
        sums += tl.load(dy_ptr + n[:, None] * outputs + col[None, :], inside, 0.0)
    tl.store(dtable_ptr + row * outputs + col, tl.sum(sums, 0), col < outputs)


def gather(index: Tensor, table: Tensor, classes: int, y: Tensor) -> None:
    """Add to y (N, O) the rows of the table (S K, O) that the index (N, S) names."""
    (rows, latents), outputs = index.shape, table.shape[1]
    block = _block(outputs)
    grid = (triton.cdiv(rows, block["BLOCK_N"]), triton.cdiv(outputs, block["BLOCK_O"]))
    launch(latent_gather_kernel, grid, index, table, y, rows, latents, classes, outputs, **block)


def scatter(order: Tensor, starts: Tensor, dy: Tensor, latents: int, dtable: Tensor) -> None:
    """The gradient of a table (S K, O) from dy (N, O) and the places that drew each of its rows."""
    (table, outputs), block = dtable.shape, _block(dy.shape[1])
    grid = (table, triton.cdiv(outputs, block["BLOCK_O"]))
    launch(latent_scatter_kernel, grid, order, starts, dy, dtable, latents, outputs, **block)


def _block(outputs: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(outputs), 128)
    return {"BLOCK_N": 1024 // block, "BLOCK_O": block}


def by_class(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Places of the index (N, S) sorted by latent and class, and where each of the S K begins."""
    latents = index.shape[1]
    first = torch.arange(0, latents * classes, classes, dtype=torch.int32, device=index.device)
    drawn = (index >= 0) & (index < classes)
    keys = torch.where(drawn, first + index, latents * classes).flatten()
    keys, order = keys.sort(stable=True)
    table = torch.arange(latents * classes + 1, dtype=torch.int32, device=index.device)
    return order, torch.searchsorted(keys, table)


def _exact() -> bool:
    """Products of float32 matrices are computed in float32, not in TF32."""
    return torch.get_float32_matmul_precision() == "highest"


def latent_linear_triton(
    feat: Tensor, index: Tensor, weight: Tensor, start: int, classes: int
) -> Tensor:
    y = _fake(feat, index, weight, start, classes)
    if not _exact() or classes < FEWEST_CLASSES or len(feat) < FEWEST_ROWS:
        return F.linear(feat, weight)
    latent = index.shape[1] * classes
    deter, _ = _parts(feat, start, latent)
    by_deter, by_latent = _parts(weight, start, latent)
    torch.mm(deter, by_deter.t(), out=y)
    gather(index.contiguous(), by_latent.t().contiguous(), classes, y)
    return y


def latent_linear_backward_triton(
    dy: Tensor, feat: Tensor, index: Tensor, start: int, classes: int
) -> Tensor:
    if not _exact() or classes < FEWEST_CLASSES_BACKWARD or len(feat) < FEWEST_ROWS_BACKWARD:
        return dy.t() @ feat
    dweight = _fake_backward(dy, feat, index, start, classes)
    latent = index.shape[1] * classes
    deter, _ = _parts(feat, start, latent)
    by_deter, by_latent = _parts(dweight, start, latent)
    by_deter.copy_(dy.t() @ deter)
    dtable = dy.new_empty(latent, dy.shape[1])
    scatter(*by_class(index, classes), dy.contiguous(), index.shape[1], dtable)
    by_latent.copy_(dtable.t())
    return dweight


def presets() -> None:
    """The heads on imagined states of the sizes that have enough classes."""
    for classes, outputs in ((32, 256), (32, 512), (64, 1024), (96, 1536)):
        rows, table = 16384, 32 * classes
        y = torch.empty(rows, outputs, device="meta")
        index = torch.empty(rows, 32, dtype=torch.int32, device="meta")
        order = torch.empty(rows * 32, dtype=torch.int64, device="meta")
        weight = torch.empty(table, outputs, device="meta")
        gather(index, weight, classes, y)
        scatter(order, order[: table + 1], y, 32, weight)


serve("latent_linear", latent_linear_triton)
serve("latent_linear_backward", latent_linear_backward_triton)
