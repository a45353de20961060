"""The replay against plain Python lists, its files, and its staging thread."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fastdreamer.replay import Column, Replay, ReplayError, prune
from fastdreamer.staging import Prefetcher

COLUMNS = {
    "image": Column((2, 3, 3), torch.uint8),
    "reward": Column((), torch.float32),
    "action": Column((4,), torch.float32),
    "is_first": Column((), torch.bool),
    "stoch": Column((3,), torch.bfloat16, mutable=True),
    "deter": Column((2,), torch.float32, mutable=True),
}
Rows = dict[str, torch.Tensor]


def make_rows(time: int, streams: int, columns: dict[str, Column] = COLUMNS) -> Rows:
    """Rows whose content is a function of time and stream."""
    rng = np.random.default_rng(time)
    return {
        name: torch.from_numpy(rng.integers(0, 200, (streams, *c.shape))).to(c.dtype)
        for name, c in columns.items()
    }


def filled(steps: int, capacity: int = 40, streams: int = 2, seed: int = 0) -> Replay:
    replay = Replay(COLUMNS, capacity, streams, seed)
    for step in range(steps):
        replay.add(make_rows(step, streams))
    return replay


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


class AgainstLists(RuleBasedStateMachine):
    """One replay is saved and loaded now and then, its twin never is; lists are the truth."""

    @initialize(streams=st.integers(1, 3), capacity=st.integers(1, 12), spare=st.integers(0, 2))
    def start(self, streams: int, capacity: int, spare: int) -> None:
        self.streams, self.capacity = streams, capacity
        self.total = streams * capacity + min(spare, streams - 1)
        self.replay = Replay(COLUMNS, self.total, streams, seed=3)
        self.twin = Replay(COLUMNS, self.total, streams, seed=3)
        self.history: list[list[Rows]] = [[] for _ in range(streams)]
        self.manifests: list[dict[str, Any]] = []
        self.folder = TemporaryDirectory()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @property
    def head(self) -> int:
        return len(self.history[0])

    @property
    def oldest(self) -> int:
        return max(0, self.head - self.capacity)

    @rule(count=st.integers(1, 9), as_numpy=st.booleans())
    def add(self, count: int, as_numpy: bool) -> None:
        for _ in range(count):
            rows: dict[str, Any] = make_rows(self.head, self.streams)
            for stream in range(self.streams):
                self.history[stream].append({n: v[stream].clone() for n, v in rows.items()})
            if as_numpy:
                rows = {n: v.numpy() if n != "stoch" else v for n, v in rows.items()}
            ids = self.replay.add(rows)
            assert np.array_equal(ids, self.twin.add(rows))
            assert ids.tolist() == [(self.head - 1) * self.streams + s for s in range(self.streams)]
        assert len(self.replay) == (self.head - self.oldest) * self.streams

    @rule(batch=st.integers(0, 5), length=st.integers(1, 12), reuse=st.booleans())
    def sample(self, batch: int, length: int, reuse: bool) -> None:
        if length > self.capacity:
            with pytest.raises(ValueError, match="does not fit"):
                self.replay.can_sample(length)
            return
        assert self.replay.can_sample(length) == (self.head >= length)
        if self.head < length:
            with pytest.raises(ValueError, match="no window"):
                self.replay.draw(batch, length)
            return
        index = self.replay.draw(batch, length)
        out = self.replay.allocate(batch, length) if reuse else None
        got = self.replay.gather(index, length, out)
        assert_equal(got, self.twin.sample(batch, length))
        for i, (stream, first) in enumerate(index.tolist()):
            assert self.oldest <= first <= self.head - length
            window = self.history[stream][first : first + length]
            for name in COLUMNS:
                assert torch.equal(got[name][i], torch.stack([row[name] for row in window]))
            ids = [(first + t) * self.streams + stream for t in range(length)]
            assert got["step_id"][i].tolist() == ids

    @precondition(lambda self: self.head > 0)
    @rule(data=st.data(), name=st.sampled_from(["stoch", "deter"]))
    def write(self, data: st.DataObject, name: str) -> None:
        steps = self.head * self.streams
        ids = data.draw(st.lists(st.integers(max(0, steps - 40), steps - 1), max_size=6))
        step_ids = torch.tensor(ids, dtype=torch.int64).reshape(1, -1)
        values = torch.randn(1, len(ids), *COLUMNS[name].shape).to(COLUMNS[name].dtype)
        self.replay.write(name, step_ids, values)
        self.twin.write(name, step_ids, values)
        for step_id, value in zip(ids, values[0], strict=True):
            self.history[step_id % self.streams][step_id // self.streams][name] = value

    @rule(clean=st.booleans())
    def save(self, clean: bool) -> None:
        manifest = json.loads(json.dumps(self.replay.save(self.folder.name)))
        self.manifests = [manifest] if clean else [*self.manifests, manifest]
        prune(self.folder.name, self.manifests)

    @rule()
    def save_and_resume(self) -> None:
        self.save(clean=False)
        self.replay = Replay(COLUMNS, self.total, self.streams, seed=99)
        self.replay.load(self.folder.name, self.manifests[-1])

    @precondition(lambda self: self.manifests)
    @rule(data=st.data())
    def older_manifests_still_load(self, data: st.DataObject) -> None:
        manifest = data.draw(st.sampled_from(self.manifests))
        other = Replay(COLUMNS, self.total, self.streams, seed=99)
        other.load(self.folder.name, manifest)
        assert other.steps == manifest["head"] * self.streams


AgainstLists.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestAgainstLists = AgainstLists.TestCase


@pytest.mark.parametrize("steps", [8, 20, 21, 39, 40, 47])
def test_every_window_is_exact(steps: int) -> None:
    """All windows of all streams, in every phase of the wrap-around."""
    replay = filled(steps)
    for first in range(max(0, steps - 20), steps - 8 + 1):
        index = np.array([[0, first], [1, first]])
        batch = replay.gather(index, 8)
        expected = [make_rows(t, 2) for t in range(first, first + 8)]
        for name in COLUMNS:
            assert torch.equal(batch[name], torch.stack([row[name] for row in expected], 1))


@pytest.mark.parametrize("steps", [10, 37])
def test_nothing_outside_the_ring_is_gathered(steps: int) -> None:
    replay = filled(steps)
    oldest = max(0, steps - 20)
    for index in ([0, steps - 7], [0, oldest - 1], [2, oldest], [-1, oldest]):
        with pytest.raises(ValueError, match="does not hold the window"):
            replay.gather(np.array([index]), 8)


def test_starts_are_uniform() -> None:
    replay = filled(steps=55)  # wrapped: 20 rows in each stream, 13 starts of 8
    draws = replay.draw(26_000, 8)
    keys, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(keys) == 26
    assert draws[:, 1].min() == 35
    assert draws[:, 1].max() == 47
    chi2 = ((counts - 1000.0) ** 2 / 1000).sum()
    assert 11 < chi2 < 47  # 25 degrees of freedom: within 0.5 % and 99.5 %


def test_draws_depend_on_the_seed_and_order_alone() -> None:
    a, b, c = filled(30), filled(30), filled(30, seed=1)
    first = a.draw(4, 8)
    a.gather(first, 8)
    assert np.array_equal(first, b.draw(4, 8))
    assert np.array_equal(a.draw(4, 8), b.draw(4, 8))
    assert not np.array_equal(a.draw(4, 8), c.draw(4, 8))


def test_write_back_skips_dropped_rows_and_keeps_the_last_of_two() -> None:
    replay = filled(25)  # times 5 to 24 are stored
    ids = torch.tensor([[2 * 4, 2 * 24, 2 * 24]])
    before = replay.gather(np.array([[0, 5]]), 20)
    replay.write("deter", ids, torch.tensor([[[1.0, 1], [2, 2], [3, 3]]]))
    after = replay.gather(np.array([[0, 5]]), 20)
    assert after["deter"][0, 19].tolist() == [3, 3]
    assert torch.equal(after["deter"][0, :19], before["deter"][0, :19])


def test_errors_name_the_column_and_what_it_expects() -> None:
    replay, rows = filled(3), make_rows(3, 2)
    with pytest.raises(ValueError, match=r"'reward' expects torch\.float32 \(2,\), got float64"):
        replay.add(rows | {"reward": np.zeros(2)})
    with pytest.raises(ValueError, match=r"'image' expects .*\(2, 2, 3, 3\), got .*\(1, 2, 3, 3\)"):
        replay.add(rows | {"image": rows["image"][:1]})
    with pytest.raises(ValueError, match=r"'stoch' expects torch\.bfloat16"):
        replay.add(rows | {"stoch": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="add expects columns"):
        replay.add({"image": rows["image"]})
    with pytest.raises(ValueError, match="add expects columns"):
        replay.add(rows | {"extra": rows["image"]})
    assert replay.steps == 6
    with pytest.raises(ValueError, match="'reward' is not mutable"):
        replay.write("reward", np.array([0]), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"step ids must be in \[0, 6\)"):
        replay.write("deter", np.array([6]), np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="must be int64"):
        replay.write("deter", np.array([0.5]), np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="'deter' expects"):
        replay.write("deter", np.array([[0]]), np.zeros((1, 2), np.float32))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Replay(COLUMNS, 100, 2, 0, window=64)
    with pytest.raises(ValueError, match="does not fit"):
        Replay(COLUMNS, 1, 2, 0)
    with pytest.raises(ValueError, match="num_streams"):
        Replay(COLUMNS, 1, 0, 0)
    with pytest.raises(ValueError, match="step_id"):
        Replay({"step_id": Column((), torch.int64)}, 10, 1, 0)
    with pytest.raises(ValueError, match="'x' expects positive sizes"):
        Replay({"x": Column((0,), torch.float32)}, 10, 1, 0)
    replay = filled(20)
    batch = replay.allocate(2, 4)
    with pytest.raises(ValueError, match="'deter' must be"):
        replay.gather(replay.draw(2, 4), 4, batch | {"deter": torch.zeros(2, 4, 3)})
    with pytest.raises(ValueError, match="a batch holds"):
        replay.gather(replay.draw(2, 4), 4, {})
    with pytest.raises(ValueError, match="index must be int64"):
        replay.gather(np.zeros((2, 3), np.int64), 4)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_storage_is_not_touched_before_use() -> None:
    before = resident_bytes()
    image = {"image": Column((64, 64, 3), torch.uint8)}
    replay = Replay(image, 100_000, 1, 0)  # 1.2 GB
    replay.add({"image": np.zeros((1, 64, 64, 3), np.uint8)})
    assert resident_bytes() - before < 50e6


# Files


def save(replay: Replay, folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(replay.save(folder)))


def test_saves_are_incremental_and_drop_old_segments(tmp_path: Path) -> None:
    replay = filled(0)
    manifests = []
    for step in range(60):
        replay.add(make_rows(step, 2))
        if step % 10 == 9:
            manifests.append(save(replay, tmp_path))
    assert [(s["first"], s["rows"]) for s in manifests[1]["segments"]] == [(0, 10), (10, 10)]
    assert [(s["first"], s["rows"]) for s in manifests[-1]["segments"]] == [(40, 10), (50, 10)]
    again = save(replay, tmp_path)
    assert again["segments"] == manifests[-1]["segments"]
    (tmp_path / "replay-left-by-a-crash.bin.tmp").touch()
    deleted = prune(tmp_path, [manifests[-1], again])
    assert len(deleted) == 4 + 5 + 1
    kept = {s["file"] for s in again["segments"]}
    kept |= {m["mutable"]["file"] for m in (manifests[-1], again)}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_two_branches_from_one_checkpoint_share_a_folder(tmp_path: Path) -> None:
    trunk = filled(10)
    root = save(trunk, tmp_path)
    trunk.add(make_rows(10, 2))
    first = save(trunk, tmp_path)
    branch = filled(0)
    branch.load(tmp_path, root)
    branch.add(make_rows(999, 2))
    second = save(branch, tmp_path)
    for manifest, last in ((first, 10), (second, 999)):
        replay = filled(0)
        replay.load(tmp_path, manifest)
        assert torch.equal(
            replay.gather(np.array([[1, 10]]), 1)["image"][0, 0], make_rows(last, 2)["image"][1]
        )


def test_a_new_folder_gets_everything(tmp_path: Path) -> None:
    replay = filled(30)
    save(replay, tmp_path / "a")
    manifest = save(replay, tmp_path / "b")
    other = filled(0)
    other.load(tmp_path / "b", manifest)
    assert_equal(other.sample(4, 20), replay.sample(4, 20))


def test_files_deleted_behind_our_back_are_written_again(tmp_path: Path) -> None:
    replay = filled(30)
    first = save(replay, tmp_path)
    (tmp_path / first["segments"][0]["file"]).unlink()
    replay.add(make_rows(30, 2))
    other = filled(0)
    other.load(tmp_path, save(replay, tmp_path))
    assert_equal(other.sample(4, 20), replay.sample(4, 20))


@pytest.mark.parametrize("part", ["segments", "mutable"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "extended", "flipped"])
def test_damaged_files_are_named(tmp_path: Path, part: str, damage: str) -> None:
    manifest = save(filled(30), tmp_path)
    entry = manifest["mutable"] if part == "mutable" else manifest["segments"][0]
    path = tmp_path / entry["file"]
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        cut = {"truncated": content[:-1], "extended": content + b"x", "flipped": content}
        path.write_bytes(cut[damage])
    replay = filled(25)
    with pytest.raises(ReplayError, match=entry["file"]) as error:
        replay.load(tmp_path, manifest)
    assert "\n" not in str(error.value)
    assert len(replay) == 0


def test_manifests_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    manifest = save(filled(30), tmp_path)
    segment = manifest["segments"][0]
    bad = [
        {k: v for k, v in manifest.items() if k != "head"},
        manifest | {"num_streams": 3},
        manifest | {"head": 31},
        manifest | {"segments": []},
        manifest | {"segments": [segment | {"file": "../x"}]},
        manifest | {"segments": [segment | {"crc32": None}]},
        manifest | {"mutable": None},
    ]
    replay = filled(25)
    for broken in bad:
        with pytest.raises(ReplayError):
            replay.load(tmp_path, broken)
        assert len(replay) == 40


def test_online_windows_come_once_and_first(tmp_path: Path) -> None:
    replay = Replay(COLUMNS, 40, 2, 0, window=5, online=True)
    for t in range(14):
        replay.add(make_rows(t, 2))
    first = replay.draw(3, 5).tolist()
    assert first == [[0, 0], [1, 0], [0, 5]]
    other = Replay(COLUMNS, 40, 2, 1, window=5, online=True)
    other.load(tmp_path, save(replay, tmp_path))
    second = replay.draw(4, 5)
    assert second[0].tolist() == [1, 5]
    assert (other.draw(4, 5) == second).all()
    assert (replay.draw(50, 5)[:, 1] > 5).any()  # uniform from here on
    for t in range(14, 45):  # served late: what left the ring is passed over
        replay.add(make_rows(t, 2))
    assert replay.draw(2, 5).tolist() == [[0, 25], [1, 25]]


@pytest.mark.parametrize("capacity", [10, 40, 90])
def test_another_capacity_takes_the_newest_rows(tmp_path: Path, capacity: int) -> None:
    """Saved with 20 rows in each stream; then both replays go on, and are saved again."""
    replay = filled(30)
    other = Replay(COLUMNS, capacity, 2, 0)
    other.load(tmp_path, save(replay, tmp_path))
    for _ in range(3):
        kept = min(len(replay), len(other)) // 2
        assert kept == min(20, capacity // 2)
        times = np.arange(replay.steps // 2 - kept, replay.steps // 2 - 4)
        index = np.stack([np.arange(len(times)) % 2, times], 1)
        assert_equal(other.gather(index, 5), replay.gather(index, 5))
        for _ in range(7):
            for each in (replay, other):
                each.add(make_rows(each.steps // 2, 2))
        again = Replay(COLUMNS, capacity, 2, 0)
        again.load(tmp_path, save(other, tmp_path))
        assert len(again) == len(other)
        other = again


def test_a_crash_during_save_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = filled(30)
    manifest = save(replay, tmp_path)
    replay.add(make_rows(30, 2))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            replay.save(tmp_path)
    other = filled(0)
    other.load(tmp_path, manifest)
    assert other.steps == 60
    other.load(tmp_path, save(replay, tmp_path))  # and the next save is whole again
    assert_equal(other.sample(3, 20), replay.sample(3, 20))


# Staging


def train(threaded: bool, depth: int, folder: Path | None = None) -> list[dict[str, torch.Tensor]]:
    """A trainer's order of calls on a small ring; with a folder it is killed and resumed."""
    replay = Replay(COLUMNS, 36, 3, seed=5)
    prefetcher = Prefetcher(replay, 4, 8, threaded=threaded, depth=depth)
    batches: list[dict[str, torch.Tensor]] = []
    for step in range(150):
        replay.add(make_rows(step, 3))
        if not replay.can_sample(8):
            continue
        if prefetcher.pending == depth or (prefetcher.pending and step % 7 == 0):
            batch = prefetcher.get()
            batches.append({n: v.clone() for n, v in batch.items()})
            replay.write("deter", batch["step_id"], batch["deter"] * 0.5 + 1)
        prefetcher.request()
        if folder is not None and step % 40 == 39:
            manifest, state = replay.save(folder), prefetcher.state_dict()
            prefetcher.close()
            replay = Replay(COLUMNS, 36, 3, seed=0)
            replay.load(folder, manifest)
            prefetcher = Prefetcher(replay, 4, 8, threaded=threaded, depth=depth)
            prefetcher.load_state_dict(state)
    prefetcher.close()
    return batches


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_threaded_equals_synchronous(depth: int, tmp_path: Path) -> None:
    expected = train(threaded=False, depth=depth)
    assert len(expected) > 100
    for threaded, folder in ((True, None), (False, tmp_path / "a"), (True, tmp_path / "b")):
        got = train(threaded, depth, folder)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b)


def test_add_and_write_wait_for_a_slow_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is full of the window, so that the next add would destroy it."""
    replay = Replay(COLUMNS, 8, 1, seed=0)
    for step in range(8):
        replay.add(make_rows(step, 1))
    expected = replay.gather(np.array([[0, 0]]), 8)
    gather = replay.gather
    done = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        result = gather(*args, **kwargs)
        done.set()
        return result

    monkeypatch.setattr(replay, "gather", slow)
    with Prefetcher(replay, 1, 8) as prefetcher:
        for change in (
            lambda: replay.write("deter", np.array([0]), np.zeros((1, 2), np.float32)),
            lambda: replay.add(make_rows(8, 1)),
        ):
            done.clear()
            prefetcher.request()
            change()
            assert done.is_set()
            assert_equal(prefetcher.get(), expected)
            expected["deter"][0, 0] = 0


def test_add_does_not_wait_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = filled(10)
    gather, go = replay.gather, threading.Event()

    def blocked(*args: Any, **kwargs: Any) -> Any:
        assert go.wait(30)
        return gather(*args, **kwargs)

    monkeypatch.setattr(replay, "gather", blocked)
    with Prefetcher(replay, 2, 8) as prefetcher:
        prefetcher.request()
        replay.add(make_rows(10, 2))
        assert not go.is_set()
        go.set()
        assert prefetcher.get()["reward"].shape == (2, 8)


def test_a_batch_stays_until_the_next_get() -> None:
    replay = filled(20)
    with Prefetcher(replay, 2, 8) as prefetcher:
        prefetcher.request()
        batch = prefetcher.get()
        copy = {n: v.clone() for n, v in batch.items()}
        prefetcher.request()
        prefetcher.wait()
        assert_equal(batch, copy)


def test_misuse_of_the_prefetcher() -> None:
    replay = filled(5)
    prefetcher = Prefetcher(replay, 2, 8)
    with pytest.raises(ValueError, match="no window"):
        prefetcher.request()
    with pytest.raises(RuntimeError, match="needs a request"):
        prefetcher.get()
    for step in range(5, 30):
        replay.add(make_rows(step, 2))
    prefetcher.request()
    with pytest.raises(RuntimeError, match="call get"):
        prefetcher.request()
    state = prefetcher.state_dict()
    with pytest.raises(ValueError, match="do not fit depth"):
        prefetcher.load_state_dict({"pending": state["pending"] * 2})
    with pytest.raises(ValueError, match="must be"):
        Prefetcher(replay, 3, 8).load_state_dict(state)
    prefetcher.close()
    assert prefetcher.get()["step_id"].shape == (2, 8)
    with pytest.raises(RuntimeError, match="after close"):
        prefetcher.request()
    with pytest.raises(ValueError, match="depth"):
        Prefetcher(replay, 2, 8, depth=0)


def test_errors_of_the_thread_reach_get(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = filled(20)
    monkeypatch.setattr(replay, "gather", lambda *_, **__: 1 / 0)
    with Prefetcher(replay, 2, 8) as prefetcher:
        prefetcher.request()
        with pytest.raises(ZeroDivisionError):
            prefetcher.get()
        for step in range(20, 60):
            replay.add(make_rows(step, 2))  # nothing stays reserved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("threaded", [False, True])
def test_batches_on_a_gpu(threaded: bool) -> None:
    replay, twin = filled(20), filled(20)
    pinned = Replay(COLUMNS, 40, 2, 0, pin_memory=True)
    assert pinned.allocate(1, 1, pin_memory=True)["image"].is_pinned()
    with Prefetcher(replay, 16, 8, "cuda", threaded=threaded) as prefetcher:
        for step in range(20, 80):
            prefetcher.request()
            expected = twin.sample(16, 8)
            got = prefetcher.get()
            assert got["image"].is_cuda
            assert not got["step_id"].is_cuda
            assert_equal({n: v.cpu() for n, v in got.items()}, expected)
            for each in (replay, twin):
                each.add(make_rows(step, 2))
