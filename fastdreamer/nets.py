"""Layers of the networks: initialisers, dense and convolutional blocks, encoder and decoder.

A hidden block is Linear or Conv -> norm -> SiLU. Images enter as (..., H, W, C) uint8 and are
predicted as (..., H, W, C) x/255 - shift; vectors are squashed by symlog on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from fastdreamer.config import ModelConfig
from fastdreamer.kernels.gru_step import block_linear
from fastdreamer.kernels.ops import Ops
from fastdreamer.kernels.rssm_weights import Layer
from fastdreamer.kernels.twohot import symlog
from fastdreamer.recipe import Recipe

Init = Literal["normal", "uniform", "zero"]
_TRUNC_STD = 0.87962566103423978  # standard deviation of a unit normal cut at +-2


def initialise(
    weight: Tensor, inputs: float, outputs: float, recipe: Recipe, init: Init = "normal"
) -> Tensor:
    """Fill ``weight`` in place with a truncated normal, a uniform, or zeros.

    Both distributions have variance 1/fan; fan is ``inputs``, or its mean with ``outputs``. The
    normal is cut at two standard deviations. Source: DreamerV3 (appendix) as its code has it.
    """
    fan = inputs if recipe.fan == "in" else (inputs + outputs) / 2
    if init == "normal":
        std = math.sqrt(1 / fan) / _TRUNC_STD
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if init == "uniform":
        limit = math.sqrt(3 / fan)
        return nn.init.uniform_(weight, -limit, limit)
    return nn.init.zeros_(weight)


def output_init(recipe: Recipe) -> Init:
    """How output layers without a rule of their own start."""
    return "uniform" if recipe.uniform_outputs else "normal"


def full(x: Tensor) -> Tensor:
    """What a product of mixed precision left in bfloat16, in float32; anything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def join(parts: Sequence[Tensor]) -> Tensor:
    """(..., C) each -> (..., sum of C); one alone as it is, where ``torch.cat`` would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def divide(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The inverse of `join`, also without a copy of its gradient where there is one part."""
    return [x] if len(sizes) == 1 else x.split(list(sizes), -1)


class Linear(nn.Linear):
    """Linear layer with the paper's initialisation; (..., I) -> (..., O)."""

    def __init__(
        self, inputs: int, outputs: int, recipe: Recipe, bias: bool = True, init: Init = "normal"
    ):
        super().__init__(inputs, outputs, bias)
        initialise(self.weight.data, inputs, outputs, recipe, init)
        if bias:
            nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """G products side by side over G contiguous parts of the input; (..., I) -> (..., O)."""

    def __init__(self, inputs: int, outputs: int, blocks: int, recipe: Recipe):
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"{inputs} inputs and {outputs} outputs must divide by {blocks}")
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        initialise(self.weight.data, inputs, outputs, recipe)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.weight.shape[0], -1))
        return block_linear(x, self.weight).flatten(-2) + self.bias


def make_norm(size: int, recipe: Recipe) -> nn.LayerNorm | nn.RMSNorm:
    """The recipe's norm over the last axis (the channels of a channels-last image)."""
    if recipe.norm == "layer":
        return nn.LayerNorm(size, eps=1e-3)
    return nn.RMSNorm(size, eps=1e-4)


def activate(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm, ops: Ops) -> Tensor:
    """SiLU of the norm over the last axis, as one operator; (..., C) -> (..., C)."""
    if isinstance(norm, nn.LayerNorm):
        return ops.norm_act(x, norm.weight, norm.bias, "layer", norm.eps)
    return ops.norm_act(x, norm.weight, None, "rms", norm.eps)


class Dense(nn.Module):
    """Hidden block Linear -> norm -> SiLU; (..., I) -> (..., O)."""

    def __init__(self, inputs: int, outputs: int, recipe: Recipe, ops: Ops):
        super().__init__()
        self.linear = Linear(inputs, outputs, recipe, bias=recipe.norm == "rms")
        self.norm, self.ops = make_norm(outputs, recipe), ops

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.linear(x), self.norm, self.ops)

    def weights(self) -> Layer:
        """As the kernels take them."""
        shift = getattr(self.norm, "bias", None)
        return Layer(self.linear.weight, self.linear.bias, self.norm.weight, shift)


class MLP(nn.Module):
    """``layers`` hidden blocks of ``units`` and an optional output layer of ``outputs``."""

    def __init__(
        self,
        inputs: int,
        units: int,
        layers: int,
        recipe: Recipe,
        ops: Ops,
        outputs: int = 0,
        init: Init = "normal",
    ):
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.hidden = nn.Sequential(*(Dense(i, o, recipe, ops) for i, o in pairwise(sizes)))
        self.out = Linear(sizes[-1], outputs, recipe, init=init) if outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return full(self.out(self.hidden(x)))

    def weights(self) -> tuple[Layer, ...]:
        """As the kernels take them, the output layer last if there is one."""
        hidden = tuple(cast(Dense, block).weights() for block in self.hidden)
        if isinstance(self.out, nn.Identity):
            return hidden
        return (*hidden, Layer(self.out.weight, self.out.bias))

    @property
    def eps(self) -> float:
        """Of its norms."""
        eps = cast(Dense, self.hidden[0]).norm.eps
        assert eps is not None
        return eps


class ConvBlock(nn.Module):
    """Convolution that halves or (``up``) doubles the size, then channel norm and SiLU.

    (N, H, W, C) -> (N, H/2, W/2, C') or (N, 2H, 2W, C'). "stride" is one 4x4 convolution of
    stride 2 or its transpose; "pool" a 5x5 one, then 2x2 max pooling, or nearest upsampling before
    it. The last one has a bias and neither norm nor activation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        recipe: Recipe,
        ops: Ops,
        up: bool = False,
        last: bool = False,
    ):
        super().__init__()
        self.ops = ops
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        kinds = {"pool": ("pool", "upsample"), "stride": ("stride", "transpose")}
        self.kind, self.norm_kind = kinds[recipe.conv][up], recipe.norm
        bias = last or recipe.norm == "rms"
        if recipe.conv == "pool":
            self.conv = nn.Conv2d(inputs, outputs, 5, padding=2, bias=bias)
        else:
            make = nn.ConvTranspose2d if up else nn.Conv2d
            self.conv = make(inputs, outputs, 4, stride=2, padding=1, bias=bias)
        area = math.prod(self.conv.kernel_size)
        initialise(self.conv.weight.data, inputs * area, outputs * area, recipe)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = None if last else make_norm(outputs, recipe)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
        eps = 0.0 if norm is None else norm.eps
        return self.ops.conv_norm_act(
            x, conv.weight, conv.bias, scale, shift, self.kind, self.norm_kind, eps
        )


def split_keys(obs_space: Mapping[str, Box]) -> tuple[list[str], list[str]]:
    """Sorted names of the image (rank 3) and of the vector (rank 1) observations.

    Raises ValueError for any other rank, and for images of different sizes.
    """
    images = sorted(k for k, s in obs_space.items() if len(s.shape) == 3)
    vectors = sorted(k for k, s in obs_space.items() if len(s.shape) == 1)
    other = set(obs_space) - {*images, *vectors}
    if other or not obs_space:
        raise ValueError(
            f"observations must be (H, W, C) or (D,): {sorted(other) or 'there are none'}"
        )
    sizes = {obs_space[k].shape[:2] for k in images}
    if len(sizes) > 1:
        raise ValueError(f"images must share one size, not {sorted(sizes)}")
    return images, vectors


def image_stages(size: Sequence[int], recipe: Recipe, mults: Sequence[int]) -> tuple[int, int]:
    """Number of convolutions and the side of the smallest map, for square images.

    "stride" halves down to 4 pixels; "pool" halves once for each of ``mults``.
    Raises ValueError for sizes that do not fit.
    """
    height, width = size
    if recipe.conv == "stride":
        stages = round(math.log2(height / 4)) if height >= 16 else 0
        valid = stages >= 2 and height == width == 4 * 2**stages
        rule = "16, 32, 64 or 128 pixels"
    else:
        stages = len(mults)
        valid = stages > 0 and height == width and height % 2**stages == 0 and 16 <= height <= 128
        rule = f"multiples of {2**stages} pixels from 16 to 128"
    if not valid:
        raise ValueError(f"images must be square with a side of {rule}, not {height} x {width}")
    return stages, height >> stages


class Encoder(nn.Module):
    """Observations {key: (..., shape)} -> embedding (..., E)."""

    def __init__(self, obs_space: Mapping[str, Box], model: ModelConfig, recipe: Recipe, ops: Ops):
        super().__init__()
        self.images, self.vectors = split_keys(obs_space)
        self.recipe, self.outputs = recipe, 0
        if self.images:
            size = obs_space[self.images[0]].shape[:2]
            stages, side = image_stages(size, recipe, model.cnn_mults)
            channels = sum(obs_space[k].shape[2] for k in self.images)
            sizes = [channels, *model.channels(stages)]
            self.cnn = nn.Sequential(*(ConvBlock(i, o, recipe, ops) for i, o in pairwise(sizes)))
            self.outputs += side * side * sizes[-1]
        if self.vectors:
            inputs = sum(obs_space[k].shape[0] for k in self.vectors)
            self.mlp = MLP(inputs, model.units, model.layers, recipe, ops)
            self.outputs += model.units

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        parts, dtype = [], next(self.parameters()).dtype
        if self.images:
            x = join([obs[k] for k in self.images])  # (..., H, W, C)
            lead = x.shape[:-3]
            x = x.flatten(0, -4)
            x = self.cnn(x if x.dtype == torch.uint8 else x.to(dtype) / 255 - 0.5)
            if self.recipe.conv == "stride":
                x = x.permute(0, 3, 1, 2)
            parts.append(x.reshape(*lead, -1))
        if self.vectors:
            parts.append(self.mlp(self._vector(obs)))
        return join(parts[::-1] if self.recipe.vectors_first else parts)

    def begin(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Layer, ...]]:
        """A vector (..., I) and the layers that make it the embedding.

        Where there are images, the embedding itself and no layers.
        """
        if self.images:
            return full(self(obs)), ()
        return self._vector(obs), tuple(cast(Dense, x).weights() for x in self.mlp.hidden)

    def _vector(self, obs: Mapping[str, Tensor]) -> Tensor:
        dtype = next(self.parameters()).dtype
        return torch.cat([symlog(obs[k].to(dtype)) for k in self.vectors], -1)


class LinearStem(nn.Module):
    """First map of the decoder from one Linear of [stoch, deter]: -> (..., C, side, side)."""

    def __init__(self, deter: int, stoch: int, channels: int, side: int, recipe: Recipe):
        super().__init__()
        self.shape = (channels, side, side)
        self.linear = Linear(stoch + deter, math.prod(self.shape), recipe, init="uniform")

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        return self.linear(torch.cat([stoch, deter], -1)).unflatten(-1, self.shape)


class BlockStem(nn.Module):
    """First map of the decoder from block-linear deter plus an MLP of stoch, norm and SiLU."""

    def __init__(
        self,
        deter: int,
        stoch: int,
        channels: int,
        side: int,
        model: ModelConfig,
        recipe: Recipe,
        ops: Ops,
    ):
        super().__init__()
        self.shape, self.blocks = (side, side, channels), model.blocks
        size = math.prod(self.shape)
        self.deter = BlockLinear(deter, size, model.blocks, recipe)
        self.hidden = Dense(stoch, 2 * model.units, recipe, ops)
        self.stoch = Linear(2 * model.units, size, recipe)
        self.norm, self.ops = make_norm(channels, recipe), ops

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        side, _, channels = self.shape
        x = self.deter(deter).unflatten(-1, (self.blocks, side, side, channels // self.blocks))
        x = x.movedim(-4, -2).flatten(-2)  # (..., side, side, C): channel = block, then its own
        x = x + self.stoch(self.hidden(stoch)).unflatten(-1, self.shape)
        return activate(x, self.norm, self.ops).movedim(-1, -3)


class Decoder(nn.Module):
    """Latent state -> images (..., H, W, C) of x/255 - shift, vectors (..., D) in symlog space."""

    def __init__(
        self,
        deter: int,
        stoch: int,
        obs_space: Mapping[str, Box],
        model: ModelConfig,
        recipe: Recipe,
        ops: Ops,
    ):
        super().__init__()
        self.images, self.vectors = split_keys(obs_space)
        self.squashes = recipe.conv == "pool"
        """Images end in a sigmoid."""
        if self.images:
            self.channels = [obs_space[k].shape[2] for k in self.images]
            size = obs_space[self.images[0]].shape[:2]
            stages, side = image_stages(size, recipe, model.cnn_mults)
            sizes = [*reversed(model.channels(stages)), sum(self.channels)]
            self.stem: BlockStem | LinearStem
            if recipe.conv == "pool":
                self.stem = BlockStem(deter, stoch, sizes[0], side, model, recipe, ops)
            else:
                self.stem = LinearStem(deter, stoch, sizes[0], side, recipe)
            blocks = enumerate(pairwise(sizes))
            self.cnn = nn.Sequential(
                *(
                    ConvBlock(i, o, recipe, ops, up=True, last=n == stages - 1)
                    for n, (i, o) in blocks
                )
            )
        if self.vectors:
            self.mlp = MLP(stoch + deter, model.units, model.layers, recipe, ops)
            heads = {
                k: Linear(model.units, obs_space[k].shape[0], recipe, init=output_init(recipe))
                for k in self.vectors
            }
            self.heads = nn.ModuleDict(heads)

    def forward(self, deter: Tensor, stoch: Tensor, raw: bool = False) -> dict[str, Tensor]:
        """Args: deter (..., D), stoch (..., S K). raw: images before a sigmoid."""
        recon: dict[str, Tensor] = {}
        if self.images:
            x = self.stem(deter, stoch).flatten(0, -4)
            x = full(self.cnn(x.permute(0, 2, 3, 1)))
            if self.squashes and not raw:
                x = torch.sigmoid(x)
            parts = divide(x.unflatten(0, deter.shape[:-1]), self.channels)
            recon.update(zip(self.images, parts, strict=True))
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            recon.update((k, full(self.heads[k](x))) for k in self.vectors)
        return recon
