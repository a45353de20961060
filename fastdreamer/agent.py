"""The agent: world model, actor, critic, and acting. How they learn is in ``learner``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import gymnasium
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from fastdreamer.config import ModelConfig
from fastdreamer.distributions import ActionDist, Categorical, gumbel
from fastdreamer.kernels.ops import Ops
from fastdreamer.nets import MLP, Decoder, Encoder
from fastdreamer.rssm import RSSM, State


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads. Source: DreamerV3, eq. 3."""

    def __init__(
        self, obs_space: Mapping[str, Box], action: int, model: ModelConfig, bins: int, ops: Ops
    ):
        super().__init__()
        nets = dict(units=model.units, layers=model.layers)
        self.encoder = Encoder(obs_space, model.cnn_depth, **nets)
        self.rssm = RSSM(
            self.encoder.outputs,
            action,
            deter=model.deter,
            hidden=model.hidden,
            stoch=model.stoch,
            classes=model.classes,
            unimix=model.unimix,
            ops=ops,
        )
        feat = self.rssm.feat
        self.decoder = Decoder(feat, obs_space, model.cnn_depth, **nets)
        self.reward = MLP(feat, **nets, outputs=bins, init="zero")
        self.cont = MLP(feat, **nets, outputs=1, init="uniform")


class Actor(nn.Module):
    """Policy over one discrete action: features (..., F) -> unimixed categorical."""

    def __init__(self, feat: int, action: int, model: ModelConfig, ops: Ops):
        super().__init__()
        self.mlp = MLP(feat, model.units, model.layers, action, init="uniform")
        self.mix, self.ops = model.unimix, ops

    def forward(self, feat: Tensor) -> ActionDist:
        return Categorical(self.ops.unimix(self.mlp(feat), self.mix), self.ops)

    def sample(self, feat: Tensor, noise: Tensor) -> Tensor:
        """Action (..., A) drawn with ``noise`` (..., A)."""
        return self(feat).sample(noise)


@dataclass(frozen=True)
class Carry:
    """What acting remembers of N environments: latent state and last action (N, A)."""

    state: State
    action: Tensor


@dataclass(frozen=True)
class ActNoise:
    """Randomness of one acting step: ``stoch`` (N, S, K) and ``action`` (N, A) Gumbel."""

    stoch: Tensor
    action: Tensor


class Agent(nn.Module):
    """All networks of one agent for the given single-environment spaces.

    Raises ValueError where the action space is not supported by the recipe.
    """

    def __init__(
        self,
        obs_space: Mapping[str, Box],
        act_space: gymnasium.Space,
        model: ModelConfig,
        ops: Ops,
    ):
        super().__init__()
        if not isinstance(act_space, Discrete):
            raise ValueError(f"recipe 2023 supports Discrete actions, not {act_space}")
        self.obs_space, self.model, self.ops = dict(obs_space), model, ops
        self.actions = int(act_space.n)
        self.first_action = int(act_space.start)
        self.world_model = WorldModel(obs_space, self.actions, model, model.bins, ops)
        feat = self.world_model.rssm.feat
        self.actor = Actor(feat, self.actions, model, ops)
        self.critic = MLP(feat, model.units, model.layers, model.bins, init="zero")
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.world_model.rssm.initial_deter.dtype

    def encode_action(self, action: Tensor) -> Tensor:
        """Environment actions (...) int -> action vectors (..., A), here one-hot."""
        return F.one_hot(action.long() - self.first_action, self.actions).to(self.dtype)

    def decode_action(self, action: Tensor) -> Tensor:
        """Action vectors (..., A) -> environment actions (...) int64."""
        return action.argmax(-1) + self.first_action

    def initial_carry(self, rows: int) -> Carry:
        """Zeros for N rows; the first observation's is_first replaces them."""
        size = self.model
        device = self.world_model.rssm.initial_deter.device
        zeros = lambda *shape: torch.zeros(shape, dtype=self.dtype, device=device)  # noqa: E731
        state = State(zeros(rows, size.deter), zeros(rows, size.stoch, size.classes))
        return Carry(state, zeros(rows, self.actions))

    def act_noise(self, rows: int, generator: torch.Generator) -> ActNoise:
        """Fresh randomness for one :meth:`act` of N rows."""
        latent = (rows, self.model.stoch, self.model.classes)
        return ActNoise(
            gumbel(latent, generator, self.dtype),
            gumbel((rows, self.actions), generator, self.dtype),
        )

    @torch.no_grad()
    def act(
        self,
        obs: Mapping[str, Tensor],
        is_first: Tensor,
        carry: Carry,
        noise: ActNoise,
        mode: bool = False,
    ) -> tuple[Tensor, Carry]:
        """One policy step for N environments.

        Args:
            obs: {key: (N, ...)}. is_first: (N,) bool. carry: of the last call.
            noise: randomness; zeros give modes. mode: take the policy's mode.

        Returns:
            Environment actions (N,) int64 and the carry for the next call.
        """
        rssm = self.world_model.rssm
        scan = rssm.start_scan(self.world_model.encoder(obs))
        state, _ = rssm.observe_step(
            carry.state, carry.action, scan, scan.embedded, is_first, noise.stoch
        )
        dist = self.actor(state.feat)
        action = dist.mode() if mode else dist.sample(noise.action)
        return self.decode_action(action), Carry(state, action)
