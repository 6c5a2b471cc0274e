"""CIFAR-10 with ResNet-18, SimCLR, MoCo and SwAV, on a GPU: kNN-200, linear probe, minutes, and what views cost.

    python benchmarks/cifar10_resnet18.py --data train.parquet

``train.parquet`` holds the training split with the columns ``image`` and ``label``; the last 500 images of each
class are held back for evaluation. Batch 512 and the small-image stem, with optimiser, temperature and queue as in
lightly's benchmark of 200 epochs. Scores are of the last epoch. A command that was killed goes on where it was, so
that it can be run in parts: ``timeout 540 python benchmarks/cifar10_resnet18.py ...``. The result goes to
``benchmarks/results/cifar10_resnet18.json``, a method at a time.

Published beside it (other machines): lightly, 200 epochs, batch 512, best kNN-200 over epochs: SimCLR 84.8, MoCo 84.7,
SwAV 84.2, in 87 to 112 minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar10_simclr import processor

from contrastive_mm.configuration import parse_run
from contrastive_mm.runs import pretrain
from contrastive_mm.vision.domain import ImageDomain
from contrastive_mm.vision.evaluation.evaluate import evaluate_images

RESULT = Path(__file__).parent / "results" / "cifar10_resnet18.json"
SGD = ["--optimizer=sgd", "--learning-rate=0.24", "--weight-decay=5e-4"]
METHODS = {
    "simclr": [*SGD, "--temperature=0.5"],
    "moco": [*SGD, "--temperature=0.1", "--queue-size=4096", "--momentum=0.99"],
    "swav": ["--optimizer=adamw", "--learning-rate=4e-3", "--weight-decay=1e-6", "--num-prototypes=512"],
}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def seconds_of(work: Callable[[], Any], rounds: int = 20) -> float:
    """Seconds of one call, the mean over rounds, once all that was asked of the device is done."""
    for timed in (False, True):
        began = time.perf_counter()
        for _ in range(rounds if timed else 3):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / rounds


def run_method(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, score, and time the views of one batch."""
    flags = [
        f"--data={options.data}",
        f"--method={name}",
        f"--encoder={options.encoder}",
        f"--epochs={options.epochs}",
    ]
    flags += [f"--precision={options.precision}", f"--batch-size={options.batch_size}", "--log-every=50"]
    config, _ = parse_run("vision", [*flags, "--augmentation=simclr-cifar", "--checkpoint-every=500", *METHODS[name]])
    run = options.output / name
    trained = pretrain(config, run, resume=True)
    scores = {row.metric: row.values for row in evaluate_images(run, only=("knn", "linear")).rows}
    domain = ImageDomain(config.domain_options, seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = domain.images.read(domain.train_rows[: options.batch_size]).to(device)
    views = seconds_of(lambda: domain.make_views({"image": images}))
    step = trained["seconds"] / trained["steps"]
    return {
        "flags": config.flat() | {"data": Path(options.data).name},
        "training": trained,
        "minutes": round(trained["seconds"] / 60, 2),
        "views_per_second": round(2 * options.batch_size / views),
        "views_share_of_step": round(views / step, 4),
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--note", default="", help="what is particular about the data")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10-resnet18"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/cifar10_resnet18.py --data train.parquet",
        "date": time.strftime("%Y-%m-%d"),
        "data": f"CIFAR-10, last 500 of each class held back. {options.note}".strip(),
        "machine": {"device": device_name(), "torch": torch.__version__},
        "methods": {},
    }
    for name in options.methods:
        result["methods"][name] = run_method(name, options)
        print(
            name,
            {key: result["methods"][name][key] for key in ("minutes", "views_share_of_step", "scores")},
            flush=True,
        )
        options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
