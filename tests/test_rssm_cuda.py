"""The CUDA library's scans, run on the CPU by threads, against their references.

csrc/cuda/emulated.cpp is the same source with a thread for each warp; csrc/README.md says what that
leaves unproven. Legend as in test_rssm.py.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdreamer.kernels import library
from fastdreamer.kernels.rssm_imagine import _compute as _imagine
from fastdreamer.kernels.rssm_imagine import rssm_imagine
from fastdreamer.kernels.rssm_observe import _operator, rssm_observe
from test_rssm import SHAPES, TOLERANCE, Draw, cells, gradients, imagine_arguments, make_scan, make_weights

pytestmark = pytest.mark.operators

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas")
# blocks, warps of each, clusters
DEVICES = [(1, 1, 0), (2, 2, 0), (8, 1, 1), (13, 2, 0)]
# Also more rows than a team takes, and columns that leave blocks without any.
WIDE = [*SHAPES, (19, 3, 48, 5, 9, 4, 21, 2)]
# Another order of sums may round a factor the other way, by 2^-8 of it.
BFLOAT16 = {"rtol": 1e-2, "atol": 1e-2}

devices = pytest.mark.parametrize("device", DEVICES, ids=str)
shapes = pytest.mark.parametrize("shape", WIDE, ids=str)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library's source, compiled for threads of the CPU."""
    path = tmp_path_factory.mktemp("emulated") / "libfastdreamer_cuda.so"
    compiler, folder = os.environ.get("CXX", "g++"), ROOT / "csrc"
    source = folder / "cuda" / "emulated.cpp"
    command = [compiler, *FLAGS, f"-I{folder}", f"-I{folder / 'cuda'}", source, "-o", path]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def emulate(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the emulation of a device serve CPU tensors."""
    caches = (library._load, library.function)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(library, "CUDA_LIBRARY", emulated)
    monkeypatch.setattr(library, "serves", lambda x: "cuda")

    def choose(blocks: int, warps: int, clusters: int, shared: int = 1 << 18) -> None:
        ctypes.CDLL(str(emulated)).fd_emulate(blocks, warps, shared, clusters)

    yield choose
    for cached in caches:
        cached.cache_clear()


@cells
@shapes
@devices
def test_observe_values(emulate, cell, shape, device):
    draw = Draw()
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    expected = rssm_observe(weights, *scan)
    emulate(*device)
    actual = _operator(weights, *scan, torch.float32)
    for name, x, y in zip(("deter", "stoch", "logp"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the reference round what it multiplies to bfloat16."""
    linear, einsum = torch.nn.functional.linear, torch.einsum

    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: linear(rounded(x), rounded(w), b)
    )
    monkeypatch.setattr(torch, "einsum", lambda how, x, w: einsum(how, rounded(x), rounded(w)))


@cells
@shapes
@pytest.mark.parametrize("device", DEVICES[1:3], ids=str)
def test_observe_in_bfloat16(emulate, rounding, cell, shape, device):
    draw = Draw()
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    expected = rssm_observe(weights, *scan)
    emulate(*device)
    actual = _operator(weights, *scan, torch.bfloat16)
    for name, x, y in zip(("deter", "stoch", "logp"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, **BFLOAT16, msg=lambda m, n=name: f"{n}: {m}")


@cells
@shapes
@devices
def test_observe_gradients(emulate, cell, shape, device):
    draw = Draw(grad=True)
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    expected = gradients(rssm_observe, weights, scan)
    emulate(*device)
    actual = gradients(lambda *args: _operator(*args, torch.float32), weights, scan)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        y = torch.zeros_like(x) if y is None else y
        size = float(y.abs().max()) + 1
        torch.testing.assert_close(
            x / size, y / size, **TOLERANCE, msg=lambda m, i=i: f"gradient {i}: {m}"
        )


@cells
@shapes
@devices
def test_imagine(emulate, cell, shape, device):
    arguments = imagine_arguments(cell, (shape[0] * 5, *shape[1:]), "dcd", torch.float32)
    expected = rssm_imagine(*arguments)
    emulate(*device)
    actual = _imagine(*arguments, torch.float32)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE)


@cells
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
@pytest.mark.parametrize("blocks", [9, 18, 36], ids=str)
def test_imagine_in_bfloat16(emulate, rounding, cell, shape, blocks):
    """Teams of 64, 32 and 16 rows, several of each, the last one not full."""
    arguments = imagine_arguments(cell, (70, *shape[1:]), "dc", torch.float32)
    expected = rssm_imagine(*arguments)
    emulate(blocks, 2, 1)
    actual = _imagine(*arguments, torch.bfloat16)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **BFLOAT16)
