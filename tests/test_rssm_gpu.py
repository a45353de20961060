"""The CUDA library's scans on a GPU (``--device cuda``), against their references on the CPU.

Legend as in test_rssm.py; tolerances as in test_rssm_cuda.py, whose emulation runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_rssm import (
    TOLERANCE,
    Draw,
    assert_rollouts_equal,
    cells,
    imagine_arguments,
    make_scan,
    make_weights,
)
from test_rssm_cuda import BFLOAT16, WIDE, rounding  # noqa: F401
from torch import Tensor
from torch.utils._pytree import tree_map

from fastdreamer import kernels
from fastdreamer.kernels.rssm_imagine import _compute as imagine
from fastdreamer.kernels.rssm_imagine import rssm_imagine
from fastdreamer.kernels.rssm_observe import rssm_observe
from fastdreamer.kernels.rssm_observe_operator import observe
from fastdreamer.kernels.rssm_observe_weights import flatten

pytestmark = pytest.mark.operators

PLACE = "cuda"
# Also size1m's own, a team of a cluster, and S's, a team of the grid.
SHAPES = [*WIDE, (16, 8, 512, 32, 4, 6, 64, 8), (16, 8, 512, 32, 32, 9, 512, 8)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
computes = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest, on_the_device: None) -> Iterator[None]:
    """Inputs are drawn and references computed on the CPU."""
    if request.config.getoption("--device") != PLACE:
        pytest.skip(f"needs --device {PLACE}")
    kernels.resolve("cuda", PLACE)
    with torch.device("cpu"):
        yield


@pytest.fixture
def tolerance(compute: torch.dtype, request: pytest.FixtureRequest) -> dict[str, float]:
    """In bfloat16 the reference rounds what it multiplies."""
    if compute == torch.float32:
        return TOLERANCE
    request.getfixturevalue("rounding")
    return BFLOAT16


def moved(tree: Any) -> Any:
    def move(x: Any) -> Any:
        return x.detach().to(PLACE).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(move, tree)


def results(operator: Callable, arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the weights and of the embedded observations, on the CPU."""
    outputs = operator(*arguments)
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randn(x.shape, generator=g) for x in outputs]
    loss = torch.stack([(x * w.to(x.device)).sum() for x, w in zip(outputs, drawn, strict=True)])
    leaves = [*flatten(arguments[0]), arguments[4]]
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    return [x.detach().cpu() for x in outputs], [x.cpu() for x in grads]


@cells
@shapes
@computes
def test_observe(cell, shape, compute, tolerance):
    draw = Draw(grad=True)
    arguments = (make_weights(draw, cell, shape), *make_scan(draw, shape))
    expected, expected_grads = results(rssm_observe, arguments)
    actual, grads = results(lambda *x: observe(*x, compute), moved(arguments))
    for name, x, y in zip(("deter", "stoch", "logp"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for i, (x, y) in enumerate(zip(grads, expected_grads, strict=True)):
        size = float(y.abs().max()) + 1
        torch.testing.assert_close(
            x / size, y / size, **tolerance, msg=lambda m, i=i: f"gradient {i}: {m}"
        )


@cells
@shapes
@computes
def test_imagine(cell, shape, compute, tolerance):
    arguments = imagine_arguments(cell, (70, *shape[1:]), "dc", torch.float32)
    expected = rssm_imagine(*arguments)
    actual = imagine(*moved(arguments), compute)
    assert_rollouts_equal(actual, expected, **tolerance)


@cells
@computes
def test_repeats_bit_for_bit(cell, compute):
    draw = Draw(grad=True)
    arguments = moved((make_weights(draw, cell, SHAPES[-2]), *make_scan(draw, SHAPES[-2])))
    once, again = (results(lambda *x: observe(*x, compute), arguments) for _ in range(2))
    for x, y in zip([*once[0], *once[1]], [*again[0], *again[1]], strict=True):
        assert torch.equal(x, y)
