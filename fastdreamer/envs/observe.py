"""From any environment's observations to the two kinds that Dreamer reads: images and vectors.

| space                                     | becomes                                          |
|-------------------------------------------|--------------------------------------------------|
| Box uint8, (H, W, C) or (C, H, W)         | image, resized as Pillow's BILINEAR does         |
| Box uint8 or float in 0..1, (H, W)        | image of one channel scaled to 0..255: a board   |
|                                           | by nearest neighbour, a larger one as above      |
| Box of any number, () or (D,)             | vector float32 (D,)                              |
| Box of any other floats, (N, D)           | vector float32 (N * D,)                          |
| Discrete                                  | vector float32 (n,), one-hot                     |
| Dict                                      | its entries, nested names joined by "/"          |

C is 1, 3 or 4; (C, H, W) is read where the first length is one of these and the last is not.
An observation that is no Dict is named "image" or "vector".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from fastdreamer.envs.base import TaskError
from fastdreamer.envs.resize import enlarge_nearest, resize_images, resize_planes

RESERVED = ("action", "reward", "is_first", "is_last", "is_terminal")
_CHANNELS = (1, 3, 4)
_SUPPORTED = (
    "supported are Box uint8 (H, W, C) or (C, H, W) with 1, 3 or 4 channels, Box (H, W) of uint8"
    " or of floats, Box (D,) or (), Discrete, and Dict of these"
)
_Convert = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One entry of an observation space, and how a batch of it is converted."""

    path: tuple[str, ...]
    space: Space[Any]
    convert: _Convert

    @property
    def name(self) -> str:
        return "/".join(self.path) or "observation"

    def read(self, obs: Any) -> np.ndarray:
        """This entry of one observation, as an array.

        Raises:
          TaskError: it is missing, or its shape, kind of number or value does not fit its space.
        """
        value = _array(_get(obs, self.path), self.name)
        if value.shape != self.space.shape:
            raise TaskError(f"'{self.name}' has shape {value.shape}, but its space says {self._is}")
        if value.dtype.kind not in "biuf":
            raise TaskError(f"'{self.name}' is {value.dtype}, but its space says {self._is}")
        if value.dtype != np.uint8 and self._is_bytes:
            raise TaskError(f"'{self.name}' is {value.dtype}, but its space says {self._is}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise TaskError(f"'{self.name}' holds {_odd(value)}")
        if isinstance(self.space, spaces.Discrete) and not self.space.contains(value[()]):
            raise TaskError(f"'{self.name}' is {value[()]}, but its space says {self._is}")
        return value

    @property
    def _is(self) -> str:
        return describe(self.space)

    @property
    def _is_bytes(self) -> bool:
        return self.space.dtype == np.uint8 and len(self.space.shape or ()) > 1


class Observer:
    """Converts batched observations of one space.

    Attributes:
      space: Dict of Box, sorted by name: images uint8 (size, size, C), vectors float32 (D,).

    Raises:
      TaskError: an entry's space is not supported, or its name is reserved or used twice.
    """

    def __init__(self, space: Space[Any], image_size: int) -> None:
        self._leaves: dict[str, _Leaf] = {}
        found: dict[str, spaces.Box] = {}
        for path, leaf in _leaves(space, ()):
            box, convert = _converter("/".join(path) or "observation", leaf, image_size)
            name = "/".join(path) or ("image" if box.dtype == np.uint8 else "vector")
            if name in RESERVED or name in found:
                reason = "reserved" if name in RESERVED else "used twice"
                raise TaskError(f"the observation name '{name}' is {reason}")
            found[name] = box
            self._leaves[name] = _Leaf(path, leaf, convert)
        self.space = spaces.Dict({name: found[name] for name in sorted(found)})

    def __call__(self, obs: Any) -> dict[str, np.ndarray]:
        """Converts a batch: an array (N, ...), or nested dicts of them for a Dict space.

        Returns:
          Fresh arrays (N, *shape) by the names of `space`, in its order.
        """
        return {name: self._convert(name, obs) for name in self.space.spaces}

    def stacked(self, rows: list[Any]) -> dict[str, np.ndarray]:
        """The same for a list of N single observations, each checked against the space.

        Raises:
          TaskError: an entry is missing, not finite, or does not fit its space; names the entry.
        """
        return {name: self._stack(self._leaves[name], rows) for name in self.space.spaces}

    def read(self, obs: Any) -> Iterator[tuple[str, Space[Any], np.ndarray]]:
        """Entries of one observation before conversion: (name for messages, its space, value).

        Raises:
          TaskError: as `stacked`.
        """
        for leaf in self._leaves.values():
            yield leaf.name, leaf.space, leaf.read(obs)

    @property
    def given(self) -> dict[str, str]:
        """The environment's own space of each entry in words, by the names of `space`."""
        return {name: describe(leaf.space) for name, leaf in self._leaves.items()}

    def _stack(self, leaf: _Leaf, rows: list[Any]) -> np.ndarray:
        return leaf.convert(np.stack([leaf.read(row) for row in rows]))

    def _convert(self, name: str, obs: Any) -> np.ndarray:
        leaf = self._leaves[name]
        return leaf.convert(np.asarray(_get(obs, leaf.path)))


def _leaves(
    space: Space[Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Space[Any]]]:
    if not isinstance(space, spaces.Dict):
        yield path, space
        return
    for key, sub in space.spaces.items():
        yield from _leaves(sub, (*path, key))


def _get(obs: Any, path: tuple[str, ...]) -> Any:
    for depth, key in enumerate(path):
        try:
            obs = obs[key]
        except (KeyError, IndexError, TypeError):
            where = f"'{'/'.join(path[:depth])}'" if depth else "the observation"
            has = sorted(map(str, obs)) if isinstance(obs, dict) else type(obs).__name__
            raise TaskError(f"{where} has no entry '{key}'; it is {has}") from None
    return obs


def _array(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise TaskError(f"'{name}' is no array: {' '.join(str(error).split())}") from None


def _odd(value: np.ndarray) -> str:
    return "NaN" if np.isnan(value).any() else "an infinite number"


def _converter(name: str, space: Space[Any], size: int) -> tuple[spaces.Box, _Convert]:
    if isinstance(space, spaces.Discrete):
        return _vector_box(int(space.n)), _one_hot(int(space.n), int(space.start))
    if isinstance(space, spaces.Box):
        if len(space.shape) <= 1:
            return _vector_box(int(np.prod(space.shape))), _vector
        if len(space.shape) == 2 and _is_plane(space):
            return _image_box(size, 1), _plane(space, size)
        if len(space.shape) == 2 and np.issubdtype(space.dtype, np.floating):
            return _vector_box(int(np.prod(space.shape))), _vector
        if len(space.shape) == 3 and space.dtype == np.uint8:
            if space.shape[-1] in _CHANNELS:
                return _image_box(size, space.shape[-1]), lambda x: resize_images(x, size, size)
            if space.shape[0] in _CHANNELS:
                return _image_box(size, space.shape[0]), _channels_first(size)
    raise TaskError(f"the space of '{name}' is not supported: {describe(space)}; {_SUPPORTED}")


def describe(space: Space[Any]) -> str:
    """A space in one short line, a Box by its outermost bounds."""
    if isinstance(space, spaces.Box):
        low, high = (space.low.min(), space.high.max()) if space.low.size else (0, 0)
        return f"Box({low}, {high}, {space.shape}, {space.dtype})"
    return " ".join(str(space).split())


def _vector_box(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _image_box(size: int, channels: int) -> spaces.Box:
    return spaces.Box(0, 255, (size, size, channels), np.uint8)


def _vector(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float32)


def _one_hot(count: int, start: int) -> _Convert:
    return lambda x: (np.arange(start, start + count) == x.reshape(-1, 1)).astype(np.float32)


def _channels_first(size: int) -> _Convert:
    return lambda x: resize_images(np.moveaxis(x, 1, -1), size, size)


def _is_plane(space: spaces.Box) -> bool:
    if space.dtype == np.uint8:
        return True
    bounded = space.low.min(initial=1) >= 0 and space.high.max(initial=0) <= 1
    return bool(np.issubdtype(space.dtype, np.floating) and bounded)


def _plane(space: spaces.Box, size: int) -> _Convert:
    scale = 255.0 / max(float(space.high.max()), 1e-8)
    resize = enlarge_nearest if max(space.shape) <= size else resize_planes

    def convert(x: np.ndarray) -> np.ndarray:
        grey = x if scale == 1.0 else np.rint(np.clip(x * scale, 0, 255)).astype(np.uint8)
        return resize(grey, size, size)[..., None]

    return convert
