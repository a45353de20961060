"""Checkpoints: atomic, checksummed, two kept.

A checkpoint is ``checkpoint-<step>.pt`` (written and fsynced first) and ``checkpoint-<step>.json``
with its SHA-256, the replay's manifest and the counters (renamed into place last). Only complete
pairs count, so a crash while saving leaves the one before it in force.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdreamer.errors import UserError

KEEP = 2


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    """Its .pt file."""
    info: Mapping[str, Any]
    """What its .json file holds: step, updates, replay manifest, sha256."""

    def load(self, map_location: str | torch.device = "cpu") -> dict[str, Any]:
        """The saved state.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != self.info["sha256"]:
            raise CheckpointError(f"{self.path} is damaged: its checksum does not match")
        return torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)


def save(folder: Path, step: int, state: Mapping[str, Any], info: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint of environment step ``step`` and drop all but the newest two.

    Args:
        folder: made if needed.
        state: tensors and plain values, for the .pt file.
        info: plain values for the .json file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:010d}.pt"
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:
        write_atomically(path, buffer.getbuffer())
        info = {**info, "step": step, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}
        write_json(path.with_suffix(".json"), info)
        for old in find_all(folder)[:-KEEP]:
            old.path.with_suffix(".json").unlink()
            old.path.unlink()
    finally:
        for left in folder.glob("checkpoint-*"):  # of saves that were killed or had no room
            if left.suffix == ".partial" or not left.with_suffix(".json").exists():
                left.unlink()
    return Checkpoint(path, info)


def find_all(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints in a folder, oldest first.

    Raises:
        CheckpointError: a .json file is damaged.
    """
    found = []
    for info in sorted(folder.glob("checkpoint-*.json")):
        if info.with_suffix(".pt").exists():
            found.append(Checkpoint(info.with_suffix(".pt"), _read_info(info)))
    return found


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_bytes())
        if {"step", "sha256"} <= info.keys():
            return info
    except (OSError, ValueError, AttributeError):
        pass
    raise CheckpointError(
        f"{path} is damaged and cannot be read; without that file the run goes on from the"
        " checkpoint before it, if there is one"
    )


def write_json(path: Path, value: Any) -> None:
    """Plain values as JSON, complete or not at all."""
    write_atomically(path, json.dumps(value, indent=1).encode() + b"\n")


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file beside its place, bring it to the disk, then rename it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
