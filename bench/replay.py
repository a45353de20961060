"""Replay throughput: batches of 16 x 64 image windows a second, assembled on the host.

    python bench/replay.py [--steps 100000] [--batches 200]

Prints medians with the 10th and 90th percentile, and the same windows by `torch.index_select`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from fastdreamer.replay import Column, Replay
from fastdreamer.staging import Prefetcher

B, T = 16, 64
COLUMNS = {
    "image": Column((64, 64, 3), torch.uint8),
    "action": Column((18,), torch.float32),
    "reward": Column((), torch.float32),
    "is_first": Column((), torch.bool),
    "is_terminal": Column((), torch.bool),
    "is_last": Column((), torch.bool),
}


def measure(name: str, work: Callable[[], object], repeats: int) -> None:
    """Print the time of one call."""
    times = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    low, median, high = np.percentile(times[5:], [10, 50, 90]) * 1e3
    print(f"{name:36} {median:8.3f} ms ({low:.3f} to {high:.3f}) {1e3 / median:10.0f} /s")


def fill(steps: int) -> Replay:
    """A full replay of random rows."""
    replay = Replay(COLUMNS, steps, 1, seed=0, window=T)
    rng = np.random.default_rng(0)
    rows: dict[str, np.ndarray] = {
        "image": rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8),
        "action": rng.standard_normal((1, 18), dtype=np.float32),
        "reward": np.zeros(1, np.float32),
    }
    rows.update({name: np.zeros(1, bool) for name in ("is_first", "is_terminal", "is_last")})
    for step in range(steps):
        rows["image"][0, 0, 0] = step % 256
        replay.add(rows)
    measure("add, one stream", lambda: replay.add(rows), 2000)
    return replay


def index_select(replay: Replay, storage: torch.Tensor, out: torch.Tensor) -> None:
    """The image column alone, by PyTorch."""
    index = replay.draw(B, T)
    slots = (index[:, 1:] + np.arange(T)) % replay.stream_capacity
    rows = index[:, :1] * replay.stream_capacity + slots
    torch.index_select(storage, 0, torch.from_numpy(rows.reshape(-1)), out=out)


def staged(prefetcher: Prefetcher) -> None:
    prefetcher.request()
    prefetcher.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="capacity, filled")
    parser.add_argument("--batches", type=int, default=200, help="repeats of each measurement")
    args = parser.parse_args()
    print(f"{B} x {T} of 64 x 64 x 3, {args.steps} steps, {torch.get_num_threads()} threads")
    replay = fill(args.steps)
    out = replay.allocate(B, T)
    measure("draw and gather", lambda: replay.gather(replay.draw(B, T), T, out), args.batches)
    storage = torch.ones(args.steps, 64 * 64 * 3, dtype=torch.uint8)
    flat = out["image"].view(B * T, -1)
    measure("index_select, images only", lambda: index_select(replay, storage, flat), args.batches)
    with Prefetcher(replay, B, T) as prefetcher:
        measure("request and get, threaded", lambda: staged(prefetcher), args.batches)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        manifest = replay.save(folder)
        saved = time.perf_counter()
        Replay(COLUMNS, args.steps, 1, seed=0).load(folder, manifest)
        print(f"save {saved - start:.2f} s, load {time.perf_counter() - saved:.2f} s, all rows")


if __name__ == "__main__":
    main()
