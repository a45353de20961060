"""One policy step of environments, from the observation's vector or embedding to the action.

Legend: N environments, D deter, S stoch, K classes, A action, U hidden, E inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from . import library
from .library import Arguments
from .rssm_imagine import POLICY_FIELDS, PolicyWeights, c_policy, check_policy
from .rssm_observe import observe_step
from .rssm_weights import (
    MAX_BLOCKS,
    MAX_HEADS,
    MAX_LAYERS,
    CLayer,
    Layer,
    RSSMWeights,
    c_layer,
    c_model,
    check_shapes,
    check_weights,
    contiguous,
    layer_shapes,
)

MOST_ROWS = 16
"""With more, packed products as those of PyTorch cost less."""


@torch.no_grad()
def policy_step(
    weights: RSSMWeights,
    embedding: Sequence[Layer],
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    x: Tensor,
    is_first: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A posterior step, then an action of the policy, without gradient.

    Args:
        embedding: layers over ``x``; the last is the share (U, ...) of the posterior's first
            product, with its bias and without norm.
        deter: (N, D), stoch: (N, S, K) one-hot or zeros, the last state. action: (N, A) that
            followed it. x: (N, E) of the observation.
        is_first: (N,) bool; there the step is from the initial state and a zero action.
        noise: (N, S, K) Gumbel. action_noise: (N, A), Gumbel for discrete parts, standard normal
            for continuous ones. Zeros draw modes and means.

    Returns:
        The new state, deter (N, D) and stoch (N, S, K) one-hot, and the action (N, A).

    Source: DreamerV3, eq. 3 and "Actor learning".
    """
    for layer in embedding:
        x = layer(x, weights.eps)
    deter, stoch, _ = observe_step(weights, deter, stoch, action, x, is_first, noise)
    return deter, stoch, policy.act(policy.features(deter, stoch), action_noise, weights.eps)


TENSORS = (
    *("deter", "stoch", "action", "x", "is_first", "initial_deter", "initial_stoch"),
    *("noise", "action_noise", "next_deter", "next_stoch", "next_action"),
)


class CAct(Arguments):
    """``fd_act``."""

    _fields_: ClassVar = [
        ("N", ctypes.c_int64),
        *((k, ctypes.c_void_p) for k in TENSORS),
        ("embedding", ctypes.POINTER(CLayer)),
        ("embedding_layers", ctypes.c_int64),
        *POLICY_FIELDS,
    ]


@torch.no_grad()
def policy_step_cpp(
    weights: RSSMWeights,
    embedding: Sequence[Layer],
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    x: Tensor,
    is_first: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`policy_step` by the C++ library, in float32.

    Raises ValueError for shapes that do not fit, TypeError for inputs of several types.

    Other types, more than 16 environments, and models beyond the library's limits (8 layers, 64
    blocks, 32 parts of an action), are served by the reference.
    """
    inputs = (deter, stoch, action, x, is_first, noise, action_noise)
    layers = max(len(policy.layers), len(embedding))
    few = len(deter) <= MOST_ROWS and len(policy.heads) <= MAX_HEADS // 2
    fits = few and layers <= MAX_LAYERS and weights.blocks <= MAX_BLOCKS
    if not fits or deter.dtype != torch.float32:
        return policy_step(weights, embedding, policy, *inputs)
    _check(weights, embedding, policy, *inputs)
    weights = contiguous(weights)
    deter, stoch, action, x, is_first, noise, action_noise = (t.contiguous() for t in inputs)
    next_deter, next_stoch, next_action = map(torch.empty_like, (deter, stoch, action))
    initial_stoch = weights.initial_stoch.contiguous()
    step = CAct.of(
        N=len(deter),
        deter=deter,
        stoch=stoch,
        action=action,
        x=x,
        is_first=is_first,
        initial_deter=weights.initial_deter,
        initial_stoch=initial_stoch,
        noise=noise,
        action_noise=action_noise,
        next_deter=next_deter,
        next_stoch=next_stoch,
        next_action=next_action,
        embedding=(CLayer * len(embedding))(*(c_layer(layer) for layer in embedding)),
        embedding_layers=len(embedding),
        **c_policy(policy),
    )
    model = c_model(weights, action.shape[1], weights.posterior)
    library.launch("fd_policy_step", deter, torch.float32, model, step)
    return next_deter, next_stoch, next_action


def _check(
    weights: RSSMWeights,
    embedding: Sequence[Layer],
    policy: PolicyWeights,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    x: Tensor,
    is_first: Tensor,
    noise: Tensor,
    action_noise: Tensor,
) -> None:
    rows, width, latent = len(deter), weights.initial_deter.shape[0], weights.initial_stoch.shape
    actions = sum(head[0].weight.shape[0] for head in policy.heads)
    if not embedding or embedding[-1].scale is not None:
        raise ValueError("policy_step: the last layer of the embedding must be there, without norm")
    expected = {
        "deter": (deter, (rows, width)),
        "stoch": (stoch, (rows, *latent)),
        "action": (action, (rows, actions)),
        "x": (x, (rows, embedding[0].weight.shape[1])),
        "is_first": (is_first, (rows,)),
        "noise": (noise, (rows, *latent)),
        "action_noise": (action_noise, (rows, actions)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"policy_step: {name} must be {shape}, got {tuple(tensor.shape)}")
        dtype = torch.bool if name == "is_first" else torch.float32
        if tensor.dtype != dtype:
            raise TypeError(f"policy_step: {name} must be {dtype}, got {tensor.dtype}")
    check_weights("policy_step", weights, actions, weights.posterior)
    share = weights.posterior[0].weight.shape[0]
    shapes = layer_shapes(embedding, embedding[0].weight.shape[1])
    shapes.append((embedding[-1].weight, (share, embedding[-1].weight.shape[1])))
    check_shapes("policy_step", shapes)
    check_policy("policy_step", policy, width + weights.initial_stoch.numel())
