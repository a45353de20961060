"""Moving pictures: observations made visible, and files of them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastdreamer.errors import UsageError, UserError

FORMATS = (".mp4", ".gif")


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Make the folder of an output file and refuse what cannot be written; None is fine.

    Raises:
        UsageError: another suffix than ``suffixes``, or the folder cannot be made.
    """
    if path is None:
        return
    if path.suffix not in suffixes:
        raise UsageError(f"{option} {path}: the file's name must end in {' or '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Where an output file is written; a part of it does not stay.

    Raises:
        UserError: the disk refuses.
    """
    try:
        yield path
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Images (..., H, W, C) uint8 -> (..., H, W, 3); of 1 or 4 channels the last one as grey."""
    return image if image.shape[-1] == 3 else np.repeat(image[..., -1:], 3, -1)


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Images (..., H, W, C) -> (..., scale H, scale W, C) by nearest neighbour."""
    return image.repeat(scale, -3).repeat(scale, -2)


def gif_bytes(frames: Sequence[np.ndarray] | np.ndarray, fps: float) -> bytes:
    """Frames (H, W, 3) uint8 as the bytes of an endless .gif."""
    file = io.BytesIO()
    _write_gif(file, iter(frames), frames[:: -(-len(frames) // 32)], 10 * round(100 / fps))
    return file.getvalue()


def write_video(
    path: Path, frames: Sequence[np.ndarray] | np.ndarray, fps: float, scale: int = 1
) -> None:
    """Write frames (H, W, 3) uint8, of one size, as .mp4 (H.264) or as an endless .gif.

    Frames are enlarged ``scale`` times and padded with black to even sizes, which H.264 requires.
    A frame of a .gif lasts whole hundredths of a second.
    """
    bottom, right = (scale * n % 2 for n in frames[0].shape[:2])
    shown = (np.pad(enlarge(f, scale), ((0, bottom), (0, right), (0, 0))) for f in frames)
    if path.suffix == ".gif":
        _write_gif(path, shown, frames[:: -(-len(frames) // 32)], 10 * round(100 / fps))
        return
    import imageio.v3 as iio

    encoded = io.BytesIO()  # a file that imageio cannot close on a full disk costs a traceback
    with iio.imopen(encoded, "w", plugin="pyav", extension=".mp4") as file:
        file.init_video_stream("libx264", fps=fps)
        for frame in shown:
            file.write_frame(frame)
    path.write_bytes(encoded.getvalue())


def _write_gif(
    file: Path | BinaryIO,
    frames: Iterable[np.ndarray],
    sample: Iterable[np.ndarray],
    milliseconds: int,
) -> None:
    """One palette, from ``sample``, serves all frames: no flicker, and a smaller file.

    An octree keeps the colours of small sprites, which a median cut gives up for shades of walls.
    """
    from PIL import Image

    palette = Image.fromarray(np.concatenate(list(sample))).quantize(256, Image.Quantize.FASTOCTREE)
    images = (
        Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames
    )
    first = next(images)
    first.save(
        file, format="GIF", save_all=True, append_images=images, duration=milliseconds, loop=0
    )
