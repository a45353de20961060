"""``python -m bench.table``: writes the README's results from bench/results.

What stands between the markers in the README is replaced, and so is bench/results/OPERATORS.md;
``--check`` only compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastdreamer.config import SIZES, Config
from fastdreamer.loading import from_json
from fastdreamer.plan import total_updates

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- results: python -m bench.table -->", "<!-- end of results -->"
OPERATORS = """\
# Operators

Medians in float32; the ratio is to the faster of the reference and torch.compile of it.
`python -m pytest bench/operators.py` measures, `python -m bench.table` writes this file.

"""
SLOWEST = """\
Of each operator the pass and shape that is slowest in the reference, float32, medians; the ratio is
to the faster of the two others. [All of them](bench/results/OPERATORS.md); `make bench` measures
again. """


def timings() -> list[dict[str, Any]]:
    """What was measured of the operators, oldest first."""
    return [json.loads(line) for line in (RESULTS / "operators.jsonl").read_text().splitlines()]


def operators(every: bool = False) -> str:
    """The latest timing of each operator, as times and ratios.

    Args:
        every: each pass and shape, instead of the slowest of them in the reference.
    """
    latest: dict[str, dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = {}
    for row in timings():
        shapes = latest.setdefault(row["operator"], {})
        by = shapes.setdefault((row["pass"], tuple(row["shape"])), {})
        by[row["backend"]] = row
    lines = [
        "| operator | pass | shape | reference | torch.compile of it | C++ | ratio | C++, bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operator, shapes in latest.items():
        slowest = max(shapes, key=lambda key: _rank(shapes[key]))
        for pass_, shape in shapes if every else [slowest]:
            by = shapes[pass_, shape]
            lines.append(f"| `{operator}` | {pass_} | {_timing(shape, by)} |")
    return "\n".join(lines)


def _timing(shape: tuple[int, ...], by: dict[str, dict[str, Any]]) -> str:
    """Shape, times and ratio as cells, and the time of products in bfloat16 where there is one."""
    times = {backend: row["median_s"] for backend, row in by.items()}
    cells = [_duration(times.get(k)) for k in ("reference", "compile(reference)", "cpp")]
    others = [v for k, v in times.items() if not k.startswith("cpp")]
    ratio = f"{min(others) / times['cpp']:.1f} x" if others and "cpp" in times else "-"
    half = _duration(times.get("cpp bf16"))
    return " | ".join([" x ".join(map(str, shape)), *cells, ratio, half])


def measured_on() -> str:
    """Where the latest timings of operators were made."""
    rows = timings()
    keys = ("operator", "pass", "backend")
    latest = {(tuple(row["shape"]), *(row[key] for key in keys)): row for row in rows}
    last, commits = rows[-1], ", ".join(sorted({row["commit"] for row in latest.values()}))
    return (
        f"{last['device']}, {last['threads']} thread(s), PyTorch {last['versions']['torch']}, "
        f"commits {commits}."
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _rank(by: dict[str, dict[str, Any]]) -> tuple[bool, float]:
    """Of a shape among those of an operator: both were timed; seconds of the reference."""
    return {"reference", "cpp"} <= by.keys(), by.get("reference", {"median_s": 0.0})["median_s"]


def updates() -> str:
    """The latest timing of each workload's updates, and of the rival in the same run."""
    path = RESULTS / "updates.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = ("workload", "device", "backend", "threads")
    latest = {tuple(row[key] for key in keys): row for row in rows}
    if not latest:
        return ""
    lines = [
        "| update | device | ours | fastest rival | ratio | times the floor |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, device, *_), row in latest.items():
        lines.append(
            f"| {workload} | {device}, {row['threads']} thread(s) | {_seconds(row)} | "
            f"{_fastest_rival(row)} | {row['floor_multiple']:.1f} |"
        )
    lines.append(
        "\nOne update of 16 x 64 with horizon 15: medians, lowest to highest, in turns in one run; "
        "the floor is its dense FLOPs at the matrix-product peak measured in that run "
        "(`python -m bench.update --help`)."
    )
    return "\n".join(lines) + "\n\n"


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.3g} s ({row['min_s']:.3g} to {row['max_s']:.3g}), {row['settings']}"


def _fastest_rival(row: dict[str, Any]) -> str:
    """Two cells: the rival and the ratio to it; dashes where none was in the run."""
    if not row["rivals"]:
        return "- | -"
    name = min(row["rivals"], key=row["rivals"].get)
    rival = row["rivals_at"][name]
    tried = "" if rival["compile"] else "; torch.compile not tried"
    return f"{name} {rival['version']}: {_seconds(rival)}{tried} | {row['ratio']:.1f} x"


def learning() -> str:
    """One row for each learning run: what was trained, and the score beside random actions."""
    lines = [
        "| task | recipe, size | steps | updates | score | random actions | curve |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder in sorted(p for p in (RESULTS / "learning").iterdir() if p.is_dir()):
        config = json.loads((folder / "config.json").read_text())
        agent = json.loads((folder / "evaluation.json").read_text())
        chance = json.loads((folder / "random.json").read_text())
        run = from_json(Config, config, "config.json")
        widened = "" if run.model == SIZES[run.recipe][run.size] else " with networks of its own"
        lines.append(
            f"| {run.task} | {run.recipe}, {run.size}{widened} | {agent['step']:,} | "
            f"{total_updates(run, agent['step']):,} (ratio {run.learner.replay_ratio:g}) | "
            f"{_score(agent)} | {_score(chance)} | "
            f"[plot]({(folder / 'score.png').relative_to(ROOT)}) |"
        )
    return "\n".join(lines)


def _score(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['mean']:.4g} ({low:.4g} to {high:.4g}, {len(result['scores'])} episodes)"


def acting() -> str:
    """The latest latency of a policy step by workload and number of environments."""
    path = RESULTS / "acting.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    latest = {(row["workload"], row["envs"], row["device"]): row for row in rows}
    if not latest:
        return ""
    lines = [
        "| policy step | environments | device | reference | C++ | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, envs, device), row in latest.items():
        reference, cpp = (row["seconds"].get(k) for k in ("reference", "cpp"))
        ratio = f"{reference / cpp:.1f} x" if reference and cpp else "-"
        cells = [_duration(reference), _duration(cpp)]
        lines.append(
            f"| {workload} | {envs} | {device}, {row['threads']} thread(s) | "
            f"{' | '.join(cells)} | {ratio} |"
        )
    return "\n".join(lines) + "\n\nObservation in, action out (`python -m bench.acting`).\n\n"


def main() -> None:
    """Rewrite the README's section and the file of operators.

    With ``--check`` fail where they are not up to date.
    """
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    results = f"{learning()}\n\n{updates()}{acting()}{operators()}\n\n{SLOWEST}{measured_on()}"
    files = {
        ROOT / "README.md": f"{before}{START}\n\n{results}\n\n{END}{after}",
        RESULTS / "OPERATORS.md": f"{OPERATORS}{operators(every=True)}\n\n{measured_on()}\n",
    }
    for path, text in files.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.name}: results are not up to date: python -m bench.table")


if __name__ == "__main__":
    main()
