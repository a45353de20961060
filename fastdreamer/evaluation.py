"""Scores of a policy over whole episodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastdreamer.agent import Agent
from fastdreamer.envs import VectorEnv

Rows = dict[str, np.ndarray]
Policy = Callable[[Rows], np.ndarray]


def run_episodes(envs: VectorEnv, policy: Policy, episodes: int) -> list[float]:
    """Undiscounted returns in raw reward units of ``episodes`` episodes.

    Each environment plays an equal share (rounded up; the surplus is dropped from the last ones),
    so that short episodes are not favoured.
    """
    share = -(-episodes // envs.num_envs)
    scores: list[list[float]] = [[] for _ in range(envs.num_envs)]
    returns = np.zeros(envs.num_envs)
    rows = envs.reset()
    while min(len(s) for s in scores) < share:
        rows = envs.step(policy(rows))
        returns += rows["reward"]
        for i in np.flatnonzero(rows["is_last"]):
            scores[i].append(float(returns[i]))
            returns[i] = 0
    return [score for round_ in zip(*scores, strict=False) for score in round_][:episodes]


def random_policy(envs: VectorEnv, seed: int) -> Policy:
    """Uniformly random actions."""
    from gymnasium.vector.utils import batch_space

    space = batch_space(envs.act_space, envs.num_envs)
    space.seed(seed)
    return lambda rows: space.sample()


def agent_policy(agent: Agent, rows: int, seed: int, mode: bool = False) -> Policy:
    """The agent's policy: samples, or modes of the policy (latents are sampled either way)."""
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    carry = agent.initial_carry(rows)

    def policy(row: Rows) -> np.ndarray:
        nonlocal carry
        obs = {k: torch.from_numpy(row[k]).to(device) for k in agent.obs_space}
        first = torch.from_numpy(row["is_first"]).to(device)
        noise = agent.act_noise(rows, generator)
        action, carry = agent.act(obs, first, carry, noise, mode)
        return action.cpu().numpy()

    return policy
