"""Checkpoints: atomic, checksummed, two kept.

A checkpoint is ``checkpoint-<step>.pt`` (written and fsynced first) and ``checkpoint-<step>.json``
with its SHA-256, the replay's manifest and the counters (renamed into place last). Only complete
pairs count, so a crash while saving leaves the one before it in force.
"""

from __future__ import annotations

import hashlib
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
        del data
        return torch.load(self.path, map_location=map_location, weights_only=True)


def save(folder: Path, step: int, state: Mapping[str, Any], info: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint of environment step ``step`` and drop all but the newest two.

    Args:
        folder: made if needed.
        state: tensors and plain values, for the .pt file.
        info: plain values for the .json file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:010d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    partial.rename(path)
    info = {**info, "step": step, "sha256": digest}
    _write_json(path.with_suffix(".json"), info)
    for old in find_all(folder)[:-KEEP]:
        old.path.with_suffix(".json").unlink()
        old.path.unlink()
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


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".json.partial")
    with partial.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
