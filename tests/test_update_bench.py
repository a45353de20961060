"""``python -m bench.update``: options, gate, result, count of operations."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from bench import results, rivals, table, update
from bench.workload import Workload
from fastdreamer.cli import parse, run
from fastdreamer.errors import UsageError, UserError
from fastdreamer.kernels import library, resolve

SHORT = ("--size", "debug", "--rounds", "2", "--threads", "1")


def options(*args: str) -> update.Options:
    return parse(update.Options, args, "bench.update", update.Options())


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "gate", lambda *_: None)
    monkeypatch.setitem(update.PRODUCT, "cpu", 64)


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival in sheeprl's place that sleeps; one of its settings fails."""

    def failing() -> None:
        raise RuntimeError("no such\ninstruction")

    makers = {
        "slow": lambda: lambda: time.sleep(0.02),
        "failing": failing,
        "fast": lambda: lambda: time.sleep(0.005),
    }
    rival = SimpleNamespace(supports=lambda _: True, updates=lambda *_: makers)
    monkeypatch.setattr(rivals, "load", lambda _: rival)
    monkeypatch.setattr(rivals, "installed", lambda: list(rivals.NAMES))
    monkeypatch.setattr(rivals, "installed_version", lambda _: "1.0")


class TestOptions:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--size", "1m"], "--size 1m: recipe 2023 has debug, xs, s"),
            (["--recipe", "2025", "--size", "s"], "--size s: recipe 2025 has debug, 1m"),
            (["--rounds", "0"], "--rounds must be at least 1"),
            (["--threads", "-1"], "--threads must be at least 0"),
            (["--json", "result.txt"], "must end in .json or .jsonl"),
            (["--rivals", "sheeprl,dreamer"], "unknown 'dreamer', valid are sheeprl, torchrl"),
            (["--rivals", "torchrl"], "no learner of 2023 s image in torchrl"),
            (
                ["--rivals", "sheeprl", "--size", "debug"],
                "no learner of 2023 debug image in sheeprl",
            ),
            (["--recipe", "2024"], "2024"),
            (["--rounnds", "2"], "did you mean --rounds"),
        ],
    )
    def test_wrong_ones_are_named(self, args: list[str], message: str, monkeypatch) -> None:
        monkeypatch.setattr(rivals, "installed", lambda: list(rivals.NAMES))
        with pytest.raises(UsageError, match=message):
            update.measure(options(*args))

    def test_a_missing_rival_is_one_line_with_the_pip_command(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(rivals, "installed", list)
        monkeypatch.setattr(sys, "argv", ["update", "--rivals", "sheeprl"])
        with pytest.raises(SystemExit) as stopped:
            run(update.main)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error == "error: --rivals: sheeprl is not installed: pip install 'sheeprl==0.8.4'\n"

    def test_installed_takes_those_that_have_the_recipe(self, monkeypatch) -> None:
        monkeypatch.setattr(rivals, "installed", lambda: list(rivals.NAMES))
        chosen = options("--rivals", "installed")
        assert update.chosen(chosen, Workload("2023", "s", "image")) == ["sheeprl"]
        assert update.chosen(chosen, Workload("2023", "debug", "image")) == []
        both = Workload("2025", "1m", "vector")
        assert update.chosen(chosen, both) == ["sheeprl", "torchrl"]
        assert update.chosen(options("--rivals", "torchrl,sheeprl"), both) == ["sheeprl", "torchrl"]

    def test_a_rival_without_such_a_learner_is_left_out_installed_or_not(
        self, monkeypatch, capsys
    ) -> None:
        monkeypatch.setattr(rivals, "installed", lambda: ["sheeprl"])
        chosen = update.chosen(
            options("--rivals", "sheeprl,torchrl"), Workload("2023", "s", "image")
        )
        assert chosen == ["sheeprl"]
        said = capsys.readouterr().out
        assert said == "left out, having no learner of 2023 s image: torchrl\n"


class TestGate:
    def test_no_time_is_given_when_the_golden_tests_fail(self, monkeypatch) -> None:
        failed = subprocess.CompletedProcess([], 1, "1 failed in 2 s\n", "")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
        monkeypatch.setattr(update.Clock, "start", lambda *_: pytest.fail("was timed"))
        with pytest.raises(UserError, match=r"no time is given.*2023.*reference.*1 failed"):
            update.measure(options(*SHORT, "--backend", "reference"))

    @pytest.mark.parametrize("recipe", ["2023", "2025"])
    def test_it_runs_the_recipes_golden_tests(self, recipe: str, monkeypatch) -> None:
        commands: list[list[str]] = []
        done = subprocess.CompletedProcess([], 0, "", "")
        monkeypatch.setattr(subprocess, "run", lambda c, **_: commands.append(c) or done)
        workload = Workload(recipe, "debug", "image")
        update.gate(workload, resolve("reference"))
        (command,) = commands
        folder = Path(command[command.index("--golden") + 1])
        assert (folder / "manifest.json").exists() and folder.name.startswith(f"v{recipe}")
        assert command[-4:] == ["--device", "cpu", "--backend", "reference"]


@pytest.mark.usefixtures("no_gate")
class TestResult:
    def test_of_ours_alone(self, tmp_path: Path, monkeypatch, capsys) -> None:
        file = tmp_path / "result.json"
        recorded = results.RESULTS / "updates.jsonl"
        before = recorded.read_bytes() if recorded.exists() else None
        argv = ["update", *SHORT, "--no-record", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", argv)
        update.main()
        (line,) = file.read_text().splitlines()
        row = json.loads(line)
        assert row["min_s"] <= row["seconds"] <= row["max_s"] and row["first_call_s"] > 0
        assert row["rivals"] == {} and row["ratio"] is None
        assert row["floor_multiple"] == pytest.approx(row["seconds"] / row["floor_s"])
        assert row["batch"] == [16, 64] and row["horizon"] == 15 and row["threads"] == 1
        assert f"{row['floor_multiple']:.2f} times" in capsys.readouterr().out
        assert (recorded.read_bytes() if recorded.exists() else None) == before

    @pytest.mark.usefixtures("sleeper")
    def test_beside_a_rival_at_its_fastest_setting(self, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.setattr(results, "RESULTS", tmp_path)
        monkeypatch.setattr(table, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", ["update", *SHORT, "--rivals", "sheeprl"])
        update.main()
        row = json.loads((tmp_path / "updates.jsonl").read_text())
        rival = row["rivals_at"]["sheeprl"]
        assert rival["settings"] == "fast" and rival["version"] == "1.0"
        assert rival["tried"]["failing"] == "RuntimeError: no such"
        assert row["rivals"]["sheeprl"] == rival["seconds"] >= 0.005
        assert row["ratio"] == pytest.approx(rival["seconds"] / row["seconds"])
        assert "sheeprl (fast)" in capsys.readouterr().out
        assert (
            "| sheeprl 1.0: " in table.updates() and f"| {row['ratio']:.1f} x |" in table.updates()
        )


@pytest.mark.parametrize(("best", "precisions"), [("avx2", ["fp32"]), ("amx", ["fp32", "bf16"])])
def test_bfloat16_is_tried_where_the_processor_has_it(best, precisions, monkeypatch) -> None:
    monkeypatch.setattr(library, "isa", lambda: best)
    makers = update.own_settings(Workload("2025", "debug", "image"), resolve("cpp"))
    assert [name.split(", ")[1] for name in makers] == [f"precision {p}" for p in precisions]


def test_a_limited_instruction_set_is_part_of_the_record(monkeypatch) -> None:
    monkeypatch.setenv("FASTDREAMER_ISA", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert results.device_name("cpu").endswith(" cores, avx2")
    assert results.command().startswith("FASTDREAMER_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ")


def test_the_table_takes_operators_timed_without_the_reference(monkeypatch) -> None:
    row = {"operator": "ema", "pass": "step", "backend": "cpp", "shape": [7], "median_s": 2e-3}
    other = row | {"backend": "reference", "shape": [3], "median_s": 5e-3}
    both = row | {"shape": [2]}, other | {"shape": [2], "median_s": 4e-3}
    for rows, expected in (
        ([row], "| 7 | - | - | 2 ms | - |"),
        ([row, other], "| 3 | 5 ms | - |"),
        ([row, other, *both], "| 2 | 4 ms | - | 2 ms | 2.0 x |"),
    ):
        monkeypatch.setattr(table, "timings", lambda rows=rows: rows)
        assert f"| `ema` | step {expected}" in table.operators()


class TestWorkload:
    @pytest.mark.parametrize(("recipe", "obs"), [("2023", "image"), ("2025", "vector")])
    def test_operations_are_those_of_a_real_update(self, recipe: str, obs: str) -> None:
        workload = Workload(recipe, "debug", obs)
        real = workload.update(resolve("reference"))
        with FlopCounterMode(display=False) as counter:
            real()
        assert workload.flops() == counter.get_total_flops() > 0
