"""The recurrent state-space model: posterior scan over observations, prior rollout in imagination.

Legend: B batch, T time, N = B T, H horizon, D deter, S stoch, K classes, A action, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from fastdreamer.config import ModelConfig
from fastdreamer.kernels.heads import Ran
from fastdreamer.kernels.latent_linear import Latents
from fastdreamer.kernels.ops import Ops
from fastdreamer.kernels.rssm_imagine import PolicyWeights
from fastdreamer.kernels.rssm_weights import (
    BlockGRUWeights,
    GRUWeights,
    Layer,
    RSSMWeights,
)
from fastdreamer.nets import BlockLinear, Dense, Linear, full, make_norm, output_init
from fastdreamer.recipe import Recipe


@dataclass(frozen=True)
class State:
    """Latent state: deter (..., D) float, stoch (..., S, K) one-hot float."""

    deter: Tensor
    stoch: Tensor

    def flatten(self) -> State:
        """(B, T, ...) -> (B T, ...), cut from the gradient: the starts of imagination."""
        return State(self.deter.detach().flatten(0, 1), self.stoch.detach().flatten(0, 1))

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """T states (B, ...) -> (B, T, ...)."""
        deter = torch.stack([s.deter for s in states], 1)
        return State(deter, torch.stack([s.stoch for s in states], 1))


@dataclass(frozen=True)
class Scan:
    """What a posterior scan takes beside states and actions."""

    weights: RSSMWeights
    embedded: Tensor  # (..., hidden), the embedding's share of the posterior's first layer


@dataclass(frozen=True)
class ImagineNoise:
    """Randomness of a rollout: ``stoch`` (N, H, S, K) Gumbel, ``action`` (N, H + 1, A)."""

    stoch: Tensor
    action: Tensor


class GRUCell(nn.Module):
    """Input block and LayerNorm-GRU: (B, S K), (B, A), (B, D) -> next deter (B, D)."""

    def __init__(self, stoch: int, action: int, model: ModelConfig, recipe: Recipe, ops: Ops):
        super().__init__()
        self.input = Dense(stoch + action, model.hidden, recipe, ops)
        self.gates = Linear(model.deter + model.hidden, 3 * model.deter, recipe, bias=False)
        self.norm = make_norm(3 * model.deter, recipe)

    def weights(self) -> GRUWeights:
        return GRUWeights(self.input.weights(), self.gates.weight, self.norm.weight, self.norm.bias)

    def forward(self, stoch: Tensor, action: Tensor, deter: Tensor) -> Tensor:
        return self.weights().step(stoch, action, deter, self.norm.eps)


class BlockGRUCell(nn.Module):
    """Three input blocks and block-GRU: (B, S K), (B, A), (B, D) -> next deter (B, D)."""

    def __init__(self, stoch: int, action: int, model: ModelConfig, recipe: Recipe, ops: Ops):
        super().__init__()
        self.input = nn.ModuleDict(
            {
                "deter": Dense(model.deter, model.hidden, recipe, ops),
                "stoch": Dense(stoch, model.hidden, recipe, ops),
                "action": Dense(action, model.hidden, recipe, ops),
            }
        )
        wide = model.deter + model.blocks * 3 * model.hidden
        self.hidden = BlockLinear(wide, model.deter, model.blocks, recipe)
        self.norm = make_norm(model.deter, recipe)
        self.gates = BlockLinear(model.deter, 3 * model.deter, model.blocks, recipe)

    def weights(self) -> BlockGRUWeights:
        inputs = (cast(Dense, self.input[k]).weights() for k in ("deter", "stoch", "action"))
        hidden, gates = self.hidden, self.gates
        rest = (hidden.weight, hidden.bias, self.norm.weight, gates.weight, gates.bias)
        return BlockGRUWeights(*inputs, *rest)

    def forward(self, stoch: Tensor, action: Tensor, deter: Tensor) -> Tensor:
        return self.weights().step(stoch, action, deter, self.norm.eps)


class LatentHead(nn.Module):
    """Hidden blocks and output layer: (..., I) -> unimixed log-probabilities (..., S, K)."""

    def __init__(self, inputs: int, layers: int, model: ModelConfig, recipe: Recipe, ops: Ops):
        super().__init__()
        sizes = [inputs] + [model.hidden] * layers
        self.hidden = nn.Sequential(*(Dense(i, o, recipe, ops) for i, o in pairwise(sizes)))
        outputs = model.stoch * model.classes
        self.out = Linear(model.hidden, outputs, recipe, init=output_init(recipe))
        self.shape, self.mix, self.ops = (model.stoch, model.classes), model.unimix, ops

    def weights(self) -> tuple[Layer, ...]:
        hidden = (cast(Dense, block).weights() for block in self.hidden)
        return (*hidden, Layer(self.out.weight, self.out.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.unimix(full(self.out(self.hidden(x))).unflatten(-1, self.shape), self.mix)


class RSSM(nn.Module):
    """Sequence model with categorical latents. Source: DreamerV3, eq. 3.

    Noise is standard Gumbel of the shape of the latents; zeros draw the mode.
    """

    def __init__(self, embed: int, action: int, model: ModelConfig, recipe: Recipe, ops: Ops):
        super().__init__()
        self.latent = (model.stoch, model.classes)
        self.deter, self.stoch = model.deter, model.stoch * model.classes
        self.feat = self.deter + self.stoch
        self.recipe, self.ops = recipe, ops
        if recipe.learned_initial:
            self.initial_deter = nn.Parameter(torch.zeros(model.deter))
        cell = GRUCell if recipe.cell == "gru" else BlockGRUCell
        self.cell = cell(self.stoch, action, model, recipe, ops)
        self.prior = LatentHead(self.deter, recipe.prior_layers, model, recipe, ops)
        self.posterior = LatentHead(self.deter + embed, 1, model, recipe, ops)

    def features(self, state: State) -> Tensor:
        """(..., D + S K) input of the heads, in the recipe's order."""
        parts = (state.deter, state.stoch.flatten(-2))
        return torch.cat(parts if self.recipe.deter_first else parts[::-1], -1)

    def initial(self) -> State:
        """Where episodes start, deter (D,), stoch (S, K): zeros, or the learned start.

        The learned one is deter = tanh of a parameter and the mode of its prior.
        """
        if not self.recipe.learned_initial:
            return self.zeros()
        deter = torch.tanh(self.initial_deter)
        logp = self.prior(deter).detach()
        return State(deter, self.ops.sample(logp, torch.zeros_like(logp)))

    def zeros(self) -> State:
        """A state of zeros, deter (D,), stoch (S, K)."""
        weight = self.posterior.out.weight
        return State(weight.new_zeros(self.deter), weight.new_zeros(self.latent))

    def weights(self, resets: bool = True) -> RSSMWeights:
        """All weights, as the scans take them; zeros to start from where there are no resets."""
        first, out = self.posterior.weights()
        initial = self.initial() if resets else self.zeros()
        return RSSMWeights(
            cell=self.cell.weights(),
            posterior=(first._replace(weight=first.weight[:, : self.deter], bias=None), out),
            prior=self.prior.weights(),
            initial_deter=initial.deter,
            initial_stoch=initial.stoch,
            eps=self.cell.norm.eps,
            mix=self.prior.mix,
        )

    def start_scan(self, embed: Tensor) -> Scan:
        """What a posterior scan needs that does not depend on the recurrence; embed (..., E).

        The embedding's share of the posterior's first product is one product for all steps.
        """
        return Scan(self.weights(), self.embedding()(embed, self.cell.norm.eps))

    def embedding(self) -> Layer:
        """The embedding's share of the posterior's first product, with the bias."""
        linear = cast(Dense, self.posterior.hidden[0]).linear
        return Layer(linear.weight[:, self.deter :], linear.bias)

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
        steps = (x.unsqueeze(1) for x in (action, embedded, is_first, noise))
        outputs = self.ops.rssm_observe(scan.weights, state.deter, state.stoch, *steps)
        deter, stoch, logp = (x.squeeze(1) for x in outputs)
        return State(deter, stoch), logp

    def observe(
        self,
        start: State | None,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        noise: Tensor,
    ) -> tuple[State, Tensor]:
        """Posterior scan. ``action[:, t]`` is the one taken *before* observation t.

        Args:
            start: state before the first step, (B, ...), without gradient; None where every
                first step ``is_first``.
            embed: (B, T, E). action: (B, T, A). is_first: (B, T) bool. noise: (B, T, S, K).

        Returns:
            States (B, T, ...) and posterior log-probabilities (B, T, S, K).
        """
        scan = self.start_scan(embed)
        if start is None:
            rows = embed.shape[0]
            start = State(embed.new_zeros(rows, self.deter), embed.new_zeros(rows, *self.latent))
        deter, stoch, posterior = self.ops.rssm_observe(
            scan.weights, start.deter, start.stoch, action, scan.embedded, is_first, noise
        )
        return State(deter, stoch), posterior

    def imagine_step(self, state: State, action: Tensor, noise: Tensor) -> State:
        """One prior step under ``action`` (N, A) with ``noise`` (N, S, K)."""
        deter = self.cell(state.stoch.flatten(-2), action, state.deter)
        return State(deter, self.ops.sample(self.prior(deter), noise))

    @torch.no_grad()
    def imagine(
        self, start: State, policy: PolicyWeights, noise: ImagineNoise
    ) -> tuple[Tensor, Latents, Tensor, Ran | None]:
        """Rollout under ``policy``, without gradient.

        Args:
            start: states of N rows.
            noise: stoch (N, H, S, K) and action (N, H + 1, A).

        Returns:
            Features of the states (N, H + 1, D + S K), the start first, the latents in them, the
            action taken in each (N, H + 1, A), and what the policy's hidden layers gave, where the
            backend kept it.
        """
        feat, index, action, ran = self.ops.rssm_imagine(
            self.weights(), policy, start.deter, start.stoch, noise.stoch, noise.action
        )
        begin = self.deter if self.recipe.deter_first else 0
        return feat, Latents(index, begin, self.latent[1]), action, ran
