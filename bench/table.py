"""``python -m bench.table``: writes the README's results from bench/results.

What stands between the markers in the README is replaced; ``--check`` only compares.
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


def operators() -> str:
    """The latest timing of each operator, pass and shape, as times and ratios."""
    rows = [json.loads(line) for line in (RESULTS / "operators.jsonl").read_text().splitlines()]
    latest: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["operator"], row["pass"], tuple(row["shape"]))
        latest.setdefault(key, {})[row["backend"]] = row
    lines = [
        "| operator | pass | shape | reference | torch.compile of it | C++ | ratio to the faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for (operator, pass_, shape), by in latest.items():
        times = {k: v["median_s"] * 1e6 for k, v in by.items()}
        cells = [_microseconds(times.get(k)) for k in ("reference", "compile(reference)", "cpp")]
        others = [v for k, v in times.items() if k != "cpp"]
        ratio = f"{min(others) / times['cpp']:.1f} x" if others and "cpp" in times else "-"
        size = " x ".join(map(str, shape))
        lines.append(f"| `{operator}` | {pass_} | {size} | {' | '.join(cells)} | {ratio} |")
    last = rows[-1]
    lines.append(
        f"\nfloat32, medians, {last['device']}, PyTorch {last['versions']['torch']}; "
        "`make bench` measures again."
    )
    return "\n".join(lines)


def _microseconds(time: float | None) -> str:
    return "-" if time is None else f"{time:.0f} us"


def updates() -> str:
    """The latest timing of each workload's updates, and of the rival in the same run."""
    path = RESULTS / "updates.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    latest = {(row["workload"], row["device"], row["backend"]): row for row in rows}
    if not latest:
        return ""
    lines = [
        "| update | device | ours | fastest rival | ratio | times the floor |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, device, _), row in latest.items():
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
    return f"{name} {rival['version']}: {_seconds(rival)} | {row['ratio']:.1f} x"


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


def main() -> None:
    """Rewrite the README's section, or fail with ``--check`` where it is not up to date."""
    path = ROOT / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    new = f"{before}{START}\n\n{learning()}\n\n{updates()}{operators()}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(new != text and "README.md: results are not up to date: python -m bench.table")
    path.write_text(new)


if __name__ == "__main__":
    main()
