"""Triton's kernels on a machine without a GPU: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import required

from fastdreamer.kernels.ops import TRITON_STEMS
from fastdreamer.kernels.register import INTERPRETED


def _required_or_skip(module: str) -> ModuleType:
    return import_module(module) if "triton" in required() else pytest.importorskip(module)


tl = _required_or_skip("triton.language")
aot = _required_or_skip("fastdreamer.kernels.aot")
triton = _required_or_skip("triton")

ROOT = Path(__file__).resolve().parents[1]

stems = pytest.mark.parametrize("stem", TRITON_STEMS)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


@pytest.mark.slow
@pytest.mark.parametrize("suite", [*TRITON_STEMS, "golden"])
def test_in_the_interpreter(suite):
    """The tests of operators, and the goldens, where Triton's kernels run on the CPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTDREAMER_REQUIRE": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--backend", "triton", f"tests/test_{suite}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS, ids=lambda target: f"sm_{target}")
@stems
def test_compiles_without_spills(stem, target):
    launches = aot.launches(stem)
    assert launches
    for each in launches:
        found = aot.compiled(each, target)
        assert 0 < found.registers <= 255 and found.spilled == 0, found


def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """More values at once than a warp has registers: 512 in each thread."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * tl.sum(x, 0))


def test_a_spill_shows():
    x = torch.empty(1 << 14, device="meta")
    each = aot.Launch(triton.jit(spilling_kernel), (x, x), {"BLOCK": 1 << 14}, 1, 3)
    assert aot.compiled(each, 80).spilled > 0


@pytest.mark.parametrize(("spilled", "code"), [(0, 0), (8, 1)])
def test_the_table_fails_on_a_spill(monkeypatch, capsys, spilled, code):
    row = aot.Resources("a_kernel", "K=4", 90, 4, registers=32, spilled=spilled, shared=128)
    monkeypatch.setattr(aot, "rows", lambda: [row])
    assert aot.main() == code
    assert "a_kernel K=4" in capsys.readouterr().out


def test_the_table_fails_where_a_kernel_does_not_compile(monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise ValueError("no such target")

    monkeypatch.setattr(aot, "compiled", broken)
    monkeypatch.setattr(aot, "TRITON_STEMS", ("lambda_return",))
    assert aot.main() == 1
    assert "does not compile: no such target" in capsys.readouterr().out
