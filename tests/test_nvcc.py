"""What nvcc says of the CUDA kernels: that they compile and keep their values in registers."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from bench import nvcc

LOG = """
ptxas info    : Compiling entry function '_ZN11fastdreamer11pack_kernelINS_7Float32EEEvNS_7PackingEPc' for 'sm_80'
ptxas info    : Function properties for _ZN11fastdreamer11pack_kernelINS_7Float32EEEvNS_7PackingEPc
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 33 registers, used 1 barriers
"""  # noqa: E501


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs binutils")
def test_spills_are_seen():
    assert nvcc.parse(LOG) == [nvcc.Kernel("pack_kernel<Float32>", "sm_80", 33, 16, 20)]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_an_unknown_architecture_is_one_line():
    command = [sys.executable, "-m", "bench.nvcc", "--arch", "sm_1"]
    done = subprocess.run(
        command, cwd=nvcc.CSRC.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
