"""What the golden tests of both recipes share: array files, tolerances, comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Relative to the largest entry of an array, except ``param``, which is absolute."""

    forward: float
    loss: float
    grad: float
    param: float


TOLERANCES = {
    torch.float32: Tolerance(forward=1e-5, loss=1e-5, grad=1e-4, param=2e-6),
    torch.float64: Tolerance(forward=1e-9, loss=1e-9, grad=1e-7, param=1e-9),
}


def close(ours: Tensor, golden: Tensor, rel: float, what: str = "") -> None:
    """Largest difference, relative to the largest golden entry."""
    assert ours.shape == golden.shape, (what, ours.shape, golden.shape)
    ours, golden = ours.detach().double(), golden.double()
    scale = golden.abs().max().clamp(min=1e-30)
    error = ((ours - golden).abs().max() / scale).item()
    assert error <= rel, f"{what}: off by {error:.2e} of the largest entry, allowed {rel:.0e}"


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


class Arrays:
    """One npz file; arrays come as tensors on the default device, floating ones in ``dtype``."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.npz, self.dtype = np.load(path), dtype

    def __getitem__(self, key: str) -> Tensor:
        value = torch.from_numpy(self.npz[key]).to(torch.get_default_device())
        return value.to(self.dtype) if value.is_floating_point() else value

    def __contains__(self, key: str) -> bool:
        return key in self.npz.files

    def keys(self, prefix: str) -> list[str]:
        """Names below ``prefix``, without it."""
        return [k[len(prefix) :] for k in self.npz.files if k.startswith(prefix)]
