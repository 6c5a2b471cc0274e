"""SimCLR v2's three stages with few labels: from scratch, probe, fine-tuned, distilled, with three seeds.

    python benchmarks/simclr_v2_stages.py --data /usr/share/datasets/fashion-mnist

``--data`` is a folder with ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, gzipped or not. The first
``--images`` of them are used, reduced to ``--size`` pixels; a quarter of each class is held back and scores every
stage after its last epoch. The recipe is ``fashion-mnist-simclr-v2`` but for what the flags here say. It and the
defaults of the fine-tuning were chosen on the images 30,000 to 42,000, which are not among those used here.
The result goes to ``benchmarks/results/simclr_v2_stages.json``, the picture beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from cifar10_simclr import processor

from contrastive_mm.configuration import read_recipe
from contrastive_mm.vision.data.packed import read_idx
from contrastive_mm.vision.few_labels.distillation import DistillationConfig
from contrastive_mm.vision.few_labels.fine_tuning import FineTuningConfig
from contrastive_mm.vision.few_labels.simclr_v2 import PICTURE_FILE, RESULT_FILE, simclr_v2

RESULT = Path(__file__).parent / "results" / "simclr_v2_stages.json"


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(header + values.tobytes())


def first_images(source: Path, count: int, folder: Path) -> None:
    """Write the first images of a data set, with their labels, into a folder."""
    for kind in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        path = source / kind
        write_idx(folder / kind, read_idx(path if path.exists() else source / f"{kind}.gz")[:count])


def write_recipe(options: argparse.Namespace, data: Path, path: Path) -> None:
    recipe, _ = read_recipe("fashion-mnist-simclr-v2", "vision")
    recipe |= {"data": str(data), "encoder": options.encoder, "image_size": options.size, "validation_share": 0.25}
    recipe |= {"epochs": options.epochs, "hidden_dim": options.hidden_dim}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and each seed's accuracy, by share of labels and stage."""
    found: dict[str, Any] = {}
    for share, first in seeds[0]["labels"].items():
        found[share] = {"labelled_images": first["labelled_images"]}
        for stage, score in first["scores"].items():
            values = [seed["labels"][share]["scores"][stage]["accuracy"] for seed in seeds]
            found[share][stage] = {
                "parameters": score["parameters"],
                "mean": round(statistics.mean(values), 4),
                "deviation": round(statistics.stdev(values), 4),
                "accuracy": [round(value, 4) for value in values],
            }
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--encoder", default="small-conv-16")
    parser.add_argument("--student", default="small-conv-8")
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20, help="of the pretraining")
    parser.add_argument("--distillation-epochs", type=int, default=40)
    parser.add_argument("--distillation-batch-size", type=int, default=128)
    parser.add_argument("--distillation-learning-rate", type=float, default=3e-3)
    parser.add_argument("--fine-tuning-batch-size", type=int, default=16)
    parser.add_argument("--fine-tuning-crop-scale", type=float, default=0.6, help="of distillation too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of the runs, to go on where a killed one was")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("a deviation needs at least 2 --seeds")
    return options


def main() -> None:
    options = parse()
    began = time.perf_counter()
    output = options.output or Path(tempfile.mkdtemp())
    data, recipe = output / "images", output / "recipe.yaml"
    data.mkdir(parents=True, exist_ok=True)
    first_images(options.data, options.images, data)
    write_recipe(options, data, recipe)
    torch.set_num_threads(options.threads)
    fine_tuning = FineTuningConfig(
        batch_size=options.fine_tuning_batch_size, crop_scale=options.fine_tuning_crop_scale
    )
    distillation = DistillationConfig(
        epochs=options.distillation_epochs,
        batch_size=options.distillation_batch_size,
        learning_rate=options.distillation_learning_rate,
    )
    simclr_v2(
        config=str(recipe),
        student=options.student,
        seeds=options.seeds,
        output=output,
        fine_tuning=fine_tuning,
        distillation=distillation,
    )
    seeds = json.loads((output / RESULT_FILE).read_text(encoding="utf-8"))["seeds"]
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
    result = {
        "command": "python benchmarks/simclr_v2_stages.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "data": "Fashion-MNIST, training split",
        "settings": settings,
        "summary": summary(seeds),
        "seeds": seeds,
        "seconds": round(time.perf_counter() - began),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.copy(output / PICTURE_FILE, RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
