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
from test_rssm import (
    SHAPES,
    TOLERANCE,
    Draw,
    assert_rollouts_equal,
    cells,
    gradients,
    imagine_arguments,
    make_scan,
    make_weights,
)
from torch import Tensor

from fastdreamer.config import SIZES
from fastdreamer.kernels import library
from fastdreamer.kernels.rssm_imagine import _compute as _imagine
from fastdreamer.kernels.rssm_imagine import _takes as imagine_takes
from fastdreamer.kernels.rssm_imagine import rssm_imagine, rssm_imagine_cuda
from fastdreamer.kernels.rssm_observe import rssm_observe, rssm_observe_cuda
from fastdreamer.kernels.rssm_observe_operator import CObserve, observe
from fastdreamer.kernels.rssm_observe_operator import _ask as observe_takes
from fastdreamer.kernels.rssm_observe_weights import flatten
from fastdreamer.kernels.rssm_weights import CModel, c_model

pytestmark = pytest.mark.operators

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas")
# blocks, warps of each, clusters
DEVICES = [(1, 1, 0), (2, 2, 0), (8, 1, 1), (13, 2, 0)]
# Also more rows than a team takes, and columns that leave blocks without any.
WIDE = [*SHAPES, (19, 3, 48, 5, 9, 4, 21, 2)]
# Another order of sums may round a factor the other way, by 2^-7 of it.
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

    def choose(
        blocks: int, warps: int, clusters: int, shared: int = 1 << 18, cache: int = 1 << 28
    ) -> None:
        ctypes.CDLL(str(emulated)).fd_emulate(blocks, warps, shared, clusters, cache)
        observe_takes.cache_clear()
        imagine_takes.cache_clear()

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
    actual = observe(weights, *scan, torch.float32)
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
    actual = observe(weights, *scan, torch.bfloat16)
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
    actual = gradients(lambda *args: observe(*args, torch.float32), weights, scan)
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
    assert_rollouts_equal(actual, expected)


@cells
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
@pytest.mark.parametrize("blocks", [9, 18, 36], ids=str)
def test_imagine_in_bfloat16(emulate, rounding, cell, shape, blocks):
    """Teams of 64, 32 and 16 rows, several of each, the last one not full."""
    arguments = imagine_arguments(cell, (70, *shape[1:]), "dc", torch.float32)
    expected = rssm_imagine(*arguments)
    emulate(blocks, 2, 1)
    actual = _imagine(*arguments, torch.bfloat16)
    assert_rollouts_equal(actual, expected, **BFLOAT16)


@cells
def test_sizes_decide_who_serves(emulate, cell, monkeypatch):
    """By the library where it takes a model forward and backward, else by the reference."""
    draw, shape = Draw(), SHAPES[0]
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    rollout = imagine_arguments(cell, shape, "dc", torch.float32)
    calls = []
    launch = library.launch
    monkeypatch.setattr(library, "launch", lambda *args: (calls.append(args[0]), launch(*args)))
    expected = (*rssm_observe(weights, *scan), *rssm_imagine(*rollout)[:3])
    for shared, served in ((1 << 18, ["fd_rssm_observe", "fd_rssm_imagine"]), (1 << 10, [])):
        emulate(2, 1, 0, shared)
        actual = (*rssm_observe_cuda(weights, *scan), *rssm_imagine_cuda(*rollout)[:3])
        assert calls == served
        calls.clear()
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, **TOLERANCE)


@cells
def test_autocast_chooses_bfloat16(emulate, monkeypatch, cell):
    draw, shape = Draw(), SHAPES[1]
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    emulate(2, 1, 0)
    expected = observe(weights, *scan, torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    actual = rssm_observe_cuda(weights, *scan)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@cells
def test_compiles_to_one_graph(emulate, cell):
    draw, shape = Draw(), SHAPES[0]
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    emulate(2, 1, 0)

    def run(embedded: Tensor) -> Tensor:
        deter, stoch, logp = rssm_observe_cuda(weights, *scan[:3], embedded, *scan[4:])
        return deter.sum() + (stoch * logp).sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    embedded = scan[3].clone().requires_grad_()
    (actual,) = torch.autograd.grad(compiled(embedded), embedded)
    (expected,) = torch.autograd.grad(run(embedded), embedded)
    assert torch.equal(actual, expected)


@cells
@pytest.mark.parametrize("size", [(0, 5), (3, 0)], ids=str)
def test_observe_of_nothing(emulate, cell, size):
    draw, shape = Draw(grad=True), (*size, *SHAPES[0][2:])
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    emulate(2, 1, 0)
    deter, _, logp = rssm_observe_cuda(weights, *scan)
    assert deter.shape == (*size, shape[2])
    grads = torch.autograd.grad(deter.sum() + logp.sum(), flatten(weights))
    assert not any(x.any() for x in grads)


@cells
def test_imagine_of_nothing(emulate, cell):
    emulate(2, 1, 0)
    for shape in ((0, 3, *SHAPES[0][2:]), (3, 0, *SHAPES[0][2:])):
        arguments = imagine_arguments(cell, shape, "d", torch.float32)
        assert_rollouts_equal(rssm_imagine_cuda(*arguments), rssm_imagine(*arguments))


class TestCInterface:
    """The C function of the scan, called as another program would."""

    @pytest.fixture(autouse=True)
    def _emulated(self, emulate):
        emulate(2, 1, 0)
        draw, shape = Draw(), SHAPES[0]
        self.weights = make_weights(draw, "block_gru", shape)
        self.model = c_model(self.weights, shape[5], self.weights.posterior)
        self.memory = torch.zeros(1 << 20)
        pointers = {k: self.memory.data_ptr() for k, _ in CObserve._fields_[2:]}
        self.scan = CObserve(B=1, T=1, **pointers)
        self.launch = library.Launch(compute=0)

    def call(self, *structures: object) -> int:
        """The error code of the function; what it was told is not used where it is not 0."""
        types = (CModel, CObserve, library.Launch)
        c_function = library._load("cuda").fd_rssm_observe
        c_function.argtypes = [ctypes.POINTER(x) for x in types]
        c_function.errcheck = lambda error, *_: error
        return c_function(*structures)

    def test_says_what_it_needs_and_refuses_less(self):
        assert self.call(self.model, self.scan, self.launch) == 0
        assert self.launch.workspace_bytes > 0
        self.launch.workspace = self.memory.data_ptr()
        assert self.call(self.model, self.scan, self.launch) == 0
        self.launch.workspace += 4
        assert self.call(self.model, self.scan, self.launch) == 7
        self.launch.workspace -= 4
        self.launch.workspace_bytes -= 1
        assert self.call(self.model, self.scan, self.launch) == 7

    def test_null_structures(self):
        arguments = [self.model, self.scan, self.launch]
        for i in range(3):
            assert self.call(*arguments[:i], None, *arguments[i + 1 :]) == 1

    @pytest.mark.parametrize("name", [k for k, _ in CObserve._fields_[2:]])
    def test_null_tensors(self, name):
        setattr(self.scan, name, None)
        assert self.call(self.model, self.scan, self.launch) == 1

    @pytest.mark.parametrize(
        ("name", "value"),
        [("cell", 2), ("deter", 0), ("deter", 25), ("blocks", 65), ("head_layers", 3)],
    )
    def test_sizes(self, name, value):
        setattr(self.model, name, value)
        assert self.call(self.model, self.scan, self.launch) == 2

    def test_beyond_the_device(self):
        self.scan.T = 1 << 21
        assert self.call(self.model, self.scan, self.launch) == 6

    def test_compute(self):
        self.launch.compute = 1
        assert self.call(self.model, self.scan, self.launch) == 3


# Blocks, shared memory and cache of an H100 and an A100.
CHIPS = {"h100": (132, 1, 1, 232448, 50 << 20), "a100": (108, 1, 0, 166912, 40 << 20)}
# Largest sizes that are taken, by chip and type, in each recipe.
LARGEST = {
    ("h100", torch.bfloat16): ("12m", "m"),
    ("h100", torch.float32): ("12m", "s"),
    ("a100", torch.bfloat16): ("12m", "m"),
    ("a100", torch.float32): ("1m", "s"),
}


@pytest.mark.parametrize(("chip", "compute"), LARGEST, ids=str)
@pytest.mark.parametrize("recipe", ["2025", "2023"])
def test_which_sizes_are_taken(emulate, chip, compute, recipe):
    """Observe and imagine both, by the memory of a block and the cache."""
    emulate(*CHIPS[chip])
    device = torch.device("cpu")
    taken = []
    for name, size in SIZES[recipe].items():
        blocks = size.blocks if recipe == "2025" else 1
        latent = (size.stoch, size.classes)
        logits = size.stoch * size.classes
        sizes = (recipe == "2025", size.deter, *latent, 18, size.hidden, blocks)
        prior = ((size.hidden,) * (2 if recipe == "2025" else 1), (logits,))
        layers = (size.units,) * size.layers
        if observe_takes(
            (*sizes, (size.hidden, logits)), 16, 64, compute, device
        ) and imagine_takes(
            (*sizes, sum(prior, ())), layers, ((18, 1),), 1024, 15, compute, device
        ):
            taken.append(name)
    largest = LARGEST[chip, compute][recipe == "2023"]
    names = list(SIZES[recipe])
    assert taken == names[: names.index(largest) + 1]


@cells
@pytest.mark.parametrize("shape", WIDE[:3], ids=str)
def test_observe_gradients_in_bfloat16(emulate, rounding, cell, shape):
    """Against a reference that rounds the factors of every product, but not their gradients."""
    draw = Draw(grad=True)
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    expected = gradients(rssm_observe, weights, scan)
    emulate(3, 2, 0)
    actual = gradients(lambda *args: observe(*args, torch.bfloat16), weights, scan)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        y = torch.zeros_like(x) if y is None else y
        size = float(y.abs().max()) + 1
        torch.testing.assert_close(
            x / size, y / size, **BFLOAT16, msg=lambda m, i=i: f"gradient {i}: {m}"
        )
