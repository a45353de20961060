"""Parameter names of sheeprl's DreamerV3 (0.8.4) for an agent of recipe 2023.

The layouts are the same, so a checkpoint converts by renaming. Theirs are written
``world_model/...``, ``actor/...``, ``critic/...`` + the name in the module's state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OURS_TO_THEIRS = (
    ("world_model.encoder.cnn", "world_model/encoder.cnn_encoder.model.0._model"),
    ("world_model.encoder.mlp", "world_model/encoder.mlp_encoder.model._model"),
    ("world_model.rssm.initial_deter", "world_model/rssm.initial_recurrent_state"),
    ("world_model.rssm.cell.input", "world_model/rssm.recurrent_model.mlp._model"),
    ("world_model.rssm.cell.gates", "world_model/rssm.recurrent_model.rnn.linear"),
    ("world_model.rssm.cell.norm", "world_model/rssm.recurrent_model.rnn.layer_norm"),
    ("world_model.rssm.prior", "world_model/rssm.transition_model._model"),
    ("world_model.rssm.posterior", "world_model/rssm.representation_model._model"),
    ("world_model.decoder.stem.linear", "world_model/observation_model.cnn_decoder.model.0"),
    ("world_model.decoder.cnn", "world_model/observation_model.cnn_decoder.model.2._model"),
    ("world_model.decoder.mlp", "world_model/observation_model.mlp_decoder.model._model"),
    ("world_model.decoder.heads", "world_model/observation_model.mlp_decoder.heads"),
    ("world_model.reward", "world_model/reward_model._model"),
    ("world_model.cont", "world_model/continue_model._model"),
    ("actor.heads.action.logits", "actor/mlp_heads.0"),
    ("actor.mlp", "actor/model._model"),
    ("target_critic", "target_critic/_model"),
    ("critic", "critic/_model"),
)
_STRIDE = {"linear": 0, "conv": 0, "norm": 1}  # a hidden block is three entries of theirs


def sheeprl_names(names: Iterable[str]) -> dict[str, str]:
    """{our parameter name: their name} for all parameters of one agent.

    Raises KeyError for a name that has no counterpart.
    """
    names = list(names)
    return {name: _theirs(name, names) for name in names}


def _theirs(name: str, names: list[str]) -> str:
    for ours, theirs in _OURS_TO_THEIRS:
        if name == ours or name.startswith(ours + "."):
            return theirs + _tail(name[len(ours) :], ours, names)
    raise KeyError(f"{name} has no counterpart in sheeprl")


def _tail(tail: str, ours: str, names: list[str]) -> str:
    """Rename what follows the module: block n, part -> 3 n + part; output -> after the blocks."""
    if match := re.fullmatch(r"\.(?:hidden\.?)?(\d*)\.?(linear|conv|norm)\.(\w+)", tail):
        block, part, kind = match.groups()
        return f".{3 * int(block or 0) + _STRIDE[part]}.{kind}"
    if match := re.fullmatch(r"\.out\.(\w+)", tail):
        blocks = sum(n.startswith(ours + ".hidden") and n.endswith("linear.weight") for n in names)
        return f".{3 * blocks}.{match[1]}"
    if match := re.fullmatch(r"\.([^.]+)\.(weight|bias)", tail):  # vector decoder head by key
        keys = sorted({n.split(".")[-2] for n in names if n.startswith(ours + ".")})
        return f".{keys.index(match[1])}.{match[2]}"
    return tail
