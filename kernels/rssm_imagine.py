"""The imagined rollout of the prior with the policy inside; no gradient.

Legend: N rows, H horizon, D deter, S stoch, K classes, A action.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import library
from .heads import Ran, kept_width
from .library import Arguments
from .register import compute_type
from .rssm_weights import (
    MAX_BLOCKS,
    MAX_CUDA_PARTS,
    MAX_HEADS,
    MAX_LAYERS,
    SOMEWHERE,
    CLayer,
    Layer,
    RSSMWeights,
    Sizes,
    c_layer,
    c_model,
    check_shapes,
    check_weights,
    contiguous,
    drawn,
    layer_shapes,
    placeholder_layers,
    placeholder_model,
    sizes_of,
)
from .unimix import sample, unimix


class PolicyWeights(NamedTuple):
    """Policy over features: hidden layers, and by part of the action its output layers.

    heads: logits of a discrete part; mean and std of a continuous one. deter_first: order of the
    features. mix: weight of the uniform distribution in discrete parts.
    """

    layers: tuple[Layer, ...]
    heads: tuple[tuple[Layer, ...], ...]
    deter_first: bool
    mix: float

    def features(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """(N, D), (N, S, K) -> (N, D + S K)."""
        parts = (deter, stoch.flatten(-2))
        return torch.cat(parts if self.deter_first else parts[::-1], -1)

    def act(self, x: Tensor, noise: Tensor, eps: float) -> Tensor:
        """(N, D + S K), (N, A) -> action vectors (N, A)."""
        for layer in self.layers:
            x = layer(x, eps)
        sizes = [head[0].weight.shape[0] for head in self.heads]
        drawn = zip(self.heads, noise.split(sizes, -1), strict=True)
        return torch.cat([self._part([out(x, eps) for out in head], n) for head, n in drawn], -1)

    def _part(self, raw: Sequence[Tensor], noise: Tensor) -> Tensor:
        if len(raw) == 1:
            return sample(unimix(raw[0], self.mix), noise)
        mean, std = bounded_normal(*raw)
        return mean + std * noise


class Rollout(NamedTuple):
    """Of N rows over H steps, the start first.

    feat: (N, H + 1, D + S K) features of the states. drawn: (N, H + 1, S) int32, the class of each
    of their latents, -1 where there is none. action: (N, H + 1, A), taken in each. policy: what
    the policy's hidden layers gave for the features, where it was kept.
    """

    feat: Tensor
    drawn: Tensor
    action: Tensor
    policy: Ran | None = None


def bounded_normal(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean in (-1, 1) and standard deviation in (0.1, 1) of a Gaussian, from raw (..., n).

    Source: DreamerV3's "bounded_normal".
    """
    return torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1


@torch.no_grad()
def rssm_imagine(
    weights: RSSMWeights,
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> Rollout:
    """Rollout of the prior under a policy, without gradient.

    Args:
        deter: (N, D) and stoch: (N, S, K) one-hot or zeros, the starts.
        noise: (N, H, S, K) Gumbel. action_noise: (N, H + 1, A), Gumbel for discrete parts,
            standard normal for continuous ones. Zeros draw modes and means.

    Source: DreamerV3, eq. 3 and "Actor learning".
    """
    feats, indices = [policy.features(deter, stoch)], [drawn(stoch)]
    actions = [policy.act(feats[0], action_noise[:, 0], weights.eps)]
    for t in range(noise.shape[1]):
        deter = weights.cell.step(stoch.flatten(-2), actions[-1], deter, weights.eps)
        stoch = sample(weights.latent(weights.prior, deter), noise[:, t])
        feats.append(policy.features(deter, stoch))
        indices.append(drawn(stoch))
        actions.append(policy.act(feats[-1], action_noise[:, t + 1], weights.eps))
    feat, index, action = (torch.stack(x, 1) for x in (feats, indices, actions))
    return Rollout(feat, index, action)


_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
TENSORS = ("start_deter", "start_index", "noise", "action_noise", "feat", "index", "action")


POLICY_FIELDS = (
    ("policy", ctypes.POINTER(CLayer)),
    ("policy_layers", _SIZE),
    ("deter_first", ctypes.c_int32),
    ("policy_mix", ctypes.c_float),
    ("parts", _SIZE),
    ("part_sizes", ctypes.POINTER(ctypes.c_int64)),
    ("discrete", ctypes.POINTER(ctypes.c_uint8)),
    ("heads", ctypes.POINTER(CLayer)),
)


class CImagine(Arguments):
    """``fd_imagine``."""

    _fields_: ClassVar = [
        ("N", _SIZE),
        ("H", _SIZE),
        *((k, _POINTER) for k in (*TENSORS, "hidden", "kept")),
        *POLICY_FIELDS,
    ]


def rssm_imagine_cpp(
    weights: RSSMWeights,
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> Rollout:
    """`rssm_imagine` by the C++ library, from and to float32.

    It multiplies in bfloat16 where autocast says so and the processor can, else in float32, where
    it keeps what the policy's gradient needs.

    Raises ValueError for shapes that do not fit, TypeError for inputs of several types.

    Other types, and models beyond the library's limits (8 layers, 64 blocks, 32 parts of an
    action), are served by the reference.
    """
    arguments = (weights, policy, deter, stoch, noise, action_noise)
    if not _fits(weights, policy, deter, MAX_HEADS // 2):
        return rssm_imagine(*arguments)
    compute = compute_type("cpu")
    return _compute(*arguments, compute, keep=compute == torch.float32)


def rssm_imagine_cuda(
    weights: RSSMWeights,
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> Rollout:
    """`rssm_imagine` by the CUDA library, from and to float32.

    It multiplies in bfloat16 where autocast says so, else in float32. Other types, and models that
    the library does not take (as with C++, and 8 parts), are served by the reference.
    """
    arguments = (weights, policy, deter, stoch, noise, action_noise)
    compute = compute_type("cuda")
    sizes = sizes_of(weights, action_noise.shape[-1], weights.prior)
    layers = tuple(layer.weight.shape[0] for layer in policy.layers)
    parts = tuple((head[0].weight.shape[0], len(head)) for head in policy.heads)
    if not _fits(weights, policy, deter, MAX_CUDA_PARTS) or not _takes(
        sizes, layers, parts, len(deter), noise.shape[1], compute, deter.device
    ):
        return rssm_imagine(*arguments)
    return _compute(*arguments, compute)


@cache
def _takes(
    sizes: Sizes,
    layers: tuple[int, ...],
    parts: tuple[tuple[int, int], ...],
    rows: int,
    horizon: int,
    compute: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether the GPU takes a rollout; parts: outputs of each part's layers, and their number."""
    _, deter, stoch, classes, *_ = sizes
    policy = placeholder_layers(deter + stoch * classes, layers)
    heads = [placeholder_layers(layers[-1], [n])[0] for n, count in parts for _ in range(count)]
    tensors = dict.fromkeys(TENSORS, SOMEWHERE)
    rollout = CImagine.of(N=rows, H=horizon, **tensors, **_policy(policy, heads, parts))
    return library.takes("fd_rssm_imagine", device, compute, placeholder_model(sizes), rollout)


def _fits(weights: RSSMWeights, policy: PolicyWeights, deter: Tensor, parts: int) -> bool:
    layers = max(len(policy.layers), len(weights.prior))
    fits = layers <= MAX_LAYERS and weights.blocks <= MAX_BLOCKS and len(policy.heads) <= parts
    return fits and deter.dtype == torch.float32


@torch.no_grad()
def _compute(
    weights: RSSMWeights,
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    action_noise: Tensor,
    compute: torch.dtype,
    keep: bool = False,
) -> Rollout:
    _check(weights, policy, deter, stoch, noise, action_noise)
    weights = contiguous(weights)
    rows, horizon = noise.shape[:2]
    starts = [x.contiguous() for x in (deter, drawn(stoch), noise, action_noise)]
    feat = deter.new_empty(rows, horizon + 1, deter.shape[1] + stoch.shape[1] * stoch.shape[2])
    index = starts[1].new_empty(rows, horizon + 1, stoch.shape[1])
    actions, ran = torch.empty_like(starts[3]), None
    if keep:
        outputs = policy.layers[-1].weight.shape[0]
        kept = deter.new_empty(rows * (horizon + 1) * kept_width(policy.layers))
        ran = Ran(deter.new_empty(rows, horizon + 1, outputs), kept)
    rollout = CImagine.of(
        N=rows,
        H=horizon,
        start_deter=starts[0],
        start_index=starts[1],
        noise=starts[2],
        action_noise=starts[3],
        feat=feat,
        index=index,
        action=actions,
        hidden=None if ran is None else ran.outputs,
        kept=None if ran is None else ran.kept,
        **c_policy(policy),
    )
    model = c_model(weights, actions.shape[-1], weights.prior)
    library.launch("fd_rssm_imagine", deter, compute, model, rollout)
    return Rollout(feat, index, actions, ran)


def c_policy(policy: PolicyWeights) -> dict[str, Any]:
    """The `POLICY_FIELDS`; their pointers are valid while the weights live."""
    heads = [c_layer(layer) for head in policy.heads for layer in head]
    parts = [(head[0].weight.shape[0], len(head)) for head in policy.heads]
    order = {"deter_first": policy.deter_first, "policy_mix": policy.mix}
    return order | _policy([c_layer(layer) for layer in policy.layers], heads, parts)


def _policy(
    layers: list[CLayer], heads: list[CLayer], parts: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """parts: of the action, the outputs of each one's layers, and their number."""
    return {
        "policy": (CLayer * len(layers))(*layers),
        "policy_layers": len(layers),
        "parts": len(parts),
        "part_sizes": (ctypes.c_int64 * len(parts))(*(size for size, _ in parts)),
        "discrete": (ctypes.c_uint8 * len(parts))(*(count == 1 for _, count in parts)),
        "heads": (CLayer * len(heads))(*heads),
    }


def _check(
    weights: RSSMWeights,
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> None:
    (rows, width), (latent, horizon) = deter.shape, (weights.initial_stoch.shape, noise.shape[1])
    actions = sum(head[0].weight.shape[0] for head in policy.heads)
    expected = {
        "deter": (deter, (rows, *weights.initial_deter.shape)),
        "stoch": (stoch, (rows, *latent)),
        "noise": (noise, (rows, horizon, *latent)),
        "action_noise": (action_noise, (rows, horizon + 1, actions)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"rssm_imagine: {name} must be {shape}, got {tuple(x.shape)}")
        if x.dtype != torch.float32:
            raise TypeError(f"rssm_imagine: {name} must be torch.float32, got {x.dtype}")
    check_weights("rssm_imagine", weights, actions, weights.prior)
    check_policy("rssm_imagine", policy, width + weights.initial_stoch.numel())


def check_policy(operator: str, policy: PolicyWeights, features: int) -> None:
    """Raise as `check_weights` does."""
    shapes = layer_shapes(policy.layers, features)
    for head in policy.heads:
        for layer in head:
            shapes += layer_shapes([layer], policy.layers[-1].weight.shape[0])
            shapes.append((layer.weight, tuple(head[0].weight.shape)))
    check_shapes(operator, shapes)
