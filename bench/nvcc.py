"""What the CUDA kernels take on a chip: ``python -m bench.nvcc``. See ``--help``.

Compiles csrc/cuda with nvcc, which needs no GPU, and prints registers, stack and spills of every
kernel; exits with 1 where one spills. It takes about half a minute of a core for each architecture.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastdreamer.cli import parse as parse_options
from fastdreamer.cli import run
from fastdreamer.errors import UsageError, UserError

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a")


@dataclass(frozen=True)
class Options:
    """Compile the CUDA kernels, print what they take, fail where one spills registers."""

    arch: tuple[str, ...] = ARCHITECTURES
    """Architectures that nvcc knows."""


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
    """Kernels of one source. Raises UserError with nvcc's words where it fails."""
    flags = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-arch={architecture}"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as output:
        includes = [f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
        command = ["nvcc", *flags, *includes, str(source), "-o", output.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{source.name} for {architecture}: {done.stderr}")
    return parse(done.stderr)


def main() -> None:
    """Parse the command line, compile, print."""
    options = parse_options(Options, sys.argv[1:], "python -m bench.nvcc", Options())
    if not shutil.which("nvcc"):
        raise UsageError("nvcc is not in the path")
    kernels = [
        kernel
        for source in sorted((CSRC / "cuda").glob("*.cu"))
        for architecture in options.arch
        for kernel in compile_kernels(source, architecture)
    ]
    for kernel in kernels:
        print(
            f"{kernel.architecture:8} {kernel.name:32} {kernel.registers:4} registers "
            f"{kernel.stack:4} bytes of stack {kernel.spills:4} bytes spilled"
        )
    if spilling := [kernel.name for kernel in kernels if kernel.spills]:
        raise UserError(f"registers are spilled by {', '.join(spilling)}")


if __name__ == "__main__":
    run(main)
