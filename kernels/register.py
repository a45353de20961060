"""Makes functions operators of PyTorch: schema, implementations, fake, autograd."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter, on the CPU."""

_OPERATORS = torch.library.Library("fastdreamer", "FRAGMENT")


def register(
    name: str,
    schema: str,
    cpu: Callable,
    fake: Callable,
    autograd: tuple[Callable, Callable] | None = None,
    cuda: Callable | None = None,
    autocast: bool = True,
) -> None:
    """Define ``torch.ops.fastdreamer.<name>``.

    Args:
        schema: arguments and results, such as ``(Tensor x) -> Tensor``.
        cpu: computes it. fake: allocates results of the right shapes, for the compiler.
        autograd: ``setup_context`` and ``backward``; None for an operator that is itself a
            backward pass, or has none: differentiating it raises RuntimeError. One that changes
            its arguments (``!`` in the schema) takes tensors without gradient.
        cuda: computes it on a GPU by the CUDA library, if that has the operator.
        autocast: whether, within ``torch.autocast``, its inputs are converted to float32.
    """
    _OPERATORS.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _OPERATORS.impl(name, cpu, "CPU")
    if cuda:
        _OPERATORS.impl(name, cuda, "CUDA")
    qualified = f"fastdreamer::{name}"
    torch.library.register_fake(qualified, fake, lib=_OPERATORS)
    if "!" in schema:
        return

    def refuse(ctx: Any, *_: object) -> None:
        operator = name.removesuffix("_backward")
        order = "derivative" if operator == name else "second derivative"
        raise RuntimeError(f"{operator} has no {order}: use the reference backend for it")

    setup, backward = autograd or (None, refuse)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_OPERATORS)
    for device in ("cpu", "cuda") if autocast else ():
        torch.library.register_autocast(qualified, device, torch.float32, lib=_OPERATORS)


def serve(name: str, function: Callable, otherwise: Callable | None = None) -> None:
    """Let ``function``, which launches Triton's kernels, compute the operator on a GPU.

    In Triton's interpreter it also computes it on the CPU, in the place of the C++ library.

    Args:
        otherwise: computes it, in plain PyTorch, where the first tensor is not float32; None
            where ``function`` takes every dtype.
    """

    def implementation(*arguments: Any) -> Any:
        if otherwise is None or arguments[0].dtype == torch.float32:
            return function(*arguments)
        return otherwise(*arguments)

    _OPERATORS.impl(name, implementation, "CUDA")
    if INTERPRETED:
        _OPERATORS.impl(name, implementation, "CPU", allow_override=True)


def on_triton(x: Tensor) -> bool:
    """Whether Triton's kernels serve the operators for this tensor, where they serve any."""
    return x.device.type == "cuda" or INTERPRETED


def compute_type(device: str) -> torch.dtype:
    """What a device's library multiplies in: bfloat16 where autocast says so, else float32."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def products_in(compute: torch.dtype, on: Tensor) -> torch.autocast:
    """Context in which PyTorch's products are in bfloat16 too, where ``compute`` is."""
    return torch.autocast(on.device.type, torch.bfloat16, enabled=compute == torch.bfloat16)
