"""Layers of the networks: initialisers, dense and convolutional blocks, encoder and decoder.

Every hidden block is Linear or Conv without bias -> LayerNorm -> SiLU; every output layer has a
bias. Images enter as (..., H, W, C) uint8 and leave as (..., H, W, C) predictions of x/255 - 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from torch import Tensor, nn

from fastdreamer.kernels.twohot import symlog

Init = Literal["normal", "uniform", "zero"]
NORM_EPS = 1e-3
_TRUNC_STD = 0.87962566103423978  # standard deviation of a unit normal cut at +-2


def initialise(weight: Tensor, fan: float, init: Init = "normal") -> Tensor:
    """Fill ``weight`` in place: fan-average truncated normal, uniform, or zeros.

    ``fan`` is the mean of fan-in and fan-out; "normal" and "uniform" both have variance 1/fan.
    Source: DreamerV3 v1 (appendix) as its code has it: its "xavier normal" is truncated at two
    standard deviations and rescaled.
    """
    if init == "normal":
        std = math.sqrt(1 / fan) / _TRUNC_STD
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if init == "uniform":
        limit = math.sqrt(3 / fan)
        return nn.init.uniform_(weight, -limit, limit)
    return nn.init.zeros_(weight)


class Linear(nn.Linear):
    """Linear layer with the paper's initialisation; (..., I) -> (..., O)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, init: Init = "normal"):
        super().__init__(inputs, outputs, bias)
        initialise(self.weight.data, (inputs + outputs) / 2, init)
        if bias:
            nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, or over the channels of a channels-last image."""

    def __init__(self, size: int):
        super().__init__(size, eps=NORM_EPS)


class Dense(nn.Module):
    """Hidden block Linear -> LayerNorm -> SiLU; (..., I) -> (..., O)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = Linear(inputs, outputs, bias=False)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.linear(x))

    def activate(self, x: Tensor) -> Tensor:
        """Norm and activation of a product that was computed elsewhere."""
        return F.silu(self.norm(x))


class MLP(nn.Module):
    """``layers`` hidden blocks of ``units`` and an optional output layer of ``outputs``."""

    def __init__(
        self, inputs: int, units: int, layers: int, outputs: int = 0, init: Init = "normal"
    ):
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.hidden = nn.Sequential(*(Dense(i, o) for i, o in pairwise(sizes)))
        self.out = Linear(sizes[-1], outputs, init=init) if outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


class ConvBlock(nn.Module):
    """4x4 convolution of stride 2 (or its transpose), then channel norm and SiLU unless last.

    (N, C, H, W) -> (N, C', H/2, W/2), or (N, C', 2H, 2W) if ``up``; channels-last in memory.
    """

    def __init__(self, inputs: int, outputs: int, up: bool = False, last: bool = False):
        super().__init__()
        make = nn.ConvTranspose2d if up else nn.Conv2d
        self.conv = make(inputs, outputs, 4, stride=2, padding=1, bias=last)
        initialise(self.conv.weight.data, (inputs + outputs) / 2 * 16)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = None if last else LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is None:
            return x
        return F.silu(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def split_keys(obs_space: Mapping[str, Box]) -> tuple[list[str], list[str]]:
    """Sorted names of the image (rank 3) and of the vector (rank 1) observations.

    Raises ValueError for any other rank, and for images that are not square, of different sizes,
    or whose size is not 4 times a power of two from 16 on.
    """
    images = sorted(k for k, s in obs_space.items() if len(s.shape) == 3)
    vectors = sorted(k for k, s in obs_space.items() if len(s.shape) == 1)
    other = set(obs_space) - {*images, *vectors}
    if other or not obs_space:
        raise ValueError(
            f"observations must be (H, W, C) or (D,): {sorted(other) or 'there are none'}"
        )
    sizes = {obs_space[k].shape[:2] for k in images}
    for height, width in sizes:
        stages = math.log2(height / 4)
        if len(sizes) > 1 or height != width or stages < 2 or stages % 1:
            raise ValueError(
                f"images must share one square size of 16, 32, 64 or 128 pixels: {sorted(sizes)}"
            )
    return images, vectors


def _stages(obs_space: Mapping[str, Box], images: Sequence[str]) -> int:
    return int(math.log2(obs_space[images[0]].shape[0] / 4)) if images else 0


class Encoder(nn.Module):
    """Observations {key: (..., shape)} -> embedding (..., E): image features (C, H, W), vectors."""

    def __init__(self, obs_space: Mapping[str, Box], depth: int, units: int, layers: int):
        super().__init__()
        self.images, self.vectors = split_keys(obs_space)
        self.outputs = 0
        if self.images:
            channels = sum(obs_space[k].shape[2] for k in self.images)
            sizes = [channels] + [depth * 2**i for i in range(_stages(obs_space, self.images))]
            self.cnn = nn.Sequential(*(ConvBlock(i, o) for i, o in pairwise(sizes)))
            self.outputs += 16 * sizes[-1]
        if self.vectors:
            self.mlp = MLP(sum(obs_space[k].shape[0] for k in self.vectors), units, layers)
            self.outputs += units

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        parts, dtype = [], next(self.parameters()).dtype
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1)  # (..., H, W, C)
            lead = x.shape[:-3]
            x = x.flatten(0, -4).to(dtype) / 255 - 0.5
            parts.append(self.cnn(x.permute(0, 3, 1, 2)).reshape(*lead, -1))
        if self.vectors:
            x = torch.cat([symlog(obs[k].to(dtype)) for k in self.vectors], -1)
            parts.append(self.mlp(x))
        return torch.cat(parts, -1)


class Decoder(nn.Module):
    """Features (..., F) -> images (..., H, W, C) of x/255 - 0.5 and symlog vectors (..., D)."""

    def __init__(
        self, feat: int, obs_space: Mapping[str, Box], depth: int, units: int, layers: int
    ):
        super().__init__()
        self.images, self.vectors = split_keys(obs_space)
        if self.images:
            self.channels = [obs_space[k].shape[2] for k in self.images]
            stages = _stages(obs_space, self.images)
            sizes = [depth * 2**i for i in reversed(range(stages))] + [sum(self.channels)]
            self.linear = Linear(feat, 16 * sizes[0], init="uniform")
            self.cnn = nn.Sequential(
                *(
                    ConvBlock(i, o, up=True, last=n == stages - 1)
                    for n, (i, o) in enumerate(pairwise(sizes))
                )
            )
        if self.vectors:
            self.mlp = MLP(feat, units, layers)
            self.heads = nn.ModuleDict(
                {k: Linear(units, obs_space[k].shape[0], init="uniform") for k in self.vectors}
            )

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        recon: dict[str, Tensor] = {}
        if self.images:
            x = self.linear(feat).reshape(-1, self.linear.out_features // 16, 4, 4)
            x = self.cnn(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
            parts = x.unflatten(0, feat.shape[:-1]).split(self.channels, -1)
            recon.update(zip(self.images, parts, strict=True))
        if self.vectors:
            x = self.mlp(feat)
            recon.update((k, self.heads[k](x)) for k in self.vectors)
        return recon
