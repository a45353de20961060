"""Columns of the replay: what a row holds, and how rows become bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Column:
    """One field of a row."""

    shape: tuple[int, ...]
    """Shape of one row; () for a scalar, (H, W, C) for an image."""
    dtype: torch.dtype
    """Stored and returned as is: torch.uint8 for images."""
    mutable: bool = False
    """Rewritten by `Replay.write`, such as latents; saved whole instead of in segments."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def describe(self) -> dict[str, Any]:
        """The column in JSON types."""
        return {"shape": list(self.shape), "dtype": str(self.dtype), "mutable": self.mutable}


def check_columns(columns: Mapping[str, Column]) -> None:
    """ValueError for names, shapes or dtypes that a replay cannot store."""
    if not columns or "step_id" in columns:
        raise ValueError("columns must name at least one column, and none may be called 'step_id'")
    for name, column in columns.items():
        if not isinstance(column.dtype, torch.dtype):
            raise ValueError(f"column {name!r} expects a torch.dtype, got {column.dtype!r}")
        if any(size < 1 for size in column.shape):
            raise ValueError(f"column {name!r} expects positive sizes, got {column.shape}")


def allocate_storage(rows: int, row_bytes: int, pinned: bool) -> NDArray[np.uint8]:
    """Uninitialised uint8 (rows, row_bytes); unless pinned, pages appear on first use."""
    if pinned:
        return torch.empty((rows, row_bytes), dtype=torch.uint8, pin_memory=True).numpy()
    return np.empty((rows, row_bytes), np.uint8)


def allocate_batch(columns: Mapping[str, Column], lead: tuple[int, int], pin_memory: bool) -> Batch:
    """Uninitialised host tensors (B, T, *shape) of every column, and `step_id`, int64 (B, T)."""
    batch = {
        n: torch.empty(lead + c.shape, dtype=c.dtype, pin_memory=pin_memory)
        for n, c in columns.items()
    }
    batch["step_id"] = torch.empty(lead, dtype=torch.int64, pin_memory=pin_memory)
    return batch


def check_batch(columns: Mapping[str, Column], batch: Batch, lead: tuple[int, int]) -> None:
    """ValueError unless the batch is like `allocate_batch(columns, lead)`."""
    expected = {n: (c.shape, c.dtype) for n, c in columns.items()} | {"step_id": ((), torch.int64)}
    if batch.keys() != expected.keys():
        raise ValueError(f"a batch holds {sorted(expected)}, got {sorted(batch)}")
    for name, (shape, dtype) in expected.items():
        want, tensor = lead + shape, batch[name]
        if tuple(tensor.shape) != want or tensor.dtype != dtype:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"batch {name!r} must be {dtype} {want}, got {found}")
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"batch {name!r} must be contiguous and on the CPU")


@cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The equivalent NumPy dtype, None for those NumPy lacks (bfloat16)."""
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None


def tensor_bytes(column: Column, tensor: Tensor) -> NDArray[np.uint8]:
    """A contiguous host tensor's memory as uint8 (rows, row bytes)."""
    return tensor.view(-1, math.prod(column.shape)).view(torch.uint8).numpy()


def value_bytes(
    name: str, column: Column, value: Array | Tensor, lead: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Values of a column, (*lead, *shape), as uint8 (rows, row bytes).

    Raises:
        ValueError: for another shape or dtype; nothing is converted silently.
    """
    if not isinstance(value, Tensor):
        value = np.asarray(value)
    dtype = column.dtype if isinstance(value, Tensor) else numpy_dtype(column.dtype)
    want = lead + column.shape
    # dtype None is checked apart: NumPy takes it for float64.
    if tuple(value.shape) != want or dtype is None or value.dtype != dtype:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"column {name!r} expects {column.dtype} {want}, got {found}")
    if isinstance(value, Tensor):
        return tensor_bytes(column, value.detach().cpu().contiguous())
    flat = np.ascontiguousarray(value).reshape(-1, math.prod(column.shape))
    return flat.view(np.uint8)
