"""Inputs of every operator that bench/operators.py times, by shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from fastdreamer import kernels
from fastdreamer.agent import Agent
from fastdreamer.config import SIZES
from fastdreamer.kernels import unimix
from fastdreamer.kernels.heads import Head
from fastdreamer.kernels.latent_linear import Latents
from fastdreamer.recipe import RECIPES

REFERENCE = kernels.resolve("reference")
SCANS = {"2025": "1m", "2023": "xs"}  # by recipe the size whose weights the scans have
# N, H, W, C, O of the second and the last convolution of size 1m, of XS's first and last, and of
# wide ones of 12m and S.
CONVOLUTIONS = {
    "pool": (256, 32, 32, 8, 12),
    "upsample": (256, 32, 32, 8, 3),
    "stride": (256, 64, 64, 3, 24),
    "transpose": (256, 32, 32, 24, 3),
    "pool wide": (256, 16, 16, 48, 64),
    "upsample wide": (256, 16, 16, 48, 32),
    "stride wide": (256, 16, 16, 64, 128),
    "transpose wide": (256, 16, 16, 64, 32),
}


def lambda_return(shape: tuple[int, int]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(shape, generator=g) for _ in range(2))
    discount = 0.997 * torch.rand(shape, generator=g).gt(0.01)
    return [x.requires_grad_() for x in (reward, discount, value)] + [torch.tensor(0.95)]


def norm_act(kind: str, shape: tuple[int, int]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(shape, generator=g), torch.rand(shape[1], generator=g)
    shift = torch.randn(shape[1], generator=g).requires_grad_() if kind == "layer" else None
    return [x.requires_grad_(), scale.requires_grad_(), shift, kind, 1e-3]


def conv_norm_act(shape: tuple[int, ...]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    n, height, width, c, o = shape
    kind = next(k for k, v in CONVOLUTIONS.items() if v == shape).split()[0]
    size = 5 if kind in ("pool", "upsample") else 4
    x = torch.randn(n, height, width, c, generator=g)
    outer = (c, o) if kind == "transpose" else (o, c)
    weight = torch.randn(*outer, size, size, generator=g) / (c * size**2) ** 0.5
    bias, scale = (torch.rand(o, generator=g).requires_grad_() for _ in range(2))
    return [x.requires_grad_(), weight.requires_grad_(), bias, scale, None, kind, "rms", 1e-3]


def latent_linear(shape: tuple[int, ...]) -> list[Any]:
    rows, deter, stoch, classes, outputs = shape
    g = torch.Generator().manual_seed(0)
    index = torch.randint(classes, (rows, stoch), generator=g, dtype=torch.int32)
    onehot = (index.unsqueeze(-1) == torch.arange(classes)).float().flatten(1)
    feat = torch.cat([torch.randn(rows, deter, generator=g), onehot], 1)
    weight = torch.randn(outputs, feat.shape[1], generator=g) / feat.shape[1] ** 0.5
    bias = torch.randn(outputs, generator=g).requires_grad_()
    return [feat, index, weight.requires_grad_(), bias, deter, classes]


def twohot(name: str, shape: tuple[int, int]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g).requires_grad_()
    targets = [torch.randn(shape[0], generator=g)] if name == "twohot_loss" else []
    return [logits, *targets, "symexp"]


def image_loss(shape: tuple[int, ...]) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).requires_grad_()
    return [x, torch.randint(256, shape, generator=g, dtype=torch.uint8), 0.0, True]


def categorical(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(shape, generator=g) for _ in range(2)]
    if name == "unimix":
        return [logits[0].requires_grad_()]
    logp, logq = (unimix.unimix(x).requires_grad_() for x in logits)
    if name == "entropy":
        return [logp]
    noise = -torch.empty(shape).exponential_(generator=g).log()
    return [logp, noise if name == "sample" else logq]


def atari_agent(recipe: str, size: str) -> Agent:
    torch.manual_seed(0)
    spaces = {"image": Box(0, 255, (64, 64, 3), np.uint8)}, Discrete(18)
    return Agent(*spaces, SIZES[recipe][size], RECIPES[recipe], REFERENCE)


def gru_step(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    B, D, U, G = shape
    width = D // G
    vectors = [(D,), (D,), (G, width, 3 * width), (3 * D,)]
    weights = [(G, width + U, width), *vectors] if name == "block_gru_step" else []
    sizes = [(B, D), (B, U), *(weights or [(3 * D, D + U), (3 * D,), (3 * D,)])]
    return [(torch.randn(s, generator=g) / s[-1] ** 0.5).requires_grad_() for s in sizes]


def leaves(tree: Any) -> Any:
    """The same tuples with a leaf of its own, with gradient, for each tensor."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_()
    if isinstance(tree, tuple):
        parts = map(leaves, tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def detached(tree: Any) -> Any:
    """The same tuples without gradient."""
    if isinstance(tree, tuple):
        parts = map(detached, tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree.detach() if isinstance(tree, Tensor) else tree


def clear_noise(*shape: int) -> Tensor:
    """Gumbel noise so wide that rounding does not change what is drawn."""
    g = torch.Generator().manual_seed(0)
    return -50 * torch.empty(shape).exponential_(generator=g).log()


@cache
def observe(recipe: str, rows: int, steps: int) -> list[Any]:
    agent = atari_agent(recipe, SCANS[recipe])
    rssm, g = agent.world_model.rssm, torch.Generator().manual_seed(0)
    weights = leaves(rssm.weights())
    weights.initial_stoch.requires_grad_(False)  # a drawn class: the scan has no gradient of it
    start = torch.zeros(rows, rssm.deter), torch.zeros(rows, *rssm.latent)
    action = torch.eye(18)[torch.randint(18, (rows, steps), generator=g)]
    units = weights.posterior[0].weight.shape[0]
    embedded = torch.randn(rows, steps, units, generator=g).requires_grad_()
    first = torch.rand(rows, steps, generator=g) < 0.01
    return [weights, *start, action, embedded, first, clear_noise(rows, steps, *rssm.latent)]


@cache
def imagine(recipe: str, rows: int, steps: int) -> list[Any]:
    agent = atari_agent(recipe, SCANS[recipe])
    rssm = agent.world_model.rssm
    weights, policy = leaves(rssm.weights()), leaves(agent.actor.weights())
    start = torch.zeros(rows, rssm.deter), torch.zeros(rows, *rssm.latent)
    noise = clear_noise(rows, steps, *rssm.latent), clear_noise(rows, steps + 1, 18)
    return [weights, policy, *start, *noise]


@cache
def heads(recipe: str, rows: int) -> list[Any]:
    """Of all heads on imagined states, the critic's and the actor's with gradient."""
    agent, g = atari_agent(recipe, SCANS[recipe]), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(agent.critic.out.weight, std=0.1, generator=g)  # it starts at 0
    model, bins = agent.world_model, agent.recipe.bins
    shape = (rows, model.rssm.deter, *model.rssm.latent, 1)
    feat, index, _, _, deter, classes = latent_linear(shape)
    given = [
        Head(detached(model.reward.weights()), bins),
        Head(detached(agent.target_critic.weights()), bins),
        Head(detached(model.cont.weights())),
        Head(leaves(agent.critic.weights()), trained=True),
        Head(leaves(agent.actor.mlp.weights()), trained=True),
    ]
    return [feat, Latents(index, deter, classes), given, model.reward.eps]


@cache
def policy_step(recipe: str, rows: int) -> list[Any]:
    """Of a policy step behind the encoder."""
    agent, g = atari_agent(recipe, SCANS[recipe]), torch.Generator().manual_seed(0)
    rssm, embedding = agent.world_model.rssm, agent.world_model.rssm.embedding()
    weights, policy = detached(rssm.weights()), detached(agent.actor.weights())
    state = torch.randn(rows, rssm.deter, generator=g), torch.zeros(rows, *rssm.latent)
    state[1][..., 0] = 1
    x = torch.randn(rows, embedding.weight.shape[1], generator=g)
    first = torch.zeros(rows, dtype=torch.bool)
    steps = (torch.eye(18)[:rows], x, first, clear_noise(rows, *rssm.latent))
    return [weights, (detached(embedding),), policy, *state, *steps, clear_noise(rows, 18)]


@cache
def step(name: str, size: str) -> list[Any]:
    """Parameters, gradients and moments that an Atari agent's step has, and the scalars.

    ``clip_adam`` steps the world model of recipe 2023, ``agc_laprop`` all of recipe 2025.
    """
    adam = name == "clip_adam"
    agent = atari_agent("2023", size).world_model if adam else atari_agent("2025", size)
    params = [p.data for p in agent.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(0)
    grads, nu, mu = ([torch.randn(p.shape, generator=g) for p in params] for _ in range(3))
    rate, clip = (1e-4, 1000.0) if adam else (4e-5, 0.3)
    return [params, grads, [x.square() for x in nu], mu, 1000, rate, clip]


@cache
def ema(recipe: str, size: str) -> list[Any]:
    """Target critic and critic of an Atari agent, apart from one another."""
    agent = atari_agent(recipe, size)
    g = torch.Generator().manual_seed(0)
    critic = [torch.randn(p.shape, generator=g) for p in agent.critic.parameters()]
    return [list(agent.target_critic.parameters()), critic, 0.02]
