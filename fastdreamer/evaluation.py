"""Scores of a policy over whole episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastdreamer.agent import Agent
from fastdreamer.envs import VectorEnv
from fastdreamer.execution import Act

Rows = dict[str, np.ndarray]
Policy = Callable[[Rows], np.ndarray]


@dataclass(frozen=True)
class Summary:
    """Statistics of the scores of episodes."""

    scores: list[float]
    mean: float
    std: float | None
    """Standard deviation of the sample; None for one episode."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the mean; None for one episode."""


def summarise(scores: list[float], resamples: int = 10_000, seed: int = 0) -> Summary:
    """Mean, standard deviation and percentile bootstrap interval of at least one score."""
    values = np.asarray(scores)
    if len(values) == 1:
        return Summary(list(scores), float(values[0]), None, None)
    draws = np.random.default_rng(seed).choice(values, (resamples, len(values))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    interval = (float(low), float(high))
    return Summary(list(scores), float(values.mean()), float(values.std(ddof=1)), interval)


def standard_errors(a: Summary, b: Summary) -> float | None:
    """How many standard errors of the difference the mean of ``a`` lies above that of ``b``.

    None where that error is not known (one episode) or 0 (scores that are all alike).
    """
    if a.std is None or b.std is None:
        return None
    error = math.sqrt(a.std**2 / len(a.scores) + b.std**2 / len(b.scores))
    return (a.mean - b.mean) / error if error else None


def run_episodes(
    envs: VectorEnv, policy: Policy, episodes: int, watch: Callable[[Rows], object] | None = None
) -> list[float]:
    """Undiscounted returns in raw reward units of ``episodes`` episodes.

    Each environment plays an equal share (rounded up; the surplus is dropped from the last ones),
    so that short episodes are not favoured. ``watch`` is called with all rows in turn.
    """
    share = -(-episodes // envs.num_envs)
    scores: list[list[float]] = [[] for _ in range(envs.num_envs)]
    returns = np.zeros(envs.num_envs)
    rows = envs.reset()
    while True:
        if watch is not None:
            watch(rows)
        if min(len(s) for s in scores) >= share:
            break
        rows = envs.step(policy(rows))
        returns += rows["reward"]
        for i in np.flatnonzero(rows["is_last"]):
            scores[i].append(float(returns[i]))
            returns[i] = 0
    return [score for round_ in zip(*scores, strict=False) for score in round_][:episodes]


def play(
    make: Callable[[], VectorEnv], policy: Callable[[VectorEnv], Policy], episodes: int
) -> list[float]:
    """Scores of ``episodes`` episodes in environments made for them."""
    envs = make()
    try:
        return run_episodes(envs, policy(envs), episodes)
    finally:
        envs.close()


def compare_with_random(
    agent: Agent, make: Callable[[], VectorEnv], episodes: int, seed: int, graph: bool = False
) -> dict[str, Summary]:
    """Statistics of "agent" and of "random" actions in environments that ``make`` makes."""
    policies: dict[str, Callable[[VectorEnv], Policy]] = {
        "agent": lambda envs: agent_policy(agent, envs.num_envs, seed, graph=graph),
        "random": lambda envs: random_policy(envs, seed),
    }
    return {name: summarise(play(make, policy, episodes)) for name, policy in policies.items()}


def random_policy(envs: VectorEnv, seed: int) -> Policy:
    """Uniformly random actions."""
    from gymnasium.vector.utils import batch_space

    space = batch_space(envs.act_space, envs.num_envs)
    space.seed(seed)
    return lambda rows: space.sample()


def agent_policy(
    agent: Agent, rows: int, seed: int, mode: bool = False, graph: bool = False
) -> Policy:
    """The agent's policy: samples, or modes of the policy (latents are sampled either way).

    ``graph``: as one CUDA graph.
    """
    device = agent.device
    act = Act(agent, torch.Generator(device).manual_seed(seed), graph, mode)
    carry = agent.initial_carry(rows)

    def policy(row: Rows) -> np.ndarray:
        nonlocal carry
        obs = {k: torch.from_numpy(row[k]).to(device) for k in agent.obs_space}
        first = torch.from_numpy(row["is_first"]).to(device)
        carry = act(obs, first, carry)
        return agent.spec.decode(carry.action.cpu().numpy())

    return policy
