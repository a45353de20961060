"""How the agent learns: one update in each recipe's order, of what ``objective`` computes.

Legend: B batch, T time, A action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdreamer.agent import Agent
from fastdreamer.config import LearnerConfig
from fastdreamer.losses import critic_loss, replay_returns
from fastdreamer.objective import Batch, Imagined, Metrics, Objective, Observed
from fastdreamer.rssm import ImagineNoise, State


@dataclass(frozen=True)
class UpdateNoise:
    """Randomness of one update: ``post`` (B, T, S, K) Gumbel, and that of the rollout."""

    post: Tensor
    imagine: ImagineNoise


class Learner(Objective):
    """Updates an agent from replayed sequences. Subclasses fix the order of one update."""

    def __init__(self, agent: Agent, config: LearnerConfig, seed: int = 0):
        super().__init__(agent, config)
        self.generator = torch.Generator(agent.device).manual_seed(seed)
        self.params = {k: p for k, p in agent.named_parameters() if p.requires_grad}
        self.nu = {k: torch.zeros_like(p) for k, p in self.params.items()}
        """The optimiser's averages of squared gradients."""
        self.mu = {k: torch.zeros_like(p) for k, p in self.params.items()}
        """Its averages of gradients."""
        self.updates = 0
        self.count = torch.zeros((), dtype=torch.int64, device=agent.device)
        """The number of updates where they run: what a captured update reads and advances."""

    @staticmethod
    def make(agent: Agent, config: LearnerConfig, seed: int = 0) -> Learner:
        """The learner of the agent's recipe."""
        kind = JointLearner if agent.recipe.joint else SeparateLearner
        return kind(agent, config, seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the agent: optimisers, return scale, generator, update count."""
        return {
            "optimizer": {"nu": self.nu, "mu": self.mu},
            "scale": self.scale.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of :meth:`state_dict`."""
        optimizer = state["optimizer"]
        if "nu" not in optimizer:
            optimizer = self._named(optimizer)
        for name in self.params:
            self.nu[name].copy_(optimizer["nu"][name])
            self.mu[name].copy_(optimizer["mu"][name])
        self.scale.load_state_dict(state["scale"])
        self.generator.set_state(state["generator"].cpu())
        self.updates = state["updates"]
        self.count.fill_(self.updates)

    def tensors(self) -> list[Tensor]:
        """Everything on the device that an update changes, where the next one reads it."""
        moments = (*self.nu.values(), *self.mu.values())
        return [*self.agent.parameters(), *moments, *self.scale.buffers(), self.count]

    def _named(self, state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Moments by parameter from an older checkpoint: a ``torch.optim.Adam`` a network."""
        named: dict[str, dict[str, Tensor]] = {"nu": {}, "mu": {}}
        for network, adam in state.items():
            for i, (name, parameter) in enumerate(getattr(self.agent, network).named_parameters()):
                moments = adam["state"].get(i, {})  # none before the first update
                for ours, theirs in (("nu", "exp_avg_sq"), ("mu", "exp_avg")):
                    moment = moments.get(theirs, torch.zeros_like(parameter))
                    named[ours][f"{network}.{name}"] = moment
        return named

    def progress(self) -> int | Tensor:
        """Updates done: a number for the host's kernels, on a GPU a scalar tensor there."""
        return self.updates if self.agent.device.type == "cpu" else self.count

    def draw_noise(self, batch: int, length: int) -> UpdateNoise:
        """Fresh randomness for one update of ``batch`` sequences of ``length`` steps."""
        model, horizon, dtype = self.agent.model, self.config.horizon, self.agent.dtype
        latent = (model.stoch, model.classes)
        rows, gumbel = batch * length, self.ops.gumbel
        return UpdateNoise(
            gumbel((batch, length, *latent), self.generator, dtype),
            ImagineNoise(
                gumbel((rows, horizon, *latent), self.generator, dtype),
                self.agent.spec.noise((rows, horizon + 1), self.generator, dtype, gumbel),
            ),
        )

    def update(self, batch: Batch, noise: UpdateNoise | None = None) -> tuple[Metrics, State]:
        """One update from (B, T, ...) sequences.

        Args:
            batch: the observations by key; ``action`` (B, T, A) vectors taken *after* the
                observation; ``reward`` (B, T) received with it; ``is_first``, ``is_last`` and
                ``is_terminal`` (B, T) bool. In recipe 2025 also ``deter`` and ``stoch``, the
                latents stored with each step; its first step is context: the sequence starts
                from the latents there, and the losses are over the T - 1 others.
            noise: randomness; drawn from the learner's generator if None.

        Returns:
            Scalar tensors by name, on the device, and the posterior states of the loss's steps.
        """
        results = self.learn(batch, noise)
        self.updates += 1
        return results

    def learn(self, batch: Batch, noise: UpdateNoise | None = None) -> tuple[Metrics, State]:
        """The work of :meth:`update`, which the host only enqueues: it may be captured."""
        raise NotImplementedError

    def update_target(self) -> None:
        """Target critic <- moving average of the critic, after each update."""
        targets: list[Tensor] = list(self.agent.target_critic.parameters())
        critic = [p.data for p in self.agent.critic.parameters()]
        self.ops.ema(targets, critic, self.config.target_rate)


class SeparateLearner(Learner):
    """Recipe 2023: world model step, imagination with the updated model, actor and critic steps."""

    def learn(self, batch: Batch, noise: UpdateNoise | None = None) -> tuple[Metrics, State]:
        noise = noise or self.draw_noise(*batch["reward"].shape)
        with self.agent.products():
            observed = self.observe_batch(batch, noise.post)
            loss = self.world_model_loss(observed)
        metrics = observed.metrics | {"loss/world_model": loss.detach()}
        metrics |= self.step(["world_model"], loss)
        # Imagination runs the updated model from the posteriors before its update.
        cont = 1 - batch["is_terminal"].to(loss.dtype).flatten()
        with self.agent.products():
            imagined = self.imagine(observed.states.flatten(), cont, noise.imagine)
            policy_loss, value_loss, behaviour = self.behaviour_losses(imagined)
        metrics |= behaviour | self.step(["actor", "critic"], policy_loss + value_loss)
        self.update_target()
        self.count += 1
        return metrics, observed.states

    def observe_batch(self, batch: Batch, noise: Tensor) -> Observed:
        """World model over a batch whose rows all start from the initial state."""
        is_first = batch["is_first"].bool().clone()
        is_first[:, 0] = True
        previous = F.pad(batch["action"][:, :-1], (0, 0, 1, 0))
        return self.observe({**batch, "is_first": is_first}, None, previous, noise)

    def step(self, networks: list[str], loss: Tensor) -> Metrics:
        """Backward, then for each network clip by global norm and Adam; the norms before clipping.

        Networks that compiled heads joined in one graph need one backward pass for all.
        """
        names = {k: [n for n in self.params if n.startswith(f"{k}.")] for k in networks}
        every = [n for own in names.values() for n in own]
        grads = torch.autograd.grad(loss, [self.params[n] for n in every])
        by_name = dict(zip(every, grads, strict=True))
        step, norms = self.progress() + 1, {}
        for network, own in names.items():
            lists = [[x[n] for n in own] for x in (by_name, self.nu, self.mu)]
            data = [self.params[n].data for n in own]
            lr, clip, eps = (getattr(self.config, f"{k}_{network}") for k in ("lr", "clip", "eps"))
            norm = self.ops.clip_adam(data, *lists, step, lr, clip, eps=eps)
            norms[f"grad_norm/{network}"] = norm
        return norms


class JointLearner(Learner):
    """Recipe 2025: one loss, with a replay value loss, one LaProp step, then the target critic."""

    def learn(self, batch: Batch, noise: UpdateNoise | None = None) -> tuple[Metrics, State]:
        rows, length = batch["reward"].shape
        noise = noise or self.draw_noise(rows, length - 1)
        with self.agent.products():
            loss, metrics, states = self.loss(batch, noise)
        grads = list(torch.autograd.grad(loss, list(self.params.values())))
        metrics["grad_norm"] = self.step(grads)
        self.update_target()
        self.count += 1
        return metrics, states

    def loss(self, batch: Batch, noise: UpdateNoise) -> tuple[Tensor, Metrics, State]:
        """The total loss of a batch with one step of context, metrics, posterior states."""
        start = State(batch["deter"][:, 0], batch["stoch"][:, 0])
        previous = batch["action"][:, :-1]
        batch = {k: v[:, 1:] for k, v in batch.items()}
        # A step before a reset ends its episode, also where a run was cut.
        is_last = batch["is_last"].bool()
        cut = F.pad(batch["is_first"].bool()[:, 1:], (0, 1))
        batch["is_last"] = is_last | cut
        observed = self.observe(batch, start, previous, noise.post)
        states = observed.states
        cont = 1 - batch["is_terminal"].to(previous.dtype).flatten()
        imagined = self.imagine(states.flatten(), cont, noise.imagine)
        policy_loss, value_loss, metrics = self.behaviour_losses(imagined)
        replay_loss = self.replay_value_loss(batch, states, imagined)
        total = self.world_model_loss(observed) + policy_loss + value_loss
        total = total + self.config.replay_value_scale * replay_loss
        metrics |= observed.metrics | {
            "loss/total": total.detach(),
            "loss/replay_value": replay_loss.detach(),
        }
        return total, metrics, states

    def replay_value_loss(self, batch: Batch, states: State, imagined: Imagined) -> Tensor:
        """Critic loss on the replayed states, which also trains the world model (scalar).

        Returns are bootstrapped from the imagined return of each state.
        Source: DreamerV3 (Nature), "Critic learning".
        """
        feat = self.agent.world_model.rssm.features(states)
        boot = imagined.returns[:, 0].unflatten(0, batch["reward"].shape)
        last, terminal = batch["is_last"].to(feat.dtype), batch["is_terminal"].to(feat.dtype)
        config = self.config
        returns = replay_returns(
            batch["reward"], last, terminal, boot, config.gamma, config.lam, self.ops
        )
        target_logits = self.agent.target_critic(feat.detach())
        slow = self.ops.twohot_mean(target_logits, self.recipe.bins)
        targets = (returns, slow[:, :-1].detach())
        return critic_loss(
            self.agent.critic(feat), targets, 1 - last[:, :-1], self.recipe.bins, self.ops
        )

    def step(self, grads: list[Tensor]) -> Tensor:
        """Adaptive clipping and LaProp with linear warm-up; the first update has rate 0.

        Returns the norm of all gradients (scalar).
        """
        config, params = self.config, [p.data for p in self.params.values()]
        nu, mu = list(self.nu.values()), list(self.mu.values())
        step = self.progress() + 1
        rate = warm_up(config.lr, step - 1, config.warmup)
        clip = config.clip_adaptive
        return self.ops.agc_laprop(params, grads, nu, mu, step, rate, clip, eps=config.eps)


def warm_up(rate: float, updates: int | Tensor, over: int) -> float | Tensor:
    """The learning rate after so many updates: from 0 up to ``rate`` in a line."""
    if not over:
        return rate
    if isinstance(updates, Tensor):
        return rate * (updates / over).clamp(max=1)
    return rate * min(1.0, updates / over)
