"""Fails unless a finished demo covers 90 % of the way from the random to the best score."""

import json
import sys
from pathlib import Path

BEST = 1.0  # Catch: the ball is caught

result = json.loads((Path(sys.argv[1]) / "evaluation.json").read_text())
mean, chance = result["agent"]["mean"], result["random"]["mean"]
covered = (mean - chance) / (BEST - chance)
print(f"demo: {covered:.0%} of the way over {len(result['agent']['scores'])} episodes")
sys.exit(covered < 0.9)
