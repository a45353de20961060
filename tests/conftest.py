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
REQUIRED_BY = {"cpp": "cpu"}
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test with an argument `backend` once per backend."""
    if "backend" in metafunc.fixturenames:
        here = ("reference", "triton" if INTERPRETED else "cpp")
        backends = metafunc.config.getoption("--backend") or here
        metafunc.parametrize("backend", backends)


@pytest.fixture
def ops(backend: str) -> kernels.Ops:
    """The operators of each backend on the CPU."""
    return _resolve_or_skip(backend)


@pytest.fixture
def cpp() -> kernels.Ops:
    """The operators of the compiled CPU library."""
    return _resolve_or_skip("cpp")


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest, cpp: kernels.Ops) -> Iterator[str]:
    """Each instruction set in turn, as the one that the compiled library uses."""
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


def _resolve_or_skip(backend: str) -> kernels.Ops:
    try:
        return kernels.resolve(backend)
    except RuntimeError as error:
        if REQUIRED_BY.get(backend) in required():
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


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every new empty float tensor with NaN, so that an element never written shows."""
    if request.node.get_closest_marker("operators"):
        for owner, name in EMPTY_FACTORIES:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args, **kwargs):
        tensor = factory(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return empty
