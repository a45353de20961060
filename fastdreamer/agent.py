"""The agent: world model, actor, critic, and acting. How they learn is in ``learner``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import gymnasium
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from fastdreamer.actions import ActionSpec, BoundedNormal, Categorical, Policy
from fastdreamer.config import ModelConfig
from fastdreamer.kernels.gumbel import gumbel
from fastdreamer.kernels.ops import Ops
from fastdreamer.kernels.rssm_imagine import PolicyWeights
from fastdreamer.kernels.rssm_weights import Layer
from fastdreamer.nets import MLP, Decoder, Dense, Encoder, Linear, full, initialise, output_init
from fastdreamer.recipe import Recipe
from fastdreamer.rssm import RSSM, State


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads. Source: DreamerV3, eq. 3."""

    def __init__(
        self,
        obs_space: Mapping[str, Box],
        action: int,
        model: ModelConfig,
        recipe: Recipe,
        ops: Ops,
    ):
        super().__init__()
        self.encoder = Encoder(obs_space, model, recipe, ops)
        self.rssm = RSSM(self.encoder.outputs, action, model, recipe, ops)
        self.decoder = Decoder(self.rssm.deter, self.rssm.stoch, obs_space, model, recipe, ops)
        size = (self.rssm.feat, model.units, model.head_layers, recipe, ops)
        self.reward = MLP(*size, outputs=model.bins, init="zero")
        self.cont = MLP(*size, outputs=1, init=output_init(recipe))

    def decode(self, state: State, raw: bool = False) -> dict[str, Tensor]:
        """Predicted observations of states (..., D), in the decoder's units; ``raw`` as there."""
        return self.decoder(state.deter, state.stoch.flatten(-2), raw)

    def images(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The images among predictions, as (..., H, W, C) uint8."""
        shift = self.rssm.recipe.image_shift
        return {
            k: ((predictions[k] + shift) * 255).round().clamp(0, 255).to(torch.uint8)
            for k in self.decoder.images
        }


class Actor(nn.Module):
    """Policy: features (..., F) -> a distribution for each part of the action."""

    def __init__(self, feat: int, spec: ActionSpec, model: ModelConfig, recipe: Recipe, ops: Ops):
        super().__init__()
        self.spec, self.ops, self.deter_first = spec, ops, recipe.deter_first
        self.mix = model.unimix if recipe.policy_unimix else 0.0
        self.mlp = MLP(feat, model.units, model.layers, recipe, ops)
        self.heads = nn.ModuleDict()
        for part in spec.parts:
            outputs = ("logits",) if part.discrete else ("mean", "std")
            self.heads[part.name] = nn.ModuleDict(
                {k: _policy_head(model.units, part.size, recipe) for k in outputs}
            )

    def forward(self, feat: Tensor) -> Policy:
        return self.policy(self.mlp(feat))

    def policy(self, x: Tensor) -> Policy:
        """The distributions from the output of ``mlp``."""
        parts: dict[str, Categorical | BoundedNormal] = {}
        for part in self.spec.parts:
            heads = cast(nn.ModuleDict, self.heads[part.name]).values()
            outputs = [full(head(x)) for head in heads]
            if part.discrete:
                parts[part.name] = Categorical(self.ops.unimix(outputs[0], self.mix), self.ops)
            else:
                parts[part.name] = BoundedNormal(*outputs)
        return Policy(parts, self.spec.sizes)

    def weights(self) -> PolicyWeights:
        """As the kernels take them."""
        heads = (cast(nn.ModuleDict, self.heads[part.name]).values() for part in self.spec.parts)
        outputs = tuple(tuple(Layer(out.weight, out.bias) for out in head) for head in heads)
        layers = tuple(cast(Dense, block).weights() for block in self.mlp.hidden)
        return PolicyWeights(layers, outputs, self.deter_first, self.mix)


RESERVED = {"dyn", "rep", "cont", "reward", "policy", "value", "deter", "stoch", "step_id"}


def _check_names(names: list[str]) -> None:
    """Names of observations and actions also name losses, replay columns and modules."""
    for name in names:
        if name in RESERVED or "." in name or not name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{name!r} cannot name an observation or action here: rename it")


def _policy_head(units: int, size: int, recipe: Recipe) -> Linear:
    head = Linear(units, size, recipe)
    initialise(head.weight.data, units, size, recipe, output_init(recipe)).mul_(recipe.policy_scale)
    return head


@dataclass(frozen=True)
class Carry:
    """What acting remembers of N environments: latent state and last action vector (N, A)."""

    state: State
    action: Tensor


@dataclass(frozen=True)
class ActNoise:
    """Randomness of one acting step: ``stoch`` (N, S, K) Gumbel and ``action`` (N, A)."""

    stoch: Tensor
    action: Tensor


class Agent(nn.Module):
    """All networks of one agent for the given single-environment spaces.

    Raises ValueError where a space is not supported; the message names what is.
    """

    bf16 = False
    """Matrix products and convolutions are computed in bfloat16, all else in float32."""

    def __init__(
        self,
        obs_space: Mapping[str, Box],
        act_space: gymnasium.Space,
        model: ModelConfig,
        recipe: Recipe,
        ops: Ops,
    ):
        super().__init__()
        self.spec = ActionSpec(act_space)
        _check_names([*obs_space, *(part.name for part in self.spec.parts)])
        if recipe.name == "2023" and (len(self.spec.parts) > 1 or not self.spec.discrete):
            raise ValueError(
                f"recipe 2023 supports one Discrete action, not {act_space}; recipe 2025 does"
            )
        self.obs_space, self.model, self.recipe, self.ops = dict(obs_space), model, recipe, ops
        self.world_model = WorldModel(obs_space, self.spec.size, model, recipe, ops)
        feat = self.world_model.rssm.feat
        self.actor = Actor(feat, self.spec, model, recipe, ops)
        size = (feat, model.units, model.layers, recipe, ops)
        self.critic = MLP(*size, outputs=model.bins, init="zero")
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def products(self, cache: bool = True) -> AbstractContextManager:
        """Context in which matrix products and convolutions have the agent's precision.

        Args:
            cache: keep converted weights until the end. Those that were converted without
                gradient would get none where they are used with one.
        """
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache)

    def zero_state(self, rows: int) -> State:
        """States (N, ...) of zeros."""
        zeros = partial(torch.zeros, dtype=self.dtype, device=self.device)
        size = self.model
        return State(zeros(rows, size.deter), zeros(rows, size.stoch, size.classes))

    def initial_carry(self, rows: int) -> Carry:
        """Zeros for N rows; the first observation's is_first replaces them."""
        action = torch.zeros(rows, self.spec.size, dtype=self.dtype, device=self.device)
        return Carry(self.zero_state(rows), action)

    def act_noise(self, rows: int, generator: torch.Generator) -> ActNoise:
        """Fresh randomness for one :meth:`act` of N rows."""
        latent = (rows, self.model.stoch, self.model.classes)
        return ActNoise(
            gumbel(latent, generator, self.dtype), self.spec.noise((rows,), generator, self.dtype)
        )

    @torch.no_grad()
    def act(
        self,
        obs: Mapping[str, Tensor],
        is_first: Tensor,
        carry: Carry,
        noise: ActNoise,
        mode: bool = False,
    ) -> Carry:
        """One policy step for N environments.

        Args:
            obs: {key: (N, ...)}. is_first: (N,) bool. carry: of the last call.
            noise: randomness; zeros give modes. mode: take the policy's mode.

        Returns:
            The carry for the next call; its ``action`` is the one to take (see ``spec.decode``).
        """
        action_noise = torch.zeros_like(noise.action) if mode else noise.action
        rssm, encoder, state = self.world_model.rssm, self.world_model.encoder, carry.state
        with self.products():
            if self.device.type == "cpu":
                x, layers = encoder.begin(obs)
                weights = rssm.weights(resets=bool(is_first.any()))
                inputs = (state.deter, state.stoch, carry.action, x, is_first, noise.stoch)
                layers, policy = (*layers, rssm.embedding()), self.actor.weights()
                step = self.ops.policy_step(weights, layers, policy, *inputs, action_noise)
                return Carry(State(*step[:2]), step[2])
            # On a GPU by the operators of its backend, which are captured as one graph.
            scan = rssm.start_scan(encoder(obs))
            steps = (scan, scan.embedded, is_first, noise.stoch)
            state, _ = rssm.observe_step(state, carry.action, *steps)
            policy = self.actor(rssm.features(state))
        return Carry(state, policy.sample(action_noise))
