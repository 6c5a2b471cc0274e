"""How long a large folder takes until training could begin.

    python benchmarks/start_up.py --images 100000

Writes so many different JPEGs of 32 x 32 pixels into one folder, flat, and opens it as a run does: with all images
decoded in memory, and left on the disk (where each is looked at, not decoded). Files are in the page cache. The result
goes to ``benchmarks/results/start_up.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cifar10_simclr import processor
from PIL import Image

from contrastive_mm.vision.domain import ImageDomain, VisionConfig

RESULT = Path(__file__).parent / "results" / "start_up.json"


def write_images(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:07}.jpg")


def seconds_to_start(folder: Path, storage: Literal["memory", "disk"]) -> float:
    began = time.perf_counter()
    domain = ImageDomain(VisionConfig(data=str(folder), storage=storage), seed=0)
    next(iter(domain.train_batches()))
    return round(time.perf_counter() - began, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python benchmarks/start_up.py --images {options.images}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "images": options.images,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        result["seconds_to_first_batch"] = {
            "disk": seconds_to_start(Path(folder), "disk"),
            "memory": seconds_to_start(Path(folder), "memory"),
        }
    result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
