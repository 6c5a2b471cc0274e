"""What the margins of tests/test_matrix.py stand on: each cell's gain over seeds, and the gain of a null.

    python benchmarks/matrix_spread.py --seeds 3
    python benchmarks/matrix_spread.py --seeds 5 --cells curl/nlp simcse/rl

A seed decides initial weights, data order and views. The null is the same training on views of different samples:
in every step the second view's rows, the sample ids and the labels are each shuffled, so that there is nothing to
learn about what belongs together, while everything else that training does to an encoder goes on. What it gains is
the noise that a cell's margin has to stand out from. The result goes to ``benchmarks/results/matrix_spread.json``,
where cells that were not run stay as they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cifar10_simclr import processor
from torch import Tensor

from contrastive_mm.views import Inputs, ViewMaker, Views

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from matrix_cells import CELLS, NO_GAIN, flags, margin, metric, run_cell

RESULT = Path(__file__).parent / "results" / "matrix_spread.json"


def elsewhere(rows: int) -> Tensor:
    """A random order in which no row stays in its place."""
    circle = torch.randperm(rows)
    order = torch.empty_like(circle)
    order[circle] = circle.roll(1)
    return order


class UnrelatedViews:
    """The views of another view maker, no longer of the same samples."""

    def __init__(self, make_views: ViewMaker) -> None:
        self.make_views = make_views

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """Views of which no two in a row are of one sample."""
        views = self.make_views(batch)
        rows = views.batch_size
        return dataclasses.replace(
            views,
            inputs=(views.inputs[0], *(_reorder(view, elsewhere(rows)) for view in views.inputs[1:])),
            sample_ids=None if views.sample_ids is None else views.sample_ids[elsewhere(rows)],
            labels=None if views.labels is None else views.labels[elsewhere(rows)],
        )


def _reorder(view: Inputs, order: Tensor) -> Inputs:
    if isinstance(view, Tensor):
        return view[order]
    return {name: tensor[order] for name, tensor in view.items()}


def spread(method: str, domain: str, seeds: int, extra: list[str]) -> dict[str, Any]:
    """One cell's row of the table."""
    arguments = [*flags(method, domain), *extra]
    related, unrelated = [], []
    for seed in range(seeds):
        for outcomes, change in ((related, lambda views: views), (unrelated, UnrelatedViews)):
            with tempfile.TemporaryDirectory() as folder:
                outcomes.append(run_cell(arguments, domain, Path(folder), seed, change))
    score = metric(domain)
    untrained = [each.before[score] for each in related]
    gains, null = ([each.gain(score) for each in outcomes] for outcomes in (related, unrelated))
    return {
        "method": method,
        "domain": domain,
        "flags": arguments,
        "metric": score,
        "margin": margin(method, domain),
        "untrained": [round(before, 5) for before in untrained],
        "gain": [round(gain, 5) for gain in gains],
        "null_gain": [round(gain, 5) for gain in null],
        "training_seconds": round(statistics.mean(each.seconds for each in related), 1),
        "summary": {
            "gain_mean": round(statistics.mean(gains), 5),
            "gain_deviation": round(statistics.stdev(gains), 5),
            "gain_least": round(min(gains), 5),
            "untrained_deviation": round(statistics.stdev(untrained), 5),
            "null_mean": round(statistics.mean(null), 5),
            "null_deviation": round(statistics.stdev(null), 5),
            "null_most": round(max(null), 5),
        },
    }


def described(row: dict[str, Any]) -> str:
    figures = " ".join(f"{name} {value:+.4f}" for name, value in row["summary"].items())
    return f"{row['method']:>13}/{row['domain']:<7} margin {row['margin']:.3f} {figures} {row['training_seconds']} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", nargs="*", default=[f"{m}/{d}" for m, d in CELLS if (m, d) not in NO_GAIN])
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="flags to try, last on the line")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("a deviation needs at least 2 --seeds")
    held = json.loads(options.result.read_text(encoding="utf-8"))["cells"] if options.result.exists() else []
    rows = {f"{row['method']}/{row['domain']}": row for row in held}
    for cell in options.cells:
        method, _, domain = cell.partition("/")
        rows[cell] = spread(method, domain, options.seeds, options.extra)
        print(described(rows[cell]), flush=True)
        result = {
            "command": "python benchmarks/matrix_spread.py",
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
            "cells": [rows[name] for name in sorted(rows)],
        }
        options.result.parent.mkdir(exist_ok=True)
        options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
