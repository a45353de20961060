"""``python -m bench.acting``: options and results."""

from __future__ import annotations

import pytest

from bench import acting
from fastdreamer.cli import parse
from fastdreamer.errors import UsageError


def options(*args: str) -> acting.Options:
    return parse(acting.Options, args, "bench.acting", acting.Options())


def test_a_row_for_each_number_of_environments():
    rows = acting.measure(options("--size", "debug", "--rounds", "2", "--envs", "1", "3"))
    assert [row["envs"] for row in rows] == [1, 3]
    for row in rows:
        assert {"reference", "cpp"} >= set(row["seconds"]) >= {"reference"}
        for name, seconds in row["seconds"].items():
            assert 0 < row["min_s"][name] <= seconds <= row["max_s"][name]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--envs", "0"], r"--envs must be 1 to 16, got \(0,\)"),
        (["--envs", "17"], "--envs must be 1 to 16"),
        (["--size", "1m"], "recipe 2023 has debug"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--json", "x.txt"], "must end in .json"),
    ],
)
def test_wrong_options(args, message):
    with pytest.raises(UsageError, match=message):
        acting.measure(options(*args))
