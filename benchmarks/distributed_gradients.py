"""Gradients averaged over several processes against those of one process with the whole batch: the ratio is 1.

    python benchmarks/distributed_gradients.py

For every loss and kind of positives, with unequal parts of a batch of 11 samples, in float64: the projection of the
averaged gradient on the right one, its largest difference relative to the largest gradient, and the ratio of the
learned temperature's gradients. The result goes to ``benchmarks/results/distributed_gradients.json``.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
WORKER = ROOT / "tests" / "distributed_worker.py"
RESULT = ROOT / "benchmarks" / "results" / "distributed_gradients.json"
FIGURES = ("projection", "largest difference", "temperature")


def measure(processes: int) -> dict[str, dict[str, float]]:
    """The figures of every case with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(WORKER)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen([*command, str(rank), str(processes), folder], env=environment)
            for rank in range(processes)
        ]
        if any(process.wait() for process in running):
            raise SystemExit("A process failed; its error stands above.")
        found = json.loads((Path(folder) / "ratios.json").read_text())
    return {case: dict(zip(FIGURES, figures, strict=True)) for case, figures in found.items()}


def main() -> None:
    """Measure with 2 and 3 processes, print the worst of each, keep all."""
    result = {"date": str(datetime.date.today()), "torch": torch.__version__, "processes": {}}
    for processes in (2, 3):
        cases = measure(processes)
        result["processes"][str(processes)] = cases
        for figure, right in zip(FIGURES, (1.0, 0.0, 1.0), strict=True):
            case = max(cases, key=lambda name: abs(cases[name][figure] - right))
            print(f"{processes} processes, {len(cases)} cases, {figure}: worst {cases[case][figure]!r} ({case})")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
