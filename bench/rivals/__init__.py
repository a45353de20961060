"""Other implementations, as whole updates on the batch of a workload.

Each module has ``PACKAGES`` (what pip installs, pinned), ``supports(workload)``, and
``updates(workload, compiled)``: by the name of each setting, a function that builds the learner
and returns one update.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch.distributions import Distribution

from bench.workload import Update, Workload
from fastdreamer.errors import UsageError

NAMES = ("sheeprl", "torchrl")

Makers = Mapping[str, Callable[[], Update]]


class Rival(Protocol):
    """What a module of this package offers."""

    PACKAGES: tuple[str, ...]

    def supports(self, workload: Workload) -> bool: ...

    def updates(self, workload: Workload, compiled: bool) -> Makers: ...


def installed() -> list[str]:
    """Names of the rivals that can be imported."""
    return [name for name in NAMES if importlib.util.find_spec(name)]


def load(name: str) -> Rival:
    """A rival's module, which can be read without the rival's packages.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in NAMES:
        raise UsageError(f"--rivals: unknown {name!r}, valid are {', '.join(NAMES)}, installed")
    module: Any = importlib.import_module(f"bench.rivals.{name}")
    return module


def require(name: str) -> None:
    """Refuse a rival whose packages are missing.

    Raises:
        UsageError: with the command that installs them.
    """
    if name not in installed():
        packages = " ".join(f"'{package}'" for package in load(name).PACKAGES)
        raise UsageError(f"--rivals: {name} is not installed: pip install {packages}")


def installed_version(name: str) -> str:
    """The version of an installed rival."""
    return version(name)


@contextmanager
def settings(products: str, validate: bool = False) -> Iterator[None]:
    """What a rival sets for the whole process, for the length of one of its updates.

    Args:
        products: precision of float32 matrix products ("highest", "high", "medium").
        validate: whether distributions check their arguments.
    """
    before = torch.get_float32_matmul_precision(), Distribution._validate_args
    torch.set_float32_matmul_precision(products)
    Distribution.set_default_validate_args(validate)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        Distribution.set_default_validate_args(before[1])
