"""Every method on images of reduced size, beside the untrained encoder, raw pixels and supervised training.

    python benchmarks/vision_methods.py --cifar10 train.parquet

``--fashion-mnist`` is a folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, gzipped or not;
``--cifar10`` a Parquet file of its training split with the columns ``image`` and ``label``. Of each the first
``--images`` are used, as many of each class, reduced to ``--size`` pixels; a fifth of each class is held back and
scores the last epoch, by weighted kNN and by a linear probe on the frozen features, as ``contrastive-mm vision
evaluate`` does. All methods have the same encoder, views, batch, optimiser and epochs, and their options' defaults but
for four that learn little in so few steps with them (``OWN``). These options, and the views, were chosen on other
images of the training splits (``--skip 40000``, seed 100). Supervised training has the same encoder, all labels, and
crops and flips for views.

Each cell is a folder in ``--output``: a command that was killed goes on where it was. The table goes to
``benchmarks/results/vision_methods.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from cifar10_simclr import processor
from matplotlib.figure import Figure
from simclr_v2_stages import write_idx

from contrastive_mm.configuration import parse_run
from contrastive_mm.methods import METHODS
from contrastive_mm.runs import pretrain, trained_encoder, untrained_encoder
from contrastive_mm.vision.data.packed import read_idx
from contrastive_mm.vision.domain import ImageDomain
from contrastive_mm.vision.evaluation.protocols import FrozenFeatures, score_knn, score_linear
from contrastive_mm.vision.few_labels.fine_tuning import FineTuningConfig
from contrastive_mm.vision.few_labels.labelled import draw_labelled
from contrastive_mm.vision.few_labels.stages import load_classifier, run_stage
from contrastive_mm.vision.few_labels.training import FewLabels

RESULT = Path(__file__).parent / "results" / "vision_methods.json"
UNTRAINED, RAW, SUPERVISED = "untrained encoder", "raw pixels", "supervised"
BASELINES = (UNTRAINED, RAW, SUPERVISED)
METRICS = ("knn_accuracy", "linear_accuracy")
VIEWS = {
    "fashion-mnist": ["--crop-scale=0.2", "--jitter=0.8", "--jitter-strength=1.0", "--greyscale=0", "--blur=0"],
    "cifar10": ["--augmentation=simclr-cifar"],
}
COMMON = ["--batch-size=256", "--learning-rate=2e-3", "--validation-share=0.2", "--diagnose"]
OWN = {
    "byol": ["--momentum=0.95", "--learning-rate=1e-3"],
    "moco-v3": ["--momentum=0.95", "--learning-rate=1e-3"],
    "simsiam": ["--projection-layers=2", "--prediction-hidden-dim=512", "--learning-rate=5e-4"],
    "swav": ["--num-prototypes=60", "--epsilon=0.03", "--freeze-prototypes-steps=20"],
}
"""Options of single methods."""


def chosen(labels: np.ndarray, options: argparse.Namespace) -> np.ndarray:
    """Numbers of the images that are used, as many of each class, in the data set's order."""
    classes = np.unique(labels)
    first, count = options.skip // len(classes), options.images // len(classes)
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[first : first + count] for label in classes]))


def write_images(options: argparse.Namespace) -> dict[str, Path]:
    """The part of each data set that is used, as files of the same kind."""
    folder, data = options.output / "data", {}
    folder.mkdir(parents=True, exist_ok=True)
    if "fashion-mnist" in options.datasets:
        data["fashion-mnist"] = folder / "fashion-mnist"
        data["fashion-mnist"].mkdir(exist_ok=True)
        parts = {}
        for kind in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
            path = options.fashion_mnist / kind
            parts[kind] = read_idx(path if path.exists() else path.with_name(f"{kind}.gz"))
        rows = chosen(parts["train-labels-idx1-ubyte"], options)
        for kind, values in parts.items():
            write_idx(data["fashion-mnist"] / kind, values[rows])
    if "cifar10" in options.datasets:
        data["cifar10"] = folder / "cifar10.parquet"
        images = pq.read_table(options.cifar10)
        pq.write_table(images.take(chosen(images.column("label").to_numpy(), options)), data["cifar10"])
    return data


def score(domain: ImageDomain, encoder: torch.nn.Module | None) -> dict[str, float]:
    """Held-back accuracy of kNN and of a linear probe; of raw pixels for None."""
    features = FrozenFeatures(domain, {"": encoder}, torch.device("cpu"), seed=0)
    return score_knn(features)["scores"][""] | score_linear(features)["scores"][""]


def run_cell(data: Path, dataset: str, name: str, seed: int, options: argparse.Namespace, folder: Path) -> None:
    """Train and score one cell, or go on with it, or leave it if it is done."""
    method = "simclr" if name in BASELINES else name
    flags = [f"--data={data}", f"--image-size={options.size}", f"--encoder={options.encoder}", f"--seed={seed}"]
    flags += [f"--epochs={options.epochs}", f"--precision={options.precision}", f"--method={method}"]
    flags += [*COMMON, *VIEWS[dataset], *OWN.get(name, []), *options.extra]
    config, _ = parse_run("vision", flags)
    supervised = FineTuningConfig(
        epochs=options.supervised_epochs, batch_size=256, scratch_learning_rate=2e-3, weight_decay=1e-4
    )

    def train() -> dict[str, float]:
        domain = ImageDomain(config.domain_options, seed)
        if name == RAW:
            return score(domain, None)
        if name == UNTRAINED:
            return score(domain, untrained_encoder(domain, seed))
        if name == SUPERVISED:
            labelled = draw_labelled(domain.labels, domain.train_rows, 1.0, seed)
            few = FewLabels(domain, labelled, config.trainer, supervised)
            accuracy = few.from_scratch(options.encoder, folder / "training")["accuracy"]
            classifier = few.new_classifier(options.encoder)
            load_classifier(classifier, folder / "training")
            return score(domain, classifier.encoder) | {"classifier_accuracy": accuracy}
        done = pretrain(config, folder / "run", resume=True)
        return score(domain, trained_encoder(folder / "run", config, domain)) | {"seconds": round(done["seconds"], 1)}

    run_stage(folder, {**config.flat(), "supervised_epochs": options.supervised_epochs}, train)


def run_cells(options: argparse.Namespace, data: dict[str, Path]) -> list[dict[str, Any]]:
    """All cells, so many at a time, each in a process of its own with one thread."""
    wanted = [(d, name, seed) for d in data for seed in options.seeds for name in (*BASELINES, *options.methods)]
    # Any dataset, any seed: pixels are the same.
    wanted = [cell for cell in wanted if cell[1] != RAW or cell[2] == options.seeds[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(cell: tuple[str, str, int]) -> dict[str, Any]:
        dataset, name, seed = cell
        folder = options.output / dataset / name.replace(" ", "-") / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", dataset, name, str(seed)]
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True, env=environment)
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        print(dataset, name, seed, {key: round(value, 4) for key, value in scores.items()}, flush=True)
        scores.pop("seconds", None)  # of cells side by side, and of some that were stopped for a while
        return {"dataset": dataset, "name": name, "seed": seed, "scores": scores}

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(run, wanted))


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and each seed's value, by data set, row and metric."""
    found: dict[str, Any] = {}
    for cell in cells:
        row = found.setdefault(cell["dataset"], {}).setdefault(cell["name"], {})
        for metric, value in cell["scores"].items():
            row.setdefault(metric, {"seeds": []})["seeds"].append(round(value, 4))
    for rows in found.values():
        for row in rows.values():
            for figures in row.values():
                values = figures["seeds"]
                figures["mean"] = round(statistics.mean(values), 4)
                figures["deviation"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return found


def table(found: dict[str, Any]) -> str:
    """The summary in Markdown: methods by their mean over all columns, baselines below."""
    datasets = list(found)
    heads = [f"{dataset}, {what}" for dataset in datasets for what in ("kNN", "linear")]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name in [*ordered(found), *BASELINES]:
        cells = []
        for dataset in datasets:
            row = found[dataset][name]
            last = "classifier_accuracy" if name == SUPERVISED else "linear_accuracy"
            cells += [shown(row["knn_accuracy"]), shown(row[last])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(figures: dict[str, Any]) -> str:
    spread = "" if figures["deviation"] is None else f" ± {100 * figures['deviation']:.1f}"
    return f"{100 * figures['mean']:.1f}{spread}"


def ordered(found: dict[str, Any]) -> list[str]:
    """Methods, the best by kNN first."""
    means = {
        name: statistics.mean(rows[name]["knn_accuracy"]["mean"] for rows in found.values())
        for name in next(iter(found.values()))
        if name not in BASELINES
    }
    return sorted(means, key=lambda name: -means[name])


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel for each data set: a row for each method, a dot for each metric, lines where the baselines are."""
    figure = Figure(figsize=(5.5 * len(found), 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    names = ordered(found)[::-1]
    for axes, (dataset, rows) in zip(panels, found.items(), strict=True):
        for metric, colour, mark, label in (
            ("knn_accuracy", "tab:blue", "o", "kNN"),
            ("linear_accuracy", "tab:orange", "s", "linear probe"),
        ):
            means = [100 * rows[name][metric]["mean"] for name in names]
            deviations = [100 * (rows[name][metric]["deviation"] or 0) for name in names]
            axes.errorbar(means, range(len(names)), xerr=deviations, fmt=mark, color=colour, capsize=2, label=label)
        axes.axvline(100 * rows[UNTRAINED]["knn_accuracy"]["mean"], color="0.6", linestyle=":", label="untrained, kNN")
        axes.axvline(100 * rows[RAW]["knn_accuracy"]["mean"], color="0.4", linestyle="--", label="raw pixels, kNN")
        ceiling = 100 * rows[SUPERVISED]["classifier_accuracy"]["mean"]
        axes.axvline(ceiling, color="tab:green", label="supervised")
        axes.set(title=dataset, xlabel="held-back accuracy, %")
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--datasets", nargs="*", default=["fashion-mnist", "cifar10"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--images", type=int, default=10_000, help="of each data set, held-back ones with them")
    parser.add_argument("--skip", type=int, default=0, help="images at the beginning to leave out")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--encoder", default="small-conv-16")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--supervised-epochs", type=int, default=30)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("runs/vision-methods"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--cell", nargs=3, metavar=("DATA", "ROW", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--extra", default="", help="flags to try, as one word: '--epochs=3 --temperature=0.5'")
    options = parser.parse_args()
    options.extra = options.extra.split()
    if "cifar10" in options.datasets and options.cifar10 is None:
        parser.error("--cifar10 is missing: the path of train.parquet (or leave it out of --datasets)")
    return options


def main() -> None:
    options = parse()
    names = {"fashion-mnist": "fashion-mnist", "cifar10": "cifar10.parquet"}
    if options.cell:
        dataset, name, seed = options.cell
        folder = options.output / dataset / name.replace(" ", "-") / f"seed-{seed}"
        run_cell(options.output / "data" / names[dataset], dataset, name, int(seed), options, folder)
        return
    cells = run_cells(options, write_images(options))
    settings = {
        key: value
        for key, value in vars(options).items()
        if key not in ("fashion_mnist", "cifar10", "output", "result", "cell", "jobs")
    }
    found = summary(cells)
    result = {
        "command": "python benchmarks/vision_methods.py --cifar10 train.parquet",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "jobs": options.jobs, "torch": torch.__version__},
        "settings": settings | {"common": COMMON, "views": VIEWS, "own": OWN},
        "summary": found,
        "cells": cells,
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.result.with_suffix(".md").write_text(table(found), encoding="utf-8")
    draw(found, options.result.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
