"""``python -m bench.gpu``: what it runs, in which order, what it skips, where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_items, results
from fastdreamer.cli import parse
from fastdreamer.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def options(*args: str) -> gpu.Options:
    return parse(gpu.Options, args, "bench.gpu", gpu.Options())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that takes the results instead of bench/results/gpu."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "GPU_RESULTS", tmp_path / "gpu")
    for module in (gpu, results):
        monkeypatch.setattr(module, "device_name", lambda _: "a GPU")
        monkeypatch.setattr(module, "commit", lambda: "abc")
    return tmp_path / "gpu"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the items that were run; "bad" fails, "broken" has no result."""
    ran = []

    def in_child(item: gpu.Item, seconds: float, _: gpu.Options):
        ran.append(item.name)
        if item.name == "broken":
            return [], "failed: no such device"
        return [{"ok": item.name != "bad", "seconds": seconds}], ""

    monkeypatch.setattr(gpu, "in_child", in_child)
    return ran


def fake(*names: str) -> list[gpu.Item]:
    return [gpu.Item(name, "tests", 5.0, lambda _: []) for name in names]


class TestOptions:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--limit", "0"], "--limit must be above 0"),
            (["--minutes", "-1"], "--minutes at least 0"),
            (["--items", "updates"], "unknown 'updates', valid are tests triton, "),
            (["--dry", "yes"], "did you mean --dry-run"),
        ],
    )
    def test_refused(self, args, message):
        with pytest.raises(UsageError, match=message):
            gpu.choose(options(*args))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self):
        command = [sys.executable, "-m", "bench.gpu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

    def test_chosen_items_keep_their_order(self):
        names = "memory errors, tests triton"
        chosen = gpu.choose(options("--items", names, "--dry-run"))
        assert [item.name for item in chosen] == ["tests triton", "memory errors"]
        everything = [item.name for item in gpu.items(options())]
        assert len(set(everything)) == len(everything)
        assert {item.needs for item in gpu.items(options())} <= {"", *everything}

    def test_training_only_when_time_is_given(self):
        assert not any("train" in item.name for item in gpu.items(options()))
        assert gpu.items(options("--minutes", "5"))[-1].name == "train"


class TestOrder:
    def test_results_are_recorded_and_not_repeated(self, recorded, children):
        assert gpu.in_order(fake("a", "b"), options()) == []
        rows = [json.loads(line) for line in (recorded / "tests.jsonl").read_text().splitlines()]
        assert [row["item"] for row in rows] == ["a", "b"]
        assert rows[0]["seconds"] == 5.0 and rows[0]["commit"] == "abc"
        assert gpu.in_order(fake("a", "b", "c"), options()) == []
        assert children == ["a", "b", "c"]
        gpu.in_order(fake("a"), options("--again"))
        assert children[3:] == ["a"]

    def test_another_commit_or_device_is_run_again(self, recorded, children, monkeypatch):
        gpu.in_order(fake("a"), options())
        monkeypatch.setattr(gpu, "commit", lambda: "def")
        gpu.in_order(fake("a"), options())
        monkeypatch.setattr(gpu, "device_name", lambda _: "another GPU")
        gpu.in_order(fake("a"), options())
        assert children == ["a"] * 3

    def test_failures_do_not_stop_the_others(self, recorded, children, capsys):
        assert gpu.in_order(fake("bad", "broken", "a"), options()) == ["bad", "broken"]
        assert children == ["bad", "broken", "a"]
        assert "broken: ok False, error failed: no such device" in capsys.readouterr().out

    def test_what_failed_is_run_again(self, recorded, children):
        gpu.in_order(fake("bad", "broken", "a"), options())
        gpu.in_order(fake("bad", "broken", "a"), options())
        assert children == ["bad", "broken", "a", "bad", "broken"]

    def test_an_item_of_which_a_part_failed_is_run_again(self, recorded, children, monkeypatch):
        rows = [{"ok": True}, {"ok": False}]
        monkeypatch.setattr(gpu, "in_child", lambda *_: (rows, ""))
        assert gpu.in_order(fake("a"), options()) == ["a"]
        assert gpu.finished() == set()

    def test_what_an_item_needs_comes_first(self, recorded, children, capsys):
        timed = [
            replace(item, needs=n) for item, n in zip(fake("a", "b"), ("bad", "c"), strict=True)
        ]
        assert gpu.in_order([*fake("bad", "c"), *timed], options()) == ["bad"]
        assert children == ["bad", "c", "b"]
        assert "a: skipped, bad has not passed" in capsys.readouterr().out

    def test_no_time_is_left(self, recorded, children, monkeypatch, capsys):
        monkeypatch.setattr(gpu, "LEAST", 1e9)
        assert gpu.in_order(fake("a"), options()) == []
        assert children == [] and "a: skipped, no time is left" in capsys.readouterr().out

    def test_a_dry_run_records_nothing(self, recorded, children):
        gpu.in_order(fake("a"), options("--dry-run"))
        assert children == ["a"] and not recorded.exists()


class TestChild:
    def test_rows_come_back(self):
        (item,) = (x for x in gpu.items(options("--dry-run")) if x.name == "memory errors")
        rows, problem = gpu.in_child(item, 60, options("--dry-run"))
        assert rows == [{"ok": True, "skipped": "compute-sanitizer is not there"}]
        assert problem == ""

    def test_time_limit(self, monkeypatch, tmp_path):
        """It also ends the processes that the item has started, and keeps the rows there are."""
        program, child = tmp_path / "python", tmp_path / "child"
        rows = '{"ok": true}'
        program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {child}\necho '{rows}' > $6\nwait\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        item = gpu.Item("slow", "tests", 5, lambda _: [])
        assert gpu.in_child(item, 3, options()) == ([{"ok": True}], "stopped after 3 s")
        stat = Path(f"/proc/{child.read_text().strip()}/stat")
        while stat.exists() and stat.read_text().split()[2] != "Z":
            time.sleep(0.01)

    def test_a_crash_is_one_line(self, monkeypatch):
        item = gpu.Item("no such item", "tests", 5, lambda _: [])
        rows, problem = gpu.in_child(item, 60, options("--dry-run"))
        assert rows == [] and problem.startswith("failed: ") and "\n" not in problem


class TestItems:
    """Each item's own logic, on the CPU."""

    def test_synchronisation(self):
        assert list(gpu_items.synchronisation(gpu.SMALL[0], "cpu")) == [
            {"execution": "eager", "ok": True}
        ]

    def test_profile(self):
        (row,) = gpu_items.profile(gpu.SMALL[0], "cpu")
        assert row["kernels"] > 100 and row["busy_s"] > 0 and 0 <= row["idle_share"] < 1
        assert row["longest"][0][2] >= row["longest"][1][2]

    def test_operator_cases_name_operators_that_exist(self):
        cases = list(gpu_items.cases("cpu"))
        served = set(gpu_items.operators.REFERENCE.served_by)
        assert {case.name for case in cases} == served - {"gumbel"}  # which draws its own numbers
        smallest = cases[0]
        assert smallest.bytes == 4 * (3 * 1024 * 15 + 1 + 1024 * 15)
        gru = next(case for case in cases if case.name == "gru_step")
        rows, deter, units, _ = gru.shape
        assert gru.flops == 2 * rows * 3 * deter * (deter + units)

    def test_a_wrong_operator_is_not_timed(self):
        case = next(gpu_items.cases("cpu"))
        with pytest.raises(AssertionError):
            gpu_items.time_case(case, lambda *x: x[0], "cpu")

    def test_training_stops_in_time_and_gives_a_score(self, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu_items, "ROOT", tmp_path)
        calls = []

        class Process:
            def __init__(self, command, **_):
                calls.append(command)
                folder = Path(command[command.index("--logdir") + 1])
                folder.mkdir(parents=True)
                row = {"step": 400, "updates": 100, "time": 9.0, "updates_per_second": 11.0}
                (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

            def wait(self, seconds):
                if len(calls) == 1:
                    calls.append("waited")
                    raise subprocess.TimeoutExpired("train", seconds)

            def terminate(self):
                calls.append("terminated")

        def evaluated(command, **_):
            out = Path(command[command.index("--json") + 1])
            out.write_text(json.dumps({"mean": 250.0, "interval": [200.0, 300.0]}))

        monkeypatch.setattr(subprocess, "Popen", Process)
        monkeypatch.setattr(subprocess, "run", evaluated)
        done = tmp_path / "runs" / "gpu-atari100k-2025"
        done.mkdir(parents=True)
        (done / "metrics.jsonl").write_text('{"step": 100000}\n')
        (row,) = gpu_items.train(1.0, "cuda")
        assert calls[1:] == ["waited", "terminated"]
        assert row["preset"] == "atari100k"
        assert row["score"] == 250.0 and row["updates"] == 100 and row["ok"]
