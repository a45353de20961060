"""Immutable files of replay rows: written whole or not at all, checked when read.

A segment file is the raw bytes of rows [first, first + rows), by column, then stream, then time.
Its manifest entry is `{"file", "first", "rows", "crc32"}`.
"""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdreamer.errors import UserError

Segment = dict[str, Any]
FIELDS = {"file": str, "first": int, "rows": int, "crc32": int}


class ReplayError(UserError):
    """A saved replay is missing, truncated, corrupted or of another layout."""


def write_segment(
    directory: Path, first: int, rows: int, spans: Iterable[NDArray[np.uint8]]
) -> Segment:
    """Write C-contiguous spans as one new file, synced to the disk before it gets its name."""
    path = directory / f"replay-{first:010d}-{first + rows:010d}-{uuid.uuid4().hex[:16]}.bin"
    temporary = path.with_suffix(".bin.tmp")
    crc = 0
    try:
        with open(temporary, "xb") as file:
            for span in spans:
                crc = zlib.crc32(span.data, crc)
                file.write(span.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": path.name, "first": first, "rows": rows, "crc32": crc}


def read_segment(directory: Path, segment: Segment, spans: Sequence[NDArray[np.uint8]]) -> None:
    """Fill the spans from a file; ReplayError if it is missing, truncated or corrupted."""
    path = directory / segment["file"]
    if not path.is_file():
        raise ReplayError(f"{path}: replay file is missing")
    found, expected = path.stat().st_size, sum(span.nbytes for span in spans)
    if found != expected:
        raise ReplayError(f"{path}: replay file has {found} bytes, expected {expected}")
    crc = 0
    with open(path, "rb") as file:
        for span in spans:
            file.readinto(span.data)
            crc = zlib.crc32(span.data, crc)
    if crc != segment["crc32"]:
        raise ReplayError(f"{path}: replay file is corrupted (checksum differs)")


def check_coverage(segments: Sequence[Segment], oldest: int, head: int, capacity: int) -> None:
    """ReplayError unless the segments are well formed, adjoin and cover rows [oldest, head)."""
    for segment in segments:
        if any(not isinstance(segment.get(key), kind) for key, kind in FIELDS.items()):
            raise ReplayError(f"malformed replay segment in the manifest: {segment}")
        if Path(segment["file"]).name != segment["file"] or not 0 <= segment["rows"] <= capacity:
            raise ReplayError(f"malformed replay segment in the manifest: {segment}")
    starts = [s["first"] for s in segments] + [head]
    ends = [s["first"] + s["rows"] for s in segments]
    if not 0 <= starts[0] <= oldest or starts[1:] != ends:
        raise ReplayError(f"the manifest's segments do not cover rows {oldest} to {head}")


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(directory: Path | str, keep_manifests: Iterable[Mapping[str, Any]]) -> list[str]:
    """Delete replay files that none of the manifests needs, and leftovers of killed saves.

    Call it after the newest manifest is safely stored, from the process that saves.

    Returns:
        Names of the deleted files.
    """
    keep: set[str] = set()
    for manifest in keep_manifests:
        files = list(manifest["segments"])
        if manifest["mutable"] is not None:
            files.append(manifest["mutable"])
        keep.update(entry["file"] for entry in files)
    deleted = []
    for pattern in ("replay-*.bin", "replay-*.bin.tmp"):
        for path in sorted(Path(directory).glob(pattern)):
            if path.name not in keep:
                path.unlink()
                deleted.append(path.name)
    return deleted
