"""What the networks say of a batch and of what they imagine from it, and the losses of that.

Legend: B batch, T time, N = B T, H horizon, A action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.config import LearnerConfig
from fastdreamer.kernels.heads import Head, Ran
from fastdreamer.kernels.latent_linear import Latents
from fastdreamer.losses import (
    ReturnScale,
    actor_loss,
    critic_loss,
    kl_losses,
    reconstruction_loss,
)
from fastdreamer.rssm import ImagineNoise, State

Metrics = dict[str, Tensor]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Observed:
    """The world model's pass over a batch, (B, T, ...)."""

    states: State
    losses: dict[str, Tensor]
    """Unscaled, each (B, T)."""
    metrics: Metrics


@dataclass(frozen=True)
class Imagined:
    """An imagined rollout and what the heads say of it; (N, H + 1, ...), start first."""

    feat: Tensor
    policy_hidden: Tensor  # of the actor's last hidden layer, with gradient to it
    actions: Tensor
    rewards: Tensor
    conts: Tensor
    value_logits: Tensor  # (N, H + 1, bins), with gradient to the critic
    values: Tensor
    returns: Tensor  # (N, H)
    weight: Tensor  # (N, H + 1), discount from the start on
    advantage: Tensor  # (N, H)
    target_values: Tensor  # (N, H)


class Objective:
    """What an agent learns from: both recipes' losses, and the running scale of the returns."""

    def __init__(self, agent: Agent, config: LearnerConfig):
        self.agent, self.config = agent, config
        self.ops, self.recipe = agent.ops, agent.recipe
        self.scale = ReturnScale(
            config.return_decay, config.return_limit, (config.return_low, config.return_high)
        ).to(agent.device)

    def observe(
        self, batch: Batch, start: State | None, previous: Tensor, noise: Tensor
    ) -> Observed:
        """World model over a batch; ``previous`` (B, T, A) are the actions before each step.

        Source: DreamerV3, eq. 4-5.
        """
        is_first = batch["is_first"].bool()
        rssm = self.agent.world_model.rssm
        states, post = rssm.observe(start, self.encode(batch), previous, is_first, noise)
        return self.predict(batch, states, post)

    def encode(self, batch: Batch) -> Tensor:
        """Embeddings of the observations (B, T, E)."""
        return self.agent.world_model.encoder({k: batch[k] for k in self.agent.obs_space})

    def predict(self, batch: Batch, states: State, post: Tensor) -> Observed:
        """What the model says of states (B, T, ...), beside what happened.

        Args:
            post: their posterior log-probabilities (B, T, S, K).
        """
        model, config, ops = self.agent.world_model, self.config, self.ops
        obs = {k: batch[k] for k in self.agent.obs_space}
        prior, feat = model.rssm.prior(states.deter), model.rssm.features(states)
        losses = self.reconstruction_losses(model.decode(states, raw=True), obs)
        losses["reward"] = ops.twohot_loss(model.reward(feat), batch["reward"], self.recipe.bins)
        target = 1 - batch["is_terminal"].to(feat.dtype)
        if self.recipe.soft_continue:
            target = target * config.gamma
        losses["cont"] = F.binary_cross_entropy_with_logits(
            model.cont(feat).squeeze(-1), target, reduction="none"
        )
        losses["dyn"], losses["rep"], kl = kl_losses(post, prior, config.free_nats, ops)
        with torch.no_grad():
            metrics = {f"loss/{k}": v.mean() for k, v in losses.items()} | {
                "kl": kl.mean(),
                "entropy/posterior": ops.entropy(post).sum(-1).mean(),
                "entropy/prior": ops.entropy(prior).sum(-1).mean(),
            }
        return Observed(states, losses, metrics)

    def reconstruction_losses(self, recon: Metrics, obs: Batch) -> dict[str, Tensor]:
        """Of what the decoder gives before a sigmoid, (B, T) by key."""
        recipe, decoder = self.recipe, self.agent.world_model.decoder
        options = (recipe.image_shift, decoder.squashes)
        return {
            k: self.ops.image_loss(x, obs[k], *options)
            if k in decoder.images
            else reconstruction_loss(x, obs[k], recipe)
            for k, x in recon.items()
        }

    def world_model_loss(self, observed: Observed) -> Tensor:
        """Weighted sum of the losses' means (scalar)."""
        config = self.config
        scales = {
            "dyn": config.kl_dynamics,
            "rep": config.kl_representation,
            "cont": config.cont_scale,
        }
        total = [scales.get(k, 1.0) * v for k, v in observed.losses.items()]
        return torch.stack(total).sum(0).mean()

    def imagine(self, start: State, cont: Tensor, noise: ImagineNoise) -> Imagined:
        """Roll out from N starts (``cont`` (N,): 1 where they are not terminal) and judge it.

        Without gradient but for the value's logits. Updates the return scale.
        Source: DreamerV3, eq. 6-7 and 12.
        """
        agent = self.agent
        with agent.products(cache=False):
            rollout = agent.world_model.rssm.imagine(start, agent.actor.weights(), noise)
        return self.judge(*rollout, cont)

    def judge(
        self, feat: Tensor, latents: Latents, actions: Tensor, ran: Ran | None, cont: Tensor
    ) -> Imagined:
        """Rewards, values and returns of a rollout; arguments as in :class:`Imagined`.

        Args:
            ran: what the policy's hidden layers gave for ``feat``, where that was kept.
        """
        agent, config, ops, bins = self.agent, self.config, self.ops, self.recipe.bins
        model = agent.world_model
        given = [
            Head(model.reward.weights(), bins),
            Head(agent.target_critic.weights(), bins),
            Head(model.cont.weights()),
            Head(agent.critic.weights(), trained=True),
            Head(agent.actor.mlp.weights(), trained=True, ran=ran),
        ]
        rewards, target_values, logits, value_logits, hidden = ops.heads(
            feat, latents, given, model.reward.eps
        )
        with torch.no_grad():
            logits = logits.squeeze(-1)
            if self.recipe.soft_continue:  # the discount is in the probability
                conts, gamma = torch.sigmoid(logits), 1.0
            else:
                conts, gamma = (logits > 0).to(feat.dtype), config.gamma
                conts[:, 0] = cont
            values = ops.twohot_mean(value_logits, bins)
            discount = gamma * conts
            lam = discount.new_full((), config.lam).expand_as(rewards[:, 1:])
            returns = ops.lambda_return(rewards[:, 1:], discount[:, 1:], values[:, 1:], lam)
            return Imagined(
                feat=feat,
                policy_hidden=hidden,
                actions=actions,
                rewards=rewards,
                conts=conts,
                value_logits=value_logits,
                values=values,
                returns=returns,
                weight=discount.cumprod(1) / gamma,
                advantage=(returns - values[:, :-1]) / self.scale(returns),
                target_values=target_values[:, :-1],
            )

    def behaviour_losses(self, imagined: Imagined) -> tuple[Tensor, Tensor, Metrics]:
        """Actor and critic losses (scalars) of a rollout, and metrics."""
        policy_loss, entropy = self.policy_loss(imagined)
        value_loss = self.value_loss(imagined)
        metrics = {
            "loss/policy": policy_loss.detach(),
            "loss/value": value_loss.detach(),
            "entropy/policy": entropy.detach(),
            "imagined/reward": imagined.rewards.mean(),
            "imagined/value": imagined.values.mean(),
            "imagined/return": imagined.returns.mean(),
            "return/low": self.scale.low.clone(),
            "return/high": self.scale.high.clone(),
        }
        return policy_loss, value_loss, metrics

    def policy_loss(self, imagined: Imagined) -> tuple[Tensor, Tensor]:
        """The actor's loss and the mean entropy of its policy (scalars)."""
        policy = self.agent.actor.policy(imagined.policy_hidden)
        log_prob, entropy = policy.log_prob(imagined.actions)[:, :-1], policy.entropy()[:, :-1]
        weight, scale = imagined.weight[:, :-1], self.config.entropy_scale
        return actor_loss(log_prob, entropy, imagined.advantage, weight, scale), entropy.mean()

    def value_loss(self, imagined: Imagined) -> Tensor:
        """The critic's loss on imagined states (scalar)."""
        targets, weight = (imagined.returns, imagined.target_values), imagined.weight[:, :-1]
        return critic_loss(imagined.value_logits, targets, weight, self.recipe.bins, self.ops)
