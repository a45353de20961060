"""Our functions and train steps against numbers of the original implementations.

``--golden DIR`` takes any directory of either format, ``--backend`` chooses the kernels and
``--device`` where they run. In float64 forward values must agree to 1e-9 and gradients to 1e-7 of
the largest entry; in float32 to what the originals' own rounding leaves (see
tests/golden/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_2023 import Golden2023
from golden_2023_tests import *  # noqa: F403
from golden_2025 import Golden2025
from golden_2025_tests import *  # noqa: F403

from fastdreamer.kernels.ops import IMPLEMENTATIONS, Ops

HERE = Path(__file__).parent / "golden"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def golden_folders(config: pytest.Config) -> dict[str, list[Path]]:
    """The sets to check, by recipe; each is told by its manifest."""
    given = [Path(p) for p in config.getoption("--golden") or ()]
    found: dict[str, list[Path]] = {"2023": [], "2025": []}
    for folder in given or sorted(p for p in HERE.iterdir() if p.is_dir()):
        manifest = folder / "manifest.json"
        if not manifest.exists():
            raise pytest.UsageError(f"--golden {folder}: no manifest.json there")
        facts = json.loads(manifest.read_text())
        if "recurrent_state_size" in facts.get("config", {}):
            found["2023"].append(folder)
        elif "loss_gradient_modules" in facts:
            found["2025"].append(folder)
        else:
            raise pytest.UsageError(f"--golden {folder}: not a set of recipe 2023 or 2025")
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for recipe, folders in golden_folders(metafunc.config).items():
        if f"folder_{recipe}" in metafunc.fixturenames:
            names = [f.name for f in folders]
            metafunc.parametrize(f"folder_{recipe}", folders, ids=names, scope="module")


def check_served(ops: Ops, backend: str) -> None:
    for name, row in IMPLEMENTATIONS.items():
        if backend in row:
            assert ops.served_by[name] == backend, f"{name} fell back to {ops.served_by[name]}"


@pytest.fixture(autouse=True)
def _on_device(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=DTYPES)
def golden_2023(folder_2023: Path, ops: Ops, backend: str, request) -> Golden2023:
    check_served(ops, backend)
    return Golden2023(folder_2023, DTYPES[request.param], ops)


@pytest.fixture(params=DTYPES)
def golden_2025(folder_2025: Path, ops: Ops, backend: str, request) -> Golden2025:
    check_served(ops, backend)
    return Golden2025(folder_2025, DTYPES[request.param], ops)
