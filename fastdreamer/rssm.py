"""The recurrent state-space model: posterior scan over observations, prior rollout in imagination.

Legend: B batch, T time, N = B T, H horizon, D deter, S stoch, K classes, A action, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdreamer.kernels.ops import Ops
from fastdreamer.nets import Dense, LayerNorm, Linear


@dataclass(frozen=True)
class State:
    """Latent state: deter (..., D) float, stoch (..., S, K) one-hot float."""

    deter: Tensor
    stoch: Tensor

    @property
    def feat(self) -> Tensor:
        """(..., S K + D) input of every head: stoch first, then deter."""
        return torch.cat([self.stoch.flatten(-2), self.deter], -1)

    def flatten(self) -> State:
        """(B, T, ...) -> (B T, ...), cut from the gradient: the starts of imagination."""
        return State(self.deter.detach().flatten(0, 1), self.stoch.detach().flatten(0, 1))


@dataclass(frozen=True)
class Scan:
    """Initial state, deter's share of the posterior's first weight, embedding's product."""

    initial: State
    weight: Tensor  # (hidden, D)
    embedded: Tensor  # (..., hidden)


@dataclass(frozen=True)
class ImagineNoise:
    """Randomness of a rollout: ``stoch`` (N, H, S, K) Gumbel, ``action`` (N, H + 1, A)."""

    stoch: Tensor
    action: Tensor


class Cell(nn.Module):
    """Input block and LayerNorm-GRU: (B, S K), (B, A), (B, D) -> next deter (B, D)."""

    def __init__(self, inputs: int, deter: int, hidden: int, ops: Ops):
        super().__init__()
        self.input = Dense(inputs, hidden)
        self.gates = Linear(deter + hidden, 3 * deter, bias=False)
        self.norm = LayerNorm(3 * deter)
        self.ops = ops

    def forward(self, stoch: Tensor, action: Tensor, deter: Tensor) -> Tensor:
        x = self.input(torch.cat([stoch, action], -1))
        norm = self.norm
        return self.ops.gru_step(deter, x, self.gates.weight, norm.weight, norm.bias, norm.eps)


class LatentHead(nn.Module):
    """Hidden block and output layer: (..., I) -> unimixed log-probabilities (..., S, K)."""

    def __init__(self, inputs: int, hidden: int, stoch: int, classes: int, mix: float, ops: Ops):
        super().__init__()
        self.hidden = Dense(inputs, hidden)
        self.out = Linear(hidden, stoch * classes, init="uniform")
        self.shape, self.mix, self.ops = (stoch, classes), mix, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.logp(self.hidden(x))

    def logp(self, x: Tensor) -> Tensor:
        return self.ops.unimix(self.out(x).unflatten(-1, self.shape), self.mix)


class RSSM(nn.Module):
    """Sequence model with categorical latents. Source: DreamerV3, eq. 3.

    Noise is standard Gumbel of the shape of the latents; zeros draw the mode.
    """

    def __init__(
        self,
        embed: int,
        action: int,
        *,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        unimix: float,
        ops: Ops,
    ):
        super().__init__()
        self.latent = (stoch, classes)
        self.deter = deter
        self.feat = stoch * classes + deter
        self.initial_deter = nn.Parameter(torch.zeros(deter))
        self.cell = Cell(stoch * classes + action, deter, hidden, ops)
        self.prior = LatentHead(deter, hidden, stoch, classes, unimix, ops)
        self.posterior = LatentHead(deter + embed, hidden, stoch, classes, unimix, ops)
        self.ops = ops

    def initial(self) -> State:
        """The learned start: deter (D,) = tanh of a parameter, stoch (S, K) its prior's mode."""
        deter = torch.tanh(self.initial_deter)
        logp = self.prior(deter).detach()
        return State(deter, self.ops.sample(logp, torch.zeros_like(logp)))

    def start_scan(self, embed: Tensor) -> Scan:
        """What a posterior scan needs that does not depend on the recurrence; embed (..., E).

        The embedding's share of the posterior's first product is one product for all steps.
        """
        weight = self.posterior.hidden.linear.weight
        by_deter, by_embed = weight.split([self.deter, embed.shape[-1]], 1)
        return Scan(self.initial(), by_deter, F.linear(embed, by_embed))

    def observe_step(
        self,
        state: State,
        action: Tensor,
        scan: Scan,
        embedded: Tensor,
        is_first: Tensor,
        noise: Tensor,
    ) -> tuple[State, Tensor]:
        """One posterior step; where ``is_first``, from the initial state and a zero action.

        Args:
            state: the last state, of B rows. action: (B, A) that followed it.
            scan: from :meth:`start_scan`. embedded: (B, hidden), this step's ``scan.embedded``.
            is_first: (B,) bool. noise: (B, S, K).

        Returns:
            The new state and its posterior log-probabilities (B, S, K).
        """
        first = is_first[:, None]
        deter = torch.where(first, scan.initial.deter, state.deter)
        stoch = torch.where(first[..., None], scan.initial.stoch, state.stoch)
        action = action.masked_fill(first, 0)
        deter = self.cell(stoch.flatten(-2), action, deter)
        x = F.linear(deter, scan.weight) + embedded
        logp = self.posterior.logp(self.posterior.hidden.activate(x))
        return State(deter, self.ops.sample(logp, noise)), logp

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[State, Tensor, Tensor]:
        """Posterior scan. ``action[:, t]`` is the one taken *before* observation t.

        Args:
            embed: (B, T, E). action: (B, T, A). is_first: (B, T) bool, true at t = 0.
            noise: (B, T, S, K).

        Returns:
            States (B, T, ...), posterior and prior log-probabilities (B, T, S, K).
        """
        scan = self.start_scan(embed)
        rows = embed.shape[0]
        state = State(scan.initial.deter.expand(rows, -1), scan.initial.stoch.expand(rows, -1, -1))
        steps = (x.unbind(1) for x in (action, scan.embedded, is_first, noise))
        states, logps = [], []
        for act, embedded, first, gumbel in zip(*steps, strict=True):
            state, logp = self.observe_step(state, act, scan, embedded, first, gumbel)
            states.append(state)
            logps.append(logp)
        deter = torch.stack([s.deter for s in states], 1)
        stoch = torch.stack([s.stoch for s in states], 1)
        return State(deter, stoch), torch.stack(logps, 1), self.prior(deter)

    def imagine_step(self, state: State, action: Tensor, noise: Tensor) -> State:
        """One prior step under ``action`` (N, A) with ``noise`` (N, S, K)."""
        deter = self.cell(state.stoch.flatten(-2), action, state.deter)
        return State(deter, self.ops.sample(self.prior(deter), noise))

    @torch.no_grad()
    def imagine(
        self, start: State, policy: Callable[[Tensor, Tensor], Tensor], noise: ImagineNoise
    ) -> tuple[State, Tensor]:
        """Rollout under ``policy(feat, noise) -> action``, without gradient.

        Args:
            start: states of N rows.
            noise: stoch (N, H, S, K) and action (N, H + 1, A).

        Returns:
            States (N, H + 1, ...), the start first, and the action taken in each (N, H + 1, A).
        """
        states, actions = [start], [policy(start.feat, noise.action[:, 0])]
        for t in range(noise.stoch.shape[1]):
            states.append(self.imagine_step(states[-1], actions[-1], noise.stoch[:, t]))
            actions.append(policy(states[-1].feat, noise.action[:, t + 1]))
        deter = torch.stack([s.deter for s in states], 1)
        stoch = torch.stack([s.stoch for s in states], 1)
        return State(deter, stoch), torch.stack(actions, 1)
