"""The compiled library, and the choice of a backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdreamer import kernels
from fastdreamer.kernels import library
from fastdreamer.kernels import ops as ops_module
from fastdreamer.kernels.register import INTERPRETED

pytestmark = pytest.mark.operators

ROOT = Path(__file__).resolve().parent.parent


def test_error_strings(cpp):
    c_library = library._load()
    messages = [c_library.fd_error_string(code) for code in (0, 1, 2, 3, 99, -1)]
    assert messages[0] == b"no error"
    assert messages[4] == messages[5] == b"unknown error code"
    assert len(set(messages)) == 5
    header = (ROOT / "csrc" / "fastdreamer.h").read_text()
    assert f"#define FD_ABI_VERSION {library.ABI_VERSION}\n" in header


@pytest.fixture
def fresh_backends(device):
    """Forgets what was loaded and chosen, before a test and after it."""
    if INTERPRETED or device != "cpu":
        pytest.skip("the C++ library serves the CPU, where Triton's interpreter does not")
    caches = (library._load, library.function, ops_module._best)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("name", ["portable", "mmx"])
def test_the_environment_chooses_the_instruction_set(cpp, name):
    code = "from fastdreamer.kernels import library; print(library.isa())"
    environment = os.environ | {"FASTDREAMER_ISA": name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if name in library.ISAS:
        assert done.stdout == f"{name}\n"
    else:
        assert "FASTDREAMER_ISA=mmx: portable, avx2" in done.stderr


def test_absent_library(monkeypatch, fresh_backends, tmp_path):
    monkeypatch.setattr(library, "CPU_LIBRARY", tmp_path / "libfastdreamer_cpu.so")
    with pytest.raises(RuntimeError, match=r"'cpp' is not available .* is not built"):
        kernels.resolve("cpp")
    x = torch.ones(4, 15)
    with pytest.raises(RuntimeError, match="is not built"):
        torch.ops.fastdreamer.lambda_return(x, x, x, x)
    with pytest.warns(UserWarning, match=r"'reference' backend .* is not built"):
        assert kernels.resolve("auto").backend == "reference"


def test_unusable_library(monkeypatch, fresh_backends, tmp_path):
    broken = tmp_path / "libfastdreamer_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "CPU_LIBRARY", broken)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        kernels.resolve("cpp")


def test_library_of_another_version(monkeypatch, fresh_backends, cpp):
    library._load.cache_clear()
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match="has interface version"):
        kernels.resolve("cpp")


def test_resolve_chooses_the_compiled_library(cpp):
    assert kernels.resolve("auto").backend == "cpp"
    assert kernels.resolve("auto").served_by["lambda_return"] == "cpp"
    assert set(kernels.resolve("reference").served_by.values()) == {"reference"}


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_resolve_refuses_a_gpu_backend_on_the_cpu(name, cpp):
    with pytest.raises(RuntimeError, match=f"'{name}' is not available on 'cpu': it runs on a"):
        kernels.resolve(name, "cpu")


def test_resolve_refuses_the_cpu_library_on_a_gpu():
    with pytest.raises(RuntimeError, match="CPU only, not on cuda"):
        kernels.resolve("cpp", "cuda")


def test_resolve_refuses_unknown_backends():
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        kernels.resolve("refrence")


def test_kernels_is_importable_under_its_own_name_only():
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "import this package as fastdreamer.kernels, not as kernels" in done.stderr
