"""Records what a benchmark measured: one JSON line per result, with all that tells it apart."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
# What limits instruction sets and threads, ours and those of PyTorch's libraries.
LIMITS = (
    "FASTDREAMER_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
)


def record(name: str, rows: list[dict[str, Any]], device: str = "cpu") -> Path:
    """Appends rows to ``bench/results/<name>.jsonl`` and returns that file.

    Args:
        rows: each with what it measured (operator or workload, backend, dtype, shape) and its
            times, in seconds; device, versions, commit, command and date are added.
        device: the kind of device that the times are of, "cpu" or "cuda".
    """
    path, common = RESULTS / f"{name}.jsonl", origin(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | common) + "\n")
    return path


def origin(device: str = "cpu") -> dict[str, Any]:
    """Where, with what and when results are made."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """The model of the device, and of a CPU also the widest vector or matrix unit in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    model = found[1] if found else platform.processor() or platform.machine()
    units = ("amx_tile", "avx512f", "avx2")
    found_unit = next((x for x in units if re.search(rf"\b{x}\b", text)), platform.machine())
    unit = os.environ.get("FASTDREAMER_ISA") or found_unit.removesuffix("_tile")
    return f"{model}, {os.cpu_count()} cores, {unit}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


@cache
def commit() -> str:
    """The short hash of the checkout, with "-dirty" where sources differ from it.

    FASTDREAMER_COMMIT says it where the sources are no checkout.
    """
    if given := os.environ.get("FASTDREAMER_COMMIT"):
        return given
    hashed = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return (hashed or "none") + ("-dirty" if changed else "")


def command() -> str:
    """The command line of this process, behind the environment's `LIMITS`."""
    module = sys.modules["__main__"].__spec__
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return " ".join([*limits, program, *sys.argv[1:]])


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
