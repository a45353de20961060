"""Compiles every Triton kernel ahead of time, for GPUs that need not be there.

``python -m fastdreamer.kernels.aot`` prints what each kernel takes of a multiprocessor, and fails
where one does not compile or spills registers. A kernel is compiled for the shapes that
``presets()`` of its module launches.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, recording
from .ops import TRITON_STEMS
from .register import INTERPRETED

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100, B200."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
DIVISIBLE = ["tt.divisibility", 16]
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    kernel: str
    constants: str
    target: int
    num_warps: int
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of each thread's registers that lie in memory."""
    shared: int
    """Bytes of shared memory of each program."""


def launches(stem: str) -> list[Launch]:
    """One of each compilation that the presets need of ``kernels/<stem>_triton.py``."""
    module = import_module(f".{stem}_triton", __package__)
    with recording() as recorded:
        module.presets()
    different = {}
    for each in recorded:
        options = (each.kernel.__name__, each.num_warps, each.num_stages)
        different[repr((options, _specialise(each)))] = each
    return list(different.values())


def compiled(each: Launch, target: int) -> Resources:
    """Compile a launch for one of `TARGETS`.

    Raises RuntimeError in Triton's interpreter, which has replaced the kernels by its own.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET=1")
    options = {
        "num_warps": each.num_warps,
        "num_stages": each.num_stages,
        "enable_fp_fusion": True,
    }
    source = ASTSource(each.kernel, *_specialise(each))
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spilled = _usage(binary.asm["cubin"])
    return Resources(
        kernel=each.kernel.__name__,
        constants=" ".join(f"{k}={v}" for k, v in each.constants.items()),
        target=target,
        num_warps=each.num_warps,
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
    )


def _specialise(each: Launch) -> tuple[dict[str, Any], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as Triton derives them from a call's arguments."""
    signature: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    constants = dict(each.constants)
    for index, name in enumerate(each.kernel.arg_names):
        value: Any = None if name in constants else each.arguments[index]
        if isinstance(value, tuple):  # of addresses, all aligned
            signature[name] = ("i64",) * len(value)
            attributes |= {(index, i): [DIVISIBLE] for i in range(len(value))}
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (signature[name] in ("i32", "i64") and not value % 16):
            attributes[(index,)] = [DIVISIBLE]
    return signature, constants, attributes


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; Triton's kernels use a stack to spill only."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, USAGE.findall(listing)[0])
    return registers, stack


def rows(targets: Sequence[int] = TARGETS) -> Iterator[Resources | tuple[Launch, int, Exception]]:
    """Every kernel for every target: what it takes, or why it does not compile."""
    for stem in TRITON_STEMS:
        for each in launches(stem):
            for target in targets:
                try:
                    yield compiled(each, target)
                except Exception as error:
                    yield each, target, error


def main() -> int:
    """Print the table; 1 where a kernel fails or spills."""
    if INTERPRETED:
        print("unset TRITON_INTERPRET: the interpreter replaces the compiler", file=sys.stderr)
        return 1
    failures = 0
    print(f"triton {triton.__version__}\n")
    print("target warps registers spilled shared  kernel")
    for row in rows():
        if isinstance(row, Resources):
            failures += row.spilled > 0
            print(
                f"sm_{row.target:<4}{row.num_warps:5}{row.registers:10}{row.spilled:8}"
                f"{row.shared:7}  {row.kernel} {row.constants}"
            )
        else:
            each, target, error = row
            failures += 1
            print(f"sm_{target:<4} {each.kernel.__name__} does not compile: {error}")
    print(f"\n{failures} kernels fail or spill" if failures else "\nno kernel spills")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
