"""SimCLR with a small encoder on CIFAR-10, on a CPU: kNN accuracy beside the untrained encoder and raw pixels.

    python benchmarks/cifar10_simclr.py --data train.parquet --epochs 12

``train.parquet`` holds CIFAR-10's training split with the columns ``image`` and ``label``; the last 500 images of
each class are held back for evaluation. Without ``--data`` torchvision downloads the original. The result goes to
``benchmarks/results/cifar10_simclr.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import contrastive_mm
from contrastive_mm.configuration import parse_run
from contrastive_mm.metrics import read_metrics
from contrastive_mm.runs import METRICS_FILE, evaluate_run, pretrain


def processor() -> str:
    """The processor's name, with the feature that decides how fast bf16 is."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    fast = [feature for feature in ("amx_bf16", "avx512_bf16") if feature in text]
    return f"{name} ({', '.join(fast) or 'no fast bf16'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--note", default="", help="what is particular about the data")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10-simclr"))
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "cifar10_simclr.json")
    options = parser.parse_args()
    flags = [f"--data={options.data}", f"--epochs={options.epochs}", f"--precision={options.precision}"]
    config, _ = parse_run("vision", ["--config=cifar10-simclr", *flags])
    trained = pretrain(config, options.output, overwrite=True)
    began = time.perf_counter()
    scores = evaluate_run(options.output)
    recipe = config.flat() | {"data": Path(options.data).name}
    result = {
        "command": f"python benchmarks/cifar10_simclr.py --data {Path(options.data).name} {' '.join(flags[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "data": f"CIFAR-10, last 500 of each class held back. {options.note}".strip(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "version": contrastive_mm.__version__,
        "recipe": recipe,
        "training": trained,
        "evaluation_seconds": time.perf_counter() - began,
        "scores": scores,
        "metrics": read_metrics(options.output / METRICS_FILE)[::10],
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
