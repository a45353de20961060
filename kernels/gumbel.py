"""Gumbel noise, which makes a draw from log-probabilities the largest of their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .register import register

SCHEMA = "(Tensor seed, int[] shape) -> Tensor"
SIGNATURE = library.SIZE + library.OUTPUT + library.SIZE + library.DTYPE_AND_STREAM


def gumbel(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise on the generator's device."""
    noise = torch.rand(tuple(shape), generator=generator, dtype=dtype, device=generator.device)
    return noise.log_().neg_().log_().neg_()  # a 0 becomes -inf: that class is not drawn


def gumbel_cpp(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`gumbel` by the C++ library for float32: other numbers, the same for any number of threads.

    PyTorch draws its own one after the other; here the generator gives the seed alone, so that its
    state is still the only one.
    """
    if dtype != torch.float32:
        return gumbel(shape, generator, dtype)
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return torch.ops.fastdreamer.gumbel(seed, list(shape))


def _fake(seed: Tensor, shape: Sequence[int]) -> Tensor:
    if seed.shape != () or seed.dtype != torch.int64:
        raise ValueError(f"gumbel: seed must be one int64, got {seed.dtype} {tuple(seed.shape)}")
    return seed.new_empty(shape, dtype=torch.float32)


def _cpu(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """-log(-log u) of the numbers of Philox4x32-10 (Salmon et al., 2011) for the key ``seed``."""
    noise = _fake(seed, shape)
    library.function("fd_gumbel", SIGNATURE)(
        int(seed), noise.data_ptr(), noise.numel(), library.DTYPES[noise.dtype], None
    )
    return noise


register("gumbel", SCHEMA, _cpu, _fake)
