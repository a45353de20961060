"""Triton's kernels on a machine without a GPU: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdreamer.kernels.ops import TRITON_STEMS
from fastdreamer.kernels.register import INTERPRETED

aot = pytest.importorskip("fastdreamer.kernels.aot", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).resolve().parents[1]

stems = pytest.mark.parametrize("stem", TRITON_STEMS)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


@pytest.mark.slow
@stems
def test_in_the_interpreter(stem):
    """The operator's own tests, in a process where Triton's kernels run on the CPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTDREAMER_REQUIRE": "triton"}
    suite = str(ROOT / "tests" / f"test_{stem}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", suite]
    done = subprocess.run(
        [*command, "-m", "operators", "--backend", "triton"],
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
    import triton

    x = torch.empty(1 << 14, device="meta")
    each = aot.Launch(triton.jit(spilling_kernel), (x, x), {"BLOCK": 1 << 14}, 1, 3)
    assert aot.compiled(each, 80).spilled > 0
