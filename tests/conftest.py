"""Options, backends and the poisoned torch.empty that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fastdreamer import kernels
from fastdreamer.kernels import library
from fastdreamer.kernels.register import INTERPRETED

# FASTDREAMER_REQUIRE names what must be there, so that a test of it fails instead of skipping.
REQUIRED_BY = {"cpp": "cpu", "triton": "triton", "cuda": "cuda"}
EMPTY_FACTORIES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", action="append", metavar="DIR", help="folder of golden data (repeatable)"
    )
    parser.addoption(
        "--backend",
        action="append",
        choices=kernels.BACKENDS,
        help="backend to test (repeatable; default: all that run on a CPU)",
    )
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where operators are tested"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test with an argument `backend` once per backend.

    One with `compiled` runs once per backend but the reference, and one with `compiled` and `isa`
    once per instruction set of the C++ library too.
    """
    names = metafunc.fixturenames
    here = ("reference", "triton" if INTERPRETED else "cpp")
    backends = metafunc.config.getoption("--backend") or here
    compiled = [backend for backend in backends if backend != "reference"]
    if "backend" in names:
        metafunc.parametrize("backend", backends)
    if "compiled" in names and "isa" in names:
        each = [(b, isa) for b in compiled for isa in (library.ISAS if b == "cpp" else (None,))]
        metafunc.parametrize(("compiled", "isa"), each, indirect=True)
    elif "compiled" in names:
        metafunc.parametrize("compiled", compiled, indirect=True)
    elif "isa" in names:
        metafunc.parametrize("isa", library.ISAS, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where operators are tested."""
    return request.config.getoption("--device")


@pytest.fixture
def ops(backend: str, device: str) -> kernels.Ops:
    """The operators of each backend."""
    return _resolve_or_skip(backend, device)


@pytest.fixture
def compiled(request: pytest.FixtureRequest, device: str) -> kernels.Ops:
    """The operators of each backend but the reference."""
    return _resolve_or_skip(request.param, device)


@pytest.fixture
def cpp(device: str) -> kernels.Ops:
    """The operators of the compiled CPU library."""
    return _resolve_or_skip("cpp", device)


@pytest.fixture
def isa(request: pytest.FixtureRequest, device: str) -> Iterator[str | None]:
    """Each instruction set in turn, as the one that the compiled library uses.

    None for a compiled backend that is not this library.
    """
    if request.param is None:
        yield None
        return
    _resolve_or_skip("cpp", device)
    before = library.isa()
    try:
        library.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    library.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _resolve_or_skip(backend: str, device: str) -> kernels.Ops:
    try:
        return kernels.resolve(backend, device)
    except RuntimeError as error:
        kind = "cpu" if backend == "cpp" or (backend == "triton" and INTERPRETED) else "cuda"
        here = device == kind and not (backend == "cpp" and INTERPRETED)
        if REQUIRED_BY.get(backend) in required() and here:
            pytest.fail(f"FASTDREAMER_REQUIRE asks for it: {error}")
        pytest.skip(str(error))


def required() -> list[str]:
    """The words of FASTDREAMER_REQUIRE; an unknown one would silently require nothing."""
    words = [word for word in os.environ.get("FASTDREAMER_REQUIRE", "").split(",") if word]
    if unknown := set(words) - set(REQUIRED_BY.values()):
        raise pytest.UsageError(f"FASTDREAMER_REQUIRE: unknown {sorted(unknown)}")
    return words


def pytest_configure(config: pytest.Config) -> None:
    required()
    with torch.device("cpu"):  # PyTorch notes the factories that take a default device: unpoisoned
        torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every new empty float tensor with NaN, so that an element never written shows."""
    if request.node.get_closest_marker("operators"):
        for owner, name in EMPTY_FACTORIES:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts the new tensors of operator tests on the device of ``--device``."""
    device = request.config.getoption("--device")
    if device == "cpu" or not request.node.get_closest_marker("operators"):
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def _poisoned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args, **kwargs):
        tensor = factory(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return empty
