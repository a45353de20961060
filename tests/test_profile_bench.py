"""``python -m bench.profile``: its parts and their sum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import profile, update
from bench.workload import Workload
from fastdreamer.cli import parse
from fastdreamer.errors import UsageError
from fastdreamer.kernels.twohot import bins
from fastdreamer.learner import Learner


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(update.PRODUCT, "cpu", 64)
    monkeypatch.setattr(profile, "WARM_UP", 1)


def options(*args: str) -> profile.Options:
    args = ("--size", "debug", "--rounds", "1", *args)
    return parse(profile.Options, args, "bench.profile", profile.Options())


@pytest.mark.parametrize(
    ("recipe", "precision"), [("2023", "fp32"), ("2025", "fp32"), ("2025", "bf16")]
)
def test_the_parts_sum_to_the_whole(recipe, precision, cpp):
    result = profile.measure(options("--recipe", recipe, "--precision", precision))
    assert result["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    parts = result["parts"]
    assert result["flops"] == Workload(recipe, "debug", "image").flops()
    expected = {"encoder", "posterior scan", "decoder", "rollout", "imagined heads", "optimiser"}
    assert expected <= set(parts)
    for name in ("encoder", "posterior scan", "decoder", "imagined heads"):
        forward, backward = parts[name], parts[f"{name}, backward"]
        assert forward["seconds"] > 0 and backward["seconds"] > 0
        assert 0 < forward["flops"] <= 3 * backward["flops"], name
    assert "rollout, backward" not in parts
    assert profile.table(result).count("\n") == len(parts) + 2


def test_nothing_stays_patched():
    grad, workload = torch.autograd.grad, Workload("2025", "debug", "vector")
    bins.cache_clear()
    with workload.counted() as (counted, learner, counter):
        spent = profile.metered(counted, learner, counter.get_total_flops)
    assert sum(spent.values()) == workload.flops()
    assert torch.autograd.grad is grad and "step" not in vars(learner)
    kept = bins(learner.recipe.bins, learner.agent.model.bins, torch.float32, torch.device("cpu"))
    assert type(kept) is torch.Tensor


def test_nothing_is_left_out(cpp):
    """What the parts add up to is what a counter has counted from the first look to the last."""
    looks: list[int] = []

    def read() -> float:
        looks.append(len(looks))
        return looks[-1]

    workload = Workload("2023", "debug", "vector")
    learner = Learner.make(workload.agent(cpp), workload.learner)
    meter, update = profile.Meter(read), workload.update_of(learner)
    with profile.divided(learner, meter):
        update()
    meter._book()
    assert meter.stack == [profile.REST]
    assert sum(meter.spent.values()) == looks[-1] and len(meter.spent) > 15


def test_writes_a_line(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "result.json"
    arguments = ["--size", "debug", "--no-record", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["profile", *arguments])
    profile.main()
    assert json.loads(file.read_text())["workload"] == "2025 debug image"
    assert "| whole |" in capsys.readouterr().out


def test_an_unknown_size():
    with pytest.raises(UsageError, match="recipe 2025 has"):
        profile.measure(options("--size", "s"))
