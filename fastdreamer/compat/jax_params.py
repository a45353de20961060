"""Parameters of the official JAX code (commit e3f0224) for an agent of recipe 2025, and back.

Their Linear kernels are (in, out) and their convolutions (H, W, in, out); block-linear kernels are
laid out as ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch

from fastdreamer.agent import Agent

_RULES = (
    (r"world_model\.encoder\.mlp\.hidden\.(\d+)\.linear", r"enc/mlp\1"),
    (r"world_model\.encoder\.mlp\.hidden\.(\d+)\.norm", r"enc/mlp\1norm"),
    (r"world_model\.encoder\.cnn\.(\d+)\.conv", r"enc/cnn\1"),
    (r"world_model\.encoder\.cnn\.(\d+)\.norm", r"enc/cnn\1norm"),
    (r"world_model\.rssm\.cell\.input\.deter\.linear", "dyn/dynin0"),
    (r"world_model\.rssm\.cell\.input\.deter\.norm", "dyn/dynin0norm"),
    (r"world_model\.rssm\.cell\.input\.stoch\.linear", "dyn/dynin1"),
    (r"world_model\.rssm\.cell\.input\.stoch\.norm", "dyn/dynin1norm"),
    (r"world_model\.rssm\.cell\.input\.action\.linear", "dyn/dynin2"),
    (r"world_model\.rssm\.cell\.input\.action\.norm", "dyn/dynin2norm"),
    (r"world_model\.rssm\.cell\.hidden", "dyn/dynhid0"),
    (r"world_model\.rssm\.cell\.norm", "dyn/dynhid0norm"),
    (r"world_model\.rssm\.cell\.gates", "dyn/dyngru"),
    (r"world_model\.rssm\.prior\.hidden\.(\d+)\.linear", r"dyn/prior\1"),
    (r"world_model\.rssm\.prior\.hidden\.(\d+)\.norm", r"dyn/prior\1norm"),
    (r"world_model\.rssm\.prior\.out", "dyn/priorlogit"),
    (r"world_model\.rssm\.posterior\.hidden\.(\d+)\.linear", r"dyn/obs\1"),
    (r"world_model\.rssm\.posterior\.hidden\.(\d+)\.norm", r"dyn/obs\1norm"),
    (r"world_model\.rssm\.posterior\.out", "dyn/obslogit"),
    (r"world_model\.decoder\.stem\.deter", "dec/sp0"),
    (r"world_model\.decoder\.stem\.hidden\.linear", "dec/sp1"),
    (r"world_model\.decoder\.stem\.hidden\.norm", "dec/sp1norm"),
    (r"world_model\.decoder\.stem\.stoch", "dec/sp2"),
    (r"world_model\.decoder\.stem\.norm", "dec/spnorm"),
    (r"world_model\.decoder\.mlp\.hidden\.(\d+)\.(linear|norm)", r"dec/mlp/\2\1"),
    (r"world_model\.decoder\.heads\.(.+)", r"dec/vec/\1/pred"),
    (r"world_model\.reward\.hidden\.(\d+)\.(linear|norm)", r"rew/mlp/\2\1"),
    (r"world_model\.reward\.out", "rew/head/logits"),
    (r"world_model\.cont\.hidden\.(\d+)\.(linear|norm)", r"con/mlp/\2\1"),
    (r"world_model\.cont\.out", "con/head/logit"),
    (r"actor\.mlp\.hidden\.(\d+)\.(linear|norm)", r"pol/mlp/\2\1"),
    (r"actor\.heads\.(.+)\.std", r"pol/head/\1/stddev"),
    (r"actor\.heads\.(.+)\.(logits|mean)", r"pol/head/\1/\2"),
    (r"critic\.hidden\.(\d+)\.(linear|norm)", r"val/mlp/\2\1"),
    (r"critic\.out", "val/head/logits"),
    (r"target_critic\.hidden\.(\d+)\.(linear|norm)", r"slowval/mlp/\2\1"),
    (r"target_critic\.out", "slowval/head/logits"),
)


def jax_names(agent: Agent) -> dict[str, str]:
    """{our parameter name: the official one}, for all of an agent's parameters.

    Raises KeyError for a parameter that has no counterpart.
    """
    stages = len(getattr(agent.world_model.decoder, "cnn", ()))
    return {name: _official(name, stages) for name, _ in agent.named_parameters()}


def to_jax(agent: Agent) -> dict[str, np.ndarray]:
    """All parameters by official name, in the official layouts."""
    names, params = jax_names(agent), dict(agent.named_parameters())
    return {names[k]: to_layout(p.detach()).cpu().numpy() for k, p in params.items()}


@torch.no_grad()
def from_jax(agent: Agent, params: Mapping[str, np.ndarray]) -> None:
    """Load official parameters into ``agent``; entries it does not have are ignored.

    Raises:
        KeyError: a parameter is missing. ValueError: its shape does not fit.
    """
    names = jax_names(agent)
    for name, parameter in agent.named_parameters():
        if names[name] not in params:
            raise KeyError(f"the official parameters lack {names[name]}")
        value = from_layout(torch.from_numpy(np.array(params[names[name]])))
        if value.shape != parameter.shape:
            raise ValueError(
                f"{names[name]} has shape {tuple(value.shape)}, the agent's {name} "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(value)


def to_layout(value: torch.Tensor) -> torch.Tensor:
    """One of our tensors in the official layout."""
    if value.ndim == 4:
        return value.permute(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def from_layout(value: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_layout`."""
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


def _official(name: str, stages: int) -> str:
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"world_model\.decoder\.cnn\.(\d+)\.(conv|norm)", module):
        index, norm = stages - 2 - int(match[1]), "norm" if match[2] == "norm" else ""
        path = f"dec/conv{index}{norm}" if index >= 0 else "dec/imgout"
    else:
        path = next((m.expand(to) for r, to in _RULES if (m := re.fullmatch(r, module))), "")
    if not path:
        raise KeyError(f"{name} has no counterpart in the official code")
    if re.search(r"norm\d*$", path):
        return f"{path}/scale"
    return f"{path}/{'kernel' if leaf == 'weight' else leaf}"
