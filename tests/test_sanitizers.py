"""The operators' tests on a library built with sanitizers; the first report ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUITES = (
    *("operators", "lambda_return", "norm_act", "conv_norm_act", "winograd", "twohot", "unimix"),
    *("optim", "gru_step", "rssm", "policy_step", "heads", "bfloat16", "gumbel", "image_loss"),
)
# What no memory error hides in, and torch's tracer is slow under a sanitizer.
LEFT_OUT = (
    "opcheck or gradcheck or compile or resolve or library or importable or float64 or emulated"
)


def runtimes(*names: str) -> str:
    """Paths of the compiler's sanitizer runtimes, for LD_PRELOAD."""
    compiler = os.environ.get("CXX", "g++")
    found = (
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    )
    return ":".join(found)


def build(folder: Path, sanitizers: str = "") -> Path:
    """The CPU library for tests, each instruction set included, the tiles of AMX in software."""
    options = {
        "CMAKE_BUILD_TYPE": "Test",  # without Release's -O3, which takes minutes with sanitizers
        "CMAKE_CXX_FLAGS": "-O1",
        "CMAKE_CXX_COMPILER": os.environ.get("CXX", "g++"),
        "FASTDREAMER_SANITIZE": sanitizers,
        "FASTDREAMER_AMX_EMULATED": "ON",
        "FASTDREAMER_OUTPUT_DIR": folder,
        "FASTDREAMER_CUDA": "OFF",
    }
    flags = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder / "build", *flags], check=True)
    subprocess.run(
        ["cmake", "--build", folder / "build", "--target", "fastdreamer_cpu", "--parallel"],
        check=True,
    )
    return folder / "libfastdreamer_cpu.so"


on_request = pytest.mark.skipif(
    not os.environ.get("FASTDREAMER_SANITIZE"),
    reason="takes minutes: FASTDREAMER_SANITIZE=1, on Linux with CMake and GCC",
)


@on_request
def test_address_and_undefined_behaviour(tmp_path):
    environment = os.environ | {
        "FASTDREAMER_LIBRARY": str(build(tmp_path, "address,undefined")),
        "FASTDREAMER_REQUIRE": "cpu",
        "LD_PRELOAD": runtimes("asan", "ubsan"),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    suites = [str(ROOT / "tests" / f"test_{name}.py") for name in SUITES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *suites]
    done = subprocess.run(
        [*command, "-k", f"not ({LEFT_OUT})"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


@on_request
@pytest.mark.parametrize("size", [(1, 4), (4, 2), (5, 1)], ids=str)
def test_races_of_cuda_kernels(tmp_path, size):
    """Blocks and warps as threads: every exchange between them has its barrier."""
    program, csrc = tmp_path / "threads", ROOT / "csrc"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wno-unknown-pragmas"]
    command = [os.environ.get("CXX", "g++"), *flags, f"-I{csrc}", f"-I{csrc / 'cuda'}"]
    subprocess.run([*command, ROOT / "tests" / "cuda_threads.cpp", "-o", program], check=True)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    arguments = [program, *map(str, size)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert done.stdout.count("error 0") == 12
