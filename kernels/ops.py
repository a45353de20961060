"""Chooses, once, the implementation that serves each operator.

To add an operator: write its reference in ``kernels/<stem>.py``, give it a field in `Ops` and a
row in `IMPLEMENTATIONS`; backends join the row as they are written. Triton's kernels are in
``kernels/<stem>_triton.py``, which registers them with `register.serve`, launches them by
`launch.launch`, and has ``presets()``, the launches to compile ahead of time; the stem joins
`TRITON_STEMS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from types import MappingProxyType

import torch
from torch import Tensor

from . import library, optim, register, unimix
from .conv_norm_act import conv_norm_act, conv_norm_act_cpp, conv_then_norm_act
from .gru_step import block_gru_step, compiled_block_gru_step, compiled_gru_step, gru_step
from .gumbel import gumbel, gumbel_cpp
from .heads import heads, heads_by_operators, heads_cpp
from .image_loss import image_loss, image_loss_cpp
from .lambda_return import lambda_return
from .latent_linear import compiled_latent_linear, latent_linear
from .norm_act import norm_act
from .policy_step import policy_step, policy_step_cpp
from .rssm_imagine import Rollout, rssm_imagine, rssm_imagine_cpp, rssm_imagine_cuda
from .rssm_observe import rssm_observe, rssm_observe_cpp, rssm_observe_cuda
from .twohot import compiled_twohot_loss, twohot_loss, twohot_mean

# Backend -> those that serve what it lacks, in this order.
FALLBACKS = {
    "reference": (),
    "cpp": ("reference",),
    "triton": ("reference",),
    "cuda": ("triton", "reference"),
}
BACKENDS = tuple(FALLBACKS)
BEST = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
TRITON_STEMS = (
    "gru_step",
    "lambda_return",
    "latent_linear",
    "norm_act",
    "optim",
    "twohot",
    "unimix",
)

# operator -> backend -> implementation.
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "lambda_return": {
        "reference": lambda_return,
        "cpp": torch.ops.fastdreamer.lambda_return.default,
        "triton": torch.ops.fastdreamer.lambda_return.default,
    },
    "rssm_observe": {
        "reference": rssm_observe,
        "cpp": rssm_observe_cpp,
        "cuda": rssm_observe_cuda,
    },
    "rssm_imagine": {
        "reference": rssm_imagine,
        "cpp": rssm_imagine_cpp,
        "cuda": rssm_imagine_cuda,
    },
    "policy_step": {
        "reference": policy_step,
        "cpp": policy_step_cpp,
    },
    "latent_linear": {
        "reference": latent_linear,
        "cpp": compiled_latent_linear,
        "triton": compiled_latent_linear,
    },
    "heads": {
        "reference": heads,
        "cpp": heads_cpp,
        "triton": heads_by_operators,
    },
    "norm_act": {
        "reference": norm_act,
        "cpp": torch.ops.fastdreamer.norm_act.default,
        "triton": torch.ops.fastdreamer.norm_act.default,
    },
    "gru_step": {
        "reference": gru_step,
        "cpp": compiled_gru_step,
        "triton": compiled_gru_step,
    },
    "block_gru_step": {
        "reference": block_gru_step,
        "cpp": compiled_block_gru_step,
        "triton": compiled_block_gru_step,
    },
    "unimix": {
        "reference": unimix.unimix,
        "cpp": torch.ops.fastdreamer.unimix.default,
        "triton": torch.ops.fastdreamer.unimix.default,
    },
    "entropy": {
        "reference": unimix.entropy,
        "cpp": torch.ops.fastdreamer.entropy.default,
        "triton": torch.ops.fastdreamer.entropy.default,
    },
    "kl": {
        "reference": unimix.kl,
        "cpp": torch.ops.fastdreamer.kl.default,
        "triton": torch.ops.fastdreamer.kl.default,
    },
    "conv_norm_act": {
        "reference": conv_norm_act,
        "cpp": conv_norm_act_cpp,
        "triton": conv_then_norm_act,
    },
    "balanced_kl": {
        "reference": unimix.balanced_kl,
        "cpp": torch.ops.fastdreamer.balanced_kl.default,
        "triton": torch.ops.fastdreamer.balanced_kl.default,
    },
    "sample": {
        "reference": unimix.sample,
        "cpp": torch.ops.fastdreamer.sample.default,
        "triton": torch.ops.fastdreamer.sample.default,
    },
    "gumbel": {
        "reference": gumbel,
        "cpp": gumbel_cpp,
    },
    "image_loss": {
        "reference": image_loss,
        "cpp": image_loss_cpp,
    },
    "twohot_loss": {
        "reference": twohot_loss,
        "cpp": compiled_twohot_loss,
        "triton": compiled_twohot_loss,
    },
    "twohot_mean": {
        "reference": twohot_mean,
        "cpp": torch.ops.fastdreamer.twohot_mean.default,
        "triton": torch.ops.fastdreamer.twohot_mean.default,
    },
    "agc_laprop": {
        "reference": optim.agc_laprop,
        "cpp": optim.compiled_agc_laprop,
        "triton": optim.compiled_agc_laprop,
    },
    "clip_adam": {
        "reference": optim.clip_adam,
        "cpp": optim.compiled_clip_adam,
        "triton": optim.compiled_clip_adam,
    },
    "ema": {
        "reference": optim.ema,
        "cpp": torch.ops.fastdreamer.ema.default,
        "triton": torch.ops.fastdreamer.ema.default,
    },
}


@dataclass(frozen=True)
class Ops:
    """The operators of one backend, with the same signatures whatever serves them."""

    backend: str
    """The backend that was chosen."""
    served_by: Mapping[str, str]
    """Operator -> the backend that really serves it."""
    lambda_return: Callable[..., Tensor]
    """See `fastdreamer.kernels.lambda_return`."""
    rssm_observe: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """Posterior scan; see `fastdreamer.kernels.rssm_observe`."""
    rssm_imagine: Callable[..., Rollout]
    """Imagined rollout; see `fastdreamer.kernels.rssm_imagine`."""
    policy_step: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """One step of environments; see `fastdreamer.kernels.policy_step`."""
    latent_linear: Callable[..., Tensor]
    """Linear layer on one-hot latents; see `fastdreamer.kernels.latent_linear`."""
    heads: Callable[..., list[Tensor]]
    """Heads on features of imagined states; see `fastdreamer.kernels.heads`."""
    norm_act: Callable[..., Tensor]
    """LayerNorm or RMSNorm and SiLU; see `fastdreamer.kernels.norm_act`."""
    conv_norm_act: Callable[..., Tensor]
    """Convolution, norm and SiLU; see `fastdreamer.kernels.conv_norm_act`."""
    gru_step: Callable[..., Tensor]
    """LayerNorm-GRU step; see `fastdreamer.kernels.gru_step`."""
    block_gru_step: Callable[..., Tensor]
    """Block-GRU step; see `fastdreamer.kernels.gru_step`."""
    unimix: Callable[..., Tensor]
    """Unimixed log-probabilities; see `fastdreamer.kernels.unimix`."""
    entropy: Callable[..., Tensor]
    """Entropy of log-probabilities; see `fastdreamer.kernels.unimix`."""
    kl: Callable[..., Tensor]
    """KL of two categoricals; see `fastdreamer.kernels.unimix`."""
    balanced_kl: Callable[..., tuple[Tensor, Tensor]]
    """The KL twice, each with the gradient of one side; see `fastdreamer.kernels.unimix`."""
    sample: Callable[..., Tensor]
    """Straight-through Gumbel-max sample; see `fastdreamer.kernels.unimix`."""
    gumbel: Callable[..., Tensor]
    """Gumbel noise; see `fastdreamer.kernels.gumbel`."""
    image_loss: Callable[..., Tensor]
    """Squared error of images; see `fastdreamer.kernels.image_loss`."""
    twohot_loss: Callable[..., Tensor]
    """Two-hot cross-entropy; see `fastdreamer.kernels.twohot`."""
    twohot_mean: Callable[..., Tensor]
    """Mean over two-hot bins; see `fastdreamer.kernels.twohot`."""
    agc_laprop: Callable[..., Tensor]
    """LaProp step with adaptive clipping, in place; see `fastdreamer.kernels.optim`."""
    clip_adam: Callable[..., Tensor]
    """Adam step with clipping by global norm, in place; see `fastdreamer.kernels.optim`."""
    ema: Callable[..., None]
    """Exponential moving average, in place; see `fastdreamer.kernels.optim`."""

    def __deepcopy__(self, memo: dict[int, object]) -> Ops:
        return self  # immutable, and shared by the copies of a network


def resolve(backend: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """The operators of a backend for tensors on a device.

    Args:
        backend: "reference" (plain PyTorch), "cpp" (the compiled CPU library), "triton", "cuda"
            (the compiled CUDA library, beside Triton's kernels), or "auto": the fastest that is
            available, with one warning where that is not the compiled one.
        device: where the operators' inputs will be.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: the backend is known but not available; the message says why.
    """
    device = torch.device(device)
    if backend == "auto":
        backend = _best(device.type)
    elif backend not in BACKENDS:
        near = get_close_matches(backend, ("auto", *BACKENDS), 1, cutoff=0) or ["auto"]
        raise ValueError(f"unknown backend {backend!r}: did you mean {near[0]!r}?")
    elif reason := _unavailable_reason(backend, device.type):
        raise RuntimeError(f"backend {backend!r} is not available on {device.type!r}: {reason}")
    if backend in ("triton", "cuda"):
        _load_triton()
    served_by = {
        name: next(by for by in (backend, *FALLBACKS[backend]) if by in row)
        for name, row in IMPLEMENTATIONS.items()
    }
    operators = {name: IMPLEMENTATIONS[name][by] for name, by in served_by.items()}
    return Ops(backend=backend, served_by=MappingProxyType(served_by), **operators)


@cache
def _best(device_type: str) -> str:
    reasons = []
    for backend in BEST.get(device_type, ("reference",)):
        reason = _unavailable_reason(backend, device_type)
        if reason is None:
            break
        reasons.append(f"{backend}: {reason}")
    if reasons:
        message = f"fastdreamer runs on its {backend!r} backend ({'; '.join(reasons)})"
        warnings.warn(message, stacklevel=3)
    return backend


def _unavailable_reason(backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"it runs on the CPU only, not on {device_type}"
        if register.INTERPRETED:
            return "TRITON_INTERPRET=1 lets Triton's interpreter serve the CPU"
        return library.unavailable_reason()
    if backend == "cuda":
        if device_type != "cuda":
            return f"it runs on a GPU, not on {device_type}"
        return library.unavailable_reason("cuda")
    if device_type != "cuda" and not (device_type == "cpu" and register.INTERPRETED):
        return "it runs on a GPU (on the CPU in Triton's interpreter, with TRITON_INTERPRET=1)"
    return _load_triton()


@cache
def _load_triton() -> str | None:
    """Register Triton's kernels with their operators; why that is not possible, or None."""
    try:
        for stem in TRITON_STEMS:
            import_module(f".{stem}_triton", __package__)
    except ImportError as error:
        return f"{error}: install triton"
    return None
