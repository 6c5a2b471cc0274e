"""Training from start to finish against lightly: SimCLR, the same encoder, batch and precision, images a second.

    pip install lightly
    python benchmarks/end_to_end.py

Both train SmallConvNet with SimCLR's two-layer head, NT-Xent (T = 0.1) and AdamW on 32 x 32 images with SimCLR's
augmentation for CIFAR, on two threads: contrastive_mm by its Trainer, with log and checkpoint as users have them;
lightly as its documentation shows it, with its own transform and loss and a DataLoader of two workers. Each round runs
both, in turn and each in a process of its own; the first steps, in which workers start, are not counted. It is
done in float32 and in bf16 (autocast, in both). The result goes to ``benchmarks/results/end_to_end.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_simclr import processor
from image_views import pictures
from PIL import Image
from torch import nn

from contrastive_mm import ShuffledBatches, Trainer, TrainerConfig
from contrastive_mm.methods import SimCLR, SimCLRConfig
from contrastive_mm.metrics import read_metrics
from contrastive_mm.training.config import Precision
from contrastive_mm.vision import ImageViewConfig, ImageViews, SmallConvNet

BATCH, UNCOUNTED, RATE = 256, 10, 1e-3
WIDTHS = {"small-conv": 32, "small-conv-16": 16}
PRECISIONS: dict[str, Precision] = {"float32": "no", "bf16": "bf16"}
HEAD = {"hidden_dim": 512, "projection_dim": 128}


def ours(images: torch.Tensor, width: int, precision: str, steps: int) -> float:
    """Images a second of contrastive_mm, from the seconds that its log tells."""
    torch.manual_seed(0)
    method = SimCLR(SmallConvNet(width), SimCLRConfig(temperature=0.1, **HEAD))
    batches = ShuffledBatches(len(images), BATCH, lambda rows: {"image": images[rows]}, prefetch=2)
    config = TrainerConfig(
        steps=steps, learning_rate=RATE, optimizer="adamw", log_every=UNCOUNTED, precision=PRECISIONS[precision]
    )
    with tempfile.TemporaryDirectory() as folder:
        Trainer(method, ImageViews(32, ImageViewConfig("simclr-cifar")), batches, config, folder).train()
        lines = {line["step"]: line["seconds"] for line in read_metrics(Path(folder) / "metrics.jsonl")}
    return BATCH * (steps - UNCOUNTED) / (lines[steps] - lines[UNCOUNTED])


class Pictures(torch.utils.data.Dataset[Any]):
    """Images as lightly's transforms want them."""

    def __init__(self, images: torch.Tensor, transform: Any) -> None:
        self.images = [Image.fromarray(image) for image in np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.transform(self.images[row])


def lightlys(images: torch.Tensor, width: int, precision: str, steps: int) -> float:
    """Images a second of lightly."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    torch.manual_seed(0)
    encoder = SmallConvNet(width)
    head = SimCLRProjectionHead(encoder.feature_dim, HEAD["hidden_dim"], HEAD["projection_dim"])
    model, criterion = nn.Sequential(encoder, head), NTXentLoss(temperature=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    loader = torch.utils.data.DataLoader(
        Pictures(images, transform), BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    done, began = 0, 0.0
    while done < steps:
        for first, second in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                projections = model(first), model(second)
            loss = criterion(*(each.float() for each in projections))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == UNCOUNTED:
                began = time.perf_counter()
            if done == steps:
                break
    return BATCH * (steps - UNCOUNTED) / (time.perf_counter() - began)


LIBRARIES = {"contrastive_mm": ours, "lightly": lightlys}


def in_a_process(library: str, width: int, precision: str, steps: int, threads: int) -> float:
    """Images a second of one run."""
    command = [
        sys.executable,
        __file__,
        "--run",
        library,
        str(width),
        precision,
        "--steps",
        str(steps),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", nargs=3, metavar=("LIBRARY", "WIDTH", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "end_to_end.json")
    options = parser.parse_args()
    if options.run:
        torch.set_num_threads(options.threads)
        library, width, precision = options.run
        print(LIBRARIES[library](pictures(4096, 32), int(width), precision, options.steps))
        return
    result: dict[str, Any] = {
        "command": f"python benchmarks/end_to_end.py --rounds {options.rounds} --steps {options.steps}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "threads": options.threads},
        "versions": {"torch": torch.__version__, "lightly": importlib.metadata.version("lightly")},
        "setting": {"batch": BATCH, "image": 32},
        "cells": {},
    }
    for (encoder, width), precision in itertools.product(WIDTHS.items(), PRECISIONS):
        rates: dict[str, list[float]] = {name: [] for name in LIBRARIES}
        for _ in range(options.rounds):
            for name, found in rates.items():
                found.append(in_a_process(name, width, precision, options.steps, options.threads))
        median = {name: statistics.median(found) for name, found in rates.items()}
        ratio = median["contrastive_mm"] / median["lightly"]
        cell = f"{encoder}, {precision}"
        result["cells"][cell] = {"images_per_second": rates, "median": median, "ratio": ratio}
        print(cell, {name: round(rate) for name, rate in median.items()}, f"ratio {ratio:.2f}", flush=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
