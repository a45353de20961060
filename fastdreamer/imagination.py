"""What a world model imagines, beside what happened: open-loop predictions.

Legend: B examples, T time, D deter, S stoch, K classes, A action, H, W, C image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdreamer.actions import Part
from fastdreamer.agent import Agent
from fastdreamer.kernels.gumbel import gumbel
from fastdreamer.rssm import State

KINDS = ("imagined", "true", "reconstructed")


@dataclass(frozen=True)
class Prediction:
    """Open-loop prediction of B sequences; index t of every array is environment step t.

    The first ``context`` steps of what is imagined are posterior reconstructions.
    """

    context: int
    images: Mapping[str, np.ndarray]
    """By `KINDS`: (B, T, H, W, C) float32, about 0..1."""
    rewards: Mapping[str, np.ndarray]
    """By `KINDS`: (B, T), received with the image of that step."""
    actions: np.ndarray
    """(B, T, A) action vectors, each taken after the image of that step."""
    parts: Sequence[Part]
    """What an action vector consists of."""

    def errors(self) -> dict[str, list[float]]:
        """Mean squared pixel error (pixels 0..1) at each step from ``context`` on.

        Returns:
            "imagined", "reconstructed", and "still": of the last observed frame shown for ever.
        """
        true = self.images["true"]
        shown = {**self.images, "still": true[:, self.context - 1, None]}
        del shown["true"]
        return {
            k: np.square(v - true).mean((0, 2, 3, 4))[self.context :].tolist()
            for k, v in shown.items()
        }


@torch.no_grad()
def predict(
    agent: Agent,
    obs: Mapping[str, Tensor],
    action: Tensor,
    is_first: Tensor,
    reward: Tensor,
    context: int = 5,
    seed: int = 0,
) -> Prediction:
    """Observe ``context`` steps, then imagine the others under the actions that were taken.

    Args:
        agent: its first image is shown.
        obs: {key: (B, T, ...)}. action: (B, T, A) vectors, taken after the observation.
            is_first: (B, T) bool. reward: (B, T), received with the observation. Step 0 starts
            from the initial state, whatever went before it.
        context: observed steps, 1 to T - 1. seed: of the latents' samples.

    Raises:
        ValueError: the agent has no image, ``context`` is out of range, or an episode begins
            after step 0.

    Source: DreamerV3, open-loop video predictions.
    """
    model = agent.world_model
    if not model.decoder.images:
        raise ValueError("there is no picture to draw: the observations are only vectors")
    if is_first[:, 1:].any():
        raise ValueError("an episode begins within a sequence")
    if not 0 < context < reward.shape[1]:
        raise ValueError(f"context must lie in 1..{reward.shape[1] - 1}, got {context}")
    obs = {k: obs[k].to(agent.device) for k in agent.obs_space}
    action = action.to(agent.device, agent.dtype)
    generator = torch.Generator(agent.device).manual_seed(seed)
    latent = (*reward.shape, agent.model.stoch, agent.model.classes)
    posterior = _observe(agent, obs, action, gumbel(latent, generator, agent.dtype))
    noise = gumbel(latent, generator, agent.dtype)
    prior = _open_loop(agent, posterior[:context], action, noise)
    true = obs[model.decoder.images[0]].cpu().numpy().astype(np.float32) / 255
    pairs = (_decode(agent, prior), (true, reward.cpu().numpy()), _decode(agent, posterior))
    images, rewards = zip(*pairs, strict=True)
    return Prediction(
        context,
        dict(zip(KINDS, images, strict=True)),
        dict(zip(KINDS, rewards, strict=True)),
        action.float().cpu().numpy(),
        agent.spec.parts,
    )


def _observe(agent: Agent, obs: Mapping[str, Tensor], action: Tensor, noise: Tensor) -> list[State]:
    """T posterior states (B, ...) from the initial state on; action (B, T, A)."""
    first = torch.zeros(action.shape[:2], dtype=torch.bool, device=action.device)
    first[:, 0] = True
    model, previous = agent.world_model, action.roll(1, 1)  # that of step 0 is masked
    states, _ = model.rssm.observe(None, model.encoder(obs), previous, first, noise)
    return [State(*x) for x in zip(states.deter.unbind(1), states.stoch.unbind(1), strict=True)]


def _open_loop(agent: Agent, observed: list[State], action: Tensor, noise: Tensor) -> list[State]:
    """The observed states and prior states after them, T in all."""
    states = list(observed)
    for t in range(len(observed), action.shape[1]):
        states.append(
            agent.world_model.rssm.imagine_step(states[-1], action[:, t - 1], noise[:, t])
        )
    return states


def _decode(agent: Agent, states: list[State]) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, T, H, W, C) of about 0..1 and rewards (B, T) of T states."""
    model = agent.world_model
    stacked = State.stack(states)
    image = model.decode(stacked)[model.decoder.images[0]].float() + agent.recipe.image_shift
    logits = model.reward(model.rssm.features(stacked))
    reward = agent.ops.twohot_mean(logits, agent.recipe.bins)
    return image.cpu().numpy(), reward.float().cpu().numpy()
