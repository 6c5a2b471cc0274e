"""Random crops from JPEGs on a disk: images a second, beside torchvision's ImageFolder and torch's DataLoader.

    python benchmarks/image_loader.py

Both read the same 1,000 synthetic JPEGs of 500 x 375 pixels (in the page cache after a first pass), decode each once
an epoch and cut one or two random resized crops of 224 x 224 into uint8 batches of 64. The rival is ``ImageFolder``
with ``RandomResizedCrop`` and 2 worker processes that stay between epochs. Rounds alternate; the result goes to
``benchmarks/results/image_loader.json``, or nowhere when the machine is busy (``--force`` writes it all the same).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from cifar10_simclr import processor
from PIL import Image, ImageFilter, __version__
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import contrastive_mm
from contrastive_mm.vision.data.decoding import Crop
from contrastive_mm.vision.data.images import ImageSet
from contrastive_mm.vision.data.loader import CropBatches, CropWorkers
from contrastive_mm.vision.data.sources import find_images

WIDTH, HEIGHT, SIDE, BATCH = 500, 375, 224, 64
BUSY = 0.5
"""Load average above which figures mean nothing."""


class Crops:
    """Several random crops of one image, as users of ImageFolder write it."""

    def __init__(self, views: int) -> None:
        self.views = views
        self.crop = transforms.Compose([transforms.RandomResizedCrop(SIDE), transforms.PILToTensor()])

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        """The crops, each (3, S, S) uint8."""
        return [self.crop(image) for _ in range(self.views)]


def write_photos(folder: Path, count: int) -> None:
    """Pictures with structure at all scales, about as many bytes as photographs have."""
    random = np.random.default_rng(0)
    (folder / "class").mkdir()
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        fine = Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        mixed = Image.blend(coarse, fine.filter(ImageFilter.GaussianBlur(1.5)), 0.3)
        mixed.save(folder / "class" / f"{number:05}.jpg", quality=90)


def ours(folder: Path, workers: int, views: int) -> Callable[[], Iterable[object]]:
    images = ImageSet(find_images(str(folder)), SIDE, memory_limit=0)
    pool = CropWorkers([Crop(SIDE)] * views, workers)
    batches = CropBatches(len(images), BATCH, pool, images.open, lambda i: {"index": i}, images.note_broken)
    return lambda: batches


def theirs(folder: Path, workers: int, views: int) -> Callable[[], Iterable[object]]:
    loader = DataLoader(
        ImageFolder(str(folder), Crops(views)),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    return lambda: loader


def images_per_second(epoch: Iterable[object]) -> float:
    began = time.perf_counter()
    batches = sum(1 for _ in epoch)
    return batches * BATCH / (time.perf_counter() - began)


def measure(folder: Path, rounds: int) -> list[dict[str, object]]:
    cases = [
        (name, workers, views, make(folder, workers, views))
        for views in (1, 2)
        for name, make, workers in (
            ("contrastive_mm", ours, 1),
            ("contrastive_mm", ours, 2),
            ("torchvision ImageFolder + DataLoader", theirs, 2),
        )
    ]
    figures: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for case, (_, _, _, epoch) in enumerate(cases):
            rate = images_per_second(epoch())
            if number:  # the first round starts workers and fills the page cache
                figures[case].append(rate)
    return [
        {
            "loader": name,
            "workers": workers,
            "views": views,
            "images_per_second": rates,
            "median": float(np.median(rates)),
        }
        for (name, workers, views, _), rates in zip(cases, figures, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--force", action="store_true", help="write the result of a busy machine too")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "image_loader.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), options.images)
        rows = measure(Path(folder), options.rounds)
    result = {
        "command": f"python benchmarks/image_loader.py --images {options.images} --rounds {options.rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_before": load},
        "versions": {
            "contrastive_mm": contrastive_mm.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": __version__,
        },
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    if load > BUSY and not options.force:
        print(f"Not written: the load average was {load:.2f} before the start, above {BUSY}.")
        return
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
