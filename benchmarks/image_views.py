"""View making against lightly's: SimCLR's augmentation, one core, batches of 256, side by side in one run.

    pip install lightly
    python benchmarks/image_views.py

Both make two views of each image, with the same operations and the same chances: crop, flip, exact colour jitter,
greyscale, blur where SimCLR has it, and normalisation. Times are medians over rounds; in each round every library
makes its views once, in turn. The result goes to ``benchmarks/results/image_views.json``. With ``--device cuda`` our
views alone are timed, which lightly makes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.functional as TF
from cifar10_simclr import processor
from PIL import Image

from contrastive_mm.vision import ImageViewConfig, ImageViews

BATCH = 256
# Side of the views, side of the images, our augmentation, lightly's strength and chance of blur.
CELLS = (
    (32, 32, "simclr-cifar", 0.5, 0.0),
    (32, 32, "simclr", 1.0, 0.5),
    (96, 96, "simclr-cifar", 0.5, 0.0),
    (96, 96, "simclr", 1.0, 0.5),
    (224, 256, "simclr", 1.0, 0.5),
)


def pictures(count: int, side: int) -> torch.Tensor:
    """Smooth images with some noise, as photographs have it; bytes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = 0.2 * torch.rand(count, 3, side, side, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8)


def our_views(size: int, augmentation: str, images: torch.Tensor) -> Callable[[], Any]:
    maker = ImageViews(size, ImageViewConfig(augmentation))
    return lambda: maker({"image": images})


def lightly_views(size: int, strength: float, blur: float, images: list[Image.Image]) -> Callable[[], Any]:
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=size, cj_strength=strength, gaussian_blur=blur)
    return lambda: [torch.stack(view) for view in zip(*[transform(image) for image in images], strict=True)]


def measure(cell: tuple[int, int, str, float, float], rounds: int, device: str) -> dict[str, Any]:
    """Seconds for two views of a batch, by library."""
    size, side, augmentation, strength, blur = cell
    images = pictures(BATCH, side)
    makers = {"contrastive_mm": our_views(size, augmentation, images.to(device))}
    if device == "cpu":
        makers["lightly"] = lightly_views(size, strength, blur, [TF.to_pil_image(image) for image in images])
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds + 1):
        for name, make in makers.items():
            began = time.perf_counter()
            make()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(of) for name, of in seconds.items()}
    return {
        "size": size,
        "image": side,
        "augmentation": augmentation,
        "blur": blur,
        "seconds": seconds,
        "median": median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "image_views.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": f"python benchmarks/image_views.py --rounds {options.rounds} --device {options.device}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "threads": 1, "device": options.device},
        "versions": {"torch": torch.__version__, "batch": BATCH},
        "cells": [],
    }
    if options.device == "cpu":
        result["versions"]["lightly"] = importlib.metadata.version("lightly")
    else:
        result["machine"]["device"] = torch.cuda.get_device_name(options.device)
    for cell in CELLS:
        row = measure(cell, options.rounds, options.device)
        result["cells"].append(row)
        for name, seconds in row["median"].items():
            ratio = seconds / row["median"]["contrastive_mm"]
            view = 1e6 * seconds / BATCH / 2
            print(f"{row['size']} px, {row['augmentation']}, {name}: {view:.0f} us a view ({ratio:.1f}x)", flush=True)
        options.result.parent.mkdir(exist_ok=True)
        options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
