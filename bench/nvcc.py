"""What the CUDA kernels take on a chip: ``python -m bench.nvcc [--arch sm_80 --arch sm_90a]``.

Compiles csrc/cuda with nvcc, which needs no GPU, and prints registers, stack and spills of every
kernel; exits with 1 where one spills. It takes about half a minute of a core for each architecture.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a")


class Kernel(NamedTuple):
    """A compiled kernel; stack and spills (stores and loads) in bytes for each thread."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int


PROPERTIES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def parse(log: str) -> list[Kernel]:
    """The kernels in what ``nvcc -Xptxas -v`` prints."""
    return [
        Kernel(
            _readable(found["name"]),
            found["architecture"],
            int(found["registers"]),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in PROPERTIES.finditer(log)
    ]


def _readable(name: str) -> str:
    """The name and template arguments of a mangled function, as the compiler's c++filt has it."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    plain = re.sub(r"fastdreamer::|\((int|bool)\)", "", done.stdout.strip().removeprefix("void "))
    return plain[: plain.rindex("(")]


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    """Kernels of one source. Raises CalledProcessError where nvcc fails."""
    flags = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-arch={architecture}"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as output:
        includes = [f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
        command = ["nvcc", *flags, *includes, str(source), "-o", output.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return parse(done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="such as sm_80 (repeatable)")
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        print("bench.nvcc: nvcc is not in the path", file=sys.stderr)
        return 1
    kernels = [
        kernel
        for source in sorted((CSRC / "cuda").glob("*.cu"))
        for architecture in options.arch or ARCHITECTURES
        for kernel in compile_kernels(source, architecture)
    ]
    for kernel in kernels:
        print(
            f"{kernel.architecture:8} {kernel.name:32} {kernel.registers:4} registers "
            f"{kernel.stack:4} bytes of stack {kernel.spills:4} bytes spilled"
        )
    return int(any(kernel.spills for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
