"""How the agent learns: the losses as pure functions, then one update in the paper's order.

Legend: B batch, T time, N = B T, H horizon, A action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.agent import Agent
from fastdreamer.config import LearnerConfig
from fastdreamer.distributions import gumbel
from fastdreamer.kernels.ops import Ops
from fastdreamer.kernels.twohot import symlog
from fastdreamer.rssm import ImagineNoise, State

Metrics = dict[str, Tensor]


def reconstruction_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error without the 1/2, summed per step: (B, T, ...) -> (B, T).

    Images (uint8 targets) in units of x/255 - 0.5; vectors in symlog space, where entries below
    1e-8 count as 0.
    """
    if target.dtype == torch.uint8:
        return (pred - (target.to(pred.dtype) / 255 - 0.5)).square().flatten(2).sum(-1)
    error = (pred - symlog(target.to(pred.dtype))).square()
    return error.masked_fill(error < 1e-8, 0).sum(-1)


def kl_losses(post: Tensor, prior: Tensor, free_nats: float, ops: Ops) -> tuple[Tensor, ...]:
    """Dynamics and representation KL with free nats, and the plain KL: each (B, T) nats.

    Args:
        post, prior: (B, T, S, K) log-probabilities. The free nats bound the sum over latents.

    Source: DreamerV3, eq. 5.
    """
    dyn = ops.kl(post.detach(), prior).sum(-1)
    rep = ops.kl(post, prior.detach()).sum(-1)
    return dyn.clamp(min=free_nats), rep.clamp(min=free_nats), dyn.detach()


def actor_loss(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, weight: Tensor, entropy_scale: float
) -> Tensor:
    """REINFORCE with an entropy bonus, all (N, H) -> scalar. Source: DreamerV3, eq. 11."""
    return -(weight * (log_prob * advantage.detach() + entropy_scale * entropy)).mean()


def critic_loss(
    logits: Tensor, returns: Tensor, target_value: Tensor, weight: Tensor, ops: Ops
) -> Tensor:
    """Two-hot loss to the returns and to the target critic: (N, H, bins), (N, H) -> scalar."""
    loss = ops.twohot_loss(logits, returns) + ops.twohot_loss(logits, target_value)
    return (weight * loss).mean()


class ReturnScale(nn.Module):
    """Running 5 to 95 percentile range of the returns, in float32. Source: DreamerV3, eq. 12."""

    low: Tensor
    high: Tensor
    quantiles: Tensor

    def __init__(self, decay: float, limit: float, percentiles: tuple[float, float]):
        super().__init__()
        self.decay, self.limit = decay, limit
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("quantiles", torch.tensor(percentiles), persistent=False)

    def forward(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Update with ``returns`` (any shape), then give (offset, scale), both scalar."""
        levels = torch.quantile(returns.detach().float().flatten(), self.quantiles.float())
        for buffer, level in zip((self.low, self.high), levels, strict=True):
            buffer.copy_(self.decay * buffer.float() + (1 - self.decay) * level)
        return self.low.clone(), (self.high - self.low).clamp(min=self.limit)


@dataclass(frozen=True)
class UpdateNoise:
    """Randomness of one update: ``post`` (B, T, S, K) Gumbel, and that of the rollout."""

    post: Tensor
    imagine: ImagineNoise


@dataclass(frozen=True)
class Imagined:
    """An imagined rollout and what the heads say of it; (N, H + 1, ...), start first."""

    states: State
    actions: Tensor
    rewards: Tensor
    conts: Tensor
    values: Tensor
    returns: Tensor  # (N, H)
    weight: Tensor  # (N, H + 1), discount from the start on
    advantage: Tensor  # (N, H)
    target_values: Tensor  # (N, H)


class Learner:
    """Updates an agent from replayed sequences, in the order of recipe 2023.

    One update: target critic EMA, world model step, imagination with the updated world model
    from the posteriors before it, actor step, critic step.
    """

    def __init__(self, agent: Agent, config: LearnerConfig, seed: int = 0):
        self.agent, self.config, self.ops = agent, config, agent.ops
        device = agent.world_model.rssm.initial_deter.device
        self.scale = ReturnScale(
            config.return_decay, config.return_limit, (config.return_low, config.return_high)
        ).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.updates = 0
        self.optimizers = {
            "world_model": self._adam(
                agent.world_model, config.lr_world_model, config.eps_world_model
            ),
            "actor": self._adam(agent.actor, config.lr_actor, config.eps_actor),
            "critic": self._adam(agent.critic, config.lr_critic, config.eps_critic),
        }
        self.clip = {
            "world_model": config.clip_world_model,
            "actor": config.clip_actor,
            "critic": config.clip_critic,
        }

    @staticmethod
    def _adam(module: nn.Module, lr: float, eps: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=lr, eps=eps, fused=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the agent: optimisers, return scale, generator, update count."""
        return {
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "scale": self.scale.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of :meth:`state_dict`."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scale.load_state_dict(state["scale"])
        self.generator.set_state(state["generator"].cpu())
        self.updates = state["updates"]

    def draw_noise(self, batch: int, length: int) -> UpdateNoise:
        """Fresh randomness for one update of ``batch`` sequences of ``length`` steps."""
        model, horizon = self.agent.model, self.config.horizon
        latent = (model.stoch, model.classes)
        draw = lambda *shape: gumbel(shape, self.generator, self.agent.dtype)  # noqa: E731
        rows = batch * length
        return UpdateNoise(
            draw(batch, length, *latent),
            ImagineNoise(draw(rows, horizon, *latent), draw(rows, horizon + 1, self.agent.actions)),
        )

    def update(self, batch: Mapping[str, Tensor], noise: UpdateNoise | None = None) -> Metrics:
        """One update from (B, T, ...) sequences.

        Args:
            batch: the observations by key, ``action`` (as the environment takes it, or vectors
                (B, T, A)) taken *after* the observation, ``reward`` (B, T) received with it,
                ``is_first`` and ``is_terminal`` (B, T) bool.
            noise: randomness; drawn from the learner's generator if None.

        Returns:
            Scalar tensors by name, on the device.
        """
        if noise is None:
            noise = self.draw_noise(*batch["reward"].shape)
        self.update_target()
        loss, states, metrics = self.world_model_loss(batch, noise.post)
        metrics |= self.step("world_model", loss)
        imagined = self.imagine(states.flatten(), 1 - _flat(batch["is_terminal"]), noise.imagine)
        policy_loss, value_loss, behaviour = self.behaviour_losses(imagined)
        metrics |= behaviour | self.step("actor", policy_loss) | self.step("critic", value_loss)
        self.updates += 1
        return metrics

    @torch.no_grad()
    def update_target(self) -> None:
        """Target critic <- critic at the very first update, an EMA of it later."""
        rate = self.config.target_rate if self.updates else 1.0
        targets: list[Tensor] = list(self.agent.target_critic.parameters())
        critic: list[Tensor] = list(self.agent.critic.parameters())
        torch._foreach_lerp_(targets, critic, rate)

    def step(self, name: str, loss: Tensor) -> Metrics:
        """Backward, clip by global norm, Adam; returns the norm before clipping."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        params = getattr(self.agent, name).parameters()
        norm = nn.utils.clip_grad_norm_(params, self.clip[name])
        optimizer.step()
        return {f"grad_norm/{name}": norm}

    def world_model_loss(
        self, batch: Mapping[str, Tensor], noise: Tensor
    ) -> tuple[Tensor, State, Metrics]:
        """Loss of the world model (scalar), posterior states (B, T, ...), metrics.

        Source: DreamerV3, eq. 4-5.
        """
        model, config, ops = self.agent.world_model, self.config, self.ops
        obs = {k: batch[k] for k in self.agent.obs_space}
        action = batch["action"]
        if not action.is_floating_point():
            action = self.agent.encode_action(action)
        previous = F.pad(action[:, :-1], (0, 0, 1, 0))  # the action before each observation
        is_first = batch["is_first"].bool().clone()
        is_first[:, 0] = True
        states, post, prior = model.rssm.observe(model.encoder(obs), previous, is_first, noise)
        feat = states.feat
        dyn, rep, kl = kl_losses(post, prior, config.free_nats, ops)
        losses = {k: reconstruction_loss(v, obs[k]) for k, v in model.decoder(feat).items()}
        losses["reward"] = ops.twohot_loss(model.reward(feat), batch["reward"])
        logit, target = model.cont(feat).squeeze(-1), 1 - batch["is_terminal"].to(feat.dtype)
        losses["cont"] = config.cont_scale * F.binary_cross_entropy_with_logits(
            logit, target, reduction="none"
        )
        losses["kl"] = config.kl_dynamics * dyn + config.kl_representation * rep
        total = torch.stack(list(losses.values())).sum(0).mean()
        metrics = {f"loss/{k}": v.detach().mean() for k, v in losses.items()}
        with torch.no_grad():
            metrics |= {
                "loss/world_model": total.detach(),
                "kl": kl.mean(),
                "entropy/posterior": ops.entropy(post).sum(-1).mean(),
                "entropy/prior": ops.entropy(prior).sum(-1).mean(),
            }
        return total, states, metrics

    @torch.no_grad()
    def imagine(self, start: State, cont: Tensor, noise: ImagineNoise) -> Imagined:
        """Roll out from N starts (``cont`` (N,): 1 where they are not terminal) and judge it.

        Source: DreamerV3, eq. 6-7 and 12. Updates the return scale.
        """
        model, config, ops = self.agent.world_model, self.config, self.ops
        states, actions = model.rssm.imagine(start, self.agent.actor.sample, noise)
        feat = states.feat
        rewards = ops.twohot_mean(model.reward(feat))
        conts = (model.cont(feat).squeeze(-1) > 0).to(feat.dtype)
        conts[:, 0] = cont
        values = ops.twohot_mean(self.agent.critic(feat))
        discount = config.gamma * conts
        returns = ops.lambda_return(
            rewards[:, 1:],
            discount[:, 1:],
            values[:, 1:],
            discount.new_tensor(config.lam).expand_as(rewards[:, 1:]),
        )
        offset, scale = self.scale(returns)
        advantage = (returns - offset) / scale - (values[:, :-1] - offset) / scale
        weight = discount.cumprod(1) / config.gamma
        target_values = ops.twohot_mean(self.agent.target_critic(feat[:, :-1]))
        return Imagined(
            states, actions, rewards, conts, values, returns, weight, advantage, target_values
        )

    def behaviour_losses(self, imagined: Imagined) -> tuple[Tensor, Tensor, Metrics]:
        """Actor and critic losses (scalars) of a rollout, and metrics."""
        feat = imagined.states.feat[:, :-1]
        weight = imagined.weight[:, :-1]
        dist = self.agent.actor(feat)
        entropy = dist.entropy()
        policy_loss = actor_loss(
            dist.log_prob(imagined.actions[:, :-1]),
            entropy,
            imagined.advantage,
            weight,
            self.config.entropy_scale,
        )
        value_loss = critic_loss(
            self.agent.critic(feat), imagined.returns, imagined.target_values, weight, self.ops
        )
        metrics = {
            "loss/policy": policy_loss.detach(),
            "loss/value": value_loss.detach(),
            "entropy/policy": entropy.detach().mean(),
            "imagined/reward": imagined.rewards.mean(),
            "imagined/value": imagined.values.mean(),
            "imagined/return": imagined.returns.mean(),
            "return/low": self.scale.low.clone(),
            "return/high": self.scale.high.clone(),
        }
        return policy_loss, value_loss, metrics


def _flat(flag: Tensor) -> Tensor:
    return flag.to(torch.float32).flatten()
