"""The two algorithms called DreamerV3, as frozen sets of choices over the same modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """What one recipe chooses; everything not named here is common to both."""

    name: str
    norm: Literal["layer", "rms"]
    """LayerNorm (eps 1e-3) after a Linear without bias, or RMSNorm (eps 1e-4) after one with."""
    fan: Literal["average", "in"]
    """What the variance of an initial weight is the inverse of."""
    uniform_outputs: bool
    """Output layers start uniform rather than truncated normal."""
    policy_scale: float
    """Factor on the policy head's initial weight."""
    conv: Literal["stride", "pool"]
    """4x4 convolutions of stride 2 and a Linear before the decoder's; or 5x5 ones with 2x2
    pooling and upsampling, and a block-linear stem."""
    image_shift: float
    """Images are predicted as x/255 minus this; "pool" ends in a sigmoid."""
    vector_floor: float
    """Squared errors of vectors below this count as 0."""
    vectors_first: bool
    """Order of the embedding: vectors, images."""
    deter_first: bool
    """Order of the features: deter, stoch."""
    cell: Literal["gru", "block_gru"]
    """LayerNorm-GRU over one joint product, or block-GRU with three input layers."""
    prior_layers: int
    """Hidden layers of the prior."""
    learned_initial: bool
    """Episodes start at a learned state; else at zeros, and sequences at replayed latents."""
    bins: Literal["symlog", "symexp"]
    """Bins equally spaced in symlog space, or symexp-spaced in value space."""
    policy_unimix: bool
    """Discrete policies are unimixed like the latents."""
    soft_continue: bool
    """Imagined continues are probabilities that carry the discount; else 0/1 modes, true at the
    start, discounted outside."""
    joint: bool
    """One loss, one optimiser step with LaProp and adaptive clipping, a replay value loss; else
    world model, actor and critic in turn with Adam, imagining with the updated world model."""


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "2023": Recipe(
            name="2023",
            norm="layer",
            fan="average",
            uniform_outputs=True,
            policy_scale=1.0,
            conv="stride",
            image_shift=0.5,
            vector_floor=1e-8,
            vectors_first=False,
            deter_first=False,
            cell="gru",
            prior_layers=1,
            learned_initial=True,
            bins="symlog",
            policy_unimix=True,
            soft_continue=False,
            joint=False,
        ),
        "2025": Recipe(
            name="2025",
            norm="rms",
            fan="in",
            uniform_outputs=False,
            policy_scale=0.01,
            conv="pool",
            image_shift=0.0,
            vector_floor=0.0,
            vectors_first=True,
            deter_first=True,
            cell="block_gru",
            prior_layers=2,
            learned_initial=False,
            bins="symexp",
            policy_unimix=False,
            soft_continue=True,
            joint=True,
        ),
    }
)
"""2023: arXiv v1, as sheeprl and dreamerv3-torch train it. 2025: Nature, the official JAX code."""
