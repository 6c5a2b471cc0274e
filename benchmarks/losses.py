"""Exact losses against rivals: time and extra memory of forward plus backward on a CPU, side by side in one run.

    pip install lightly pytorch-metric-learning sentence-transformers open_clip_torch
    python benchmarks/losses.py

Times are medians over rounds; in each round every loss runs once, in turn: a machine that slows down slows all.
Memory is the peak resident size of a process of its own over its size with the inputs made. Rivals that are not
installed are left out and named. The result goes to ``benchmarks/results/losses.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar10_simclr import processor
from torch import Tensor

from contrastive_mm.losses import info_nce, nt_xent

DIM, TEMPERATURE, QUEUE = 128, 0.1, 65_536
RIVALS = ("lightly", "pytorch-metric-learning", "sentence-transformers", "open_clip_torch")
OURS = "contrastive_mm"

# Where a loss is left out above a number of samples: it would not fit, or take hours.
MOST = {"pytorch-metric-learning": 128, "plain": 8192, "plain, compiled": 8192, "lightly": 8192}
SIZES = {
    "NT-Xent, 2N views": (128, 512, 2048, 8192, 32_768),
    "InfoNCE both ways (CLIP)": (2048, 8192),
    "InfoNCE one way": (2048, 8192),
    f"InfoNCE, queue of {QUEUE}": (256, 1024),
}


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    features = F.normalize(torch.cat([first, second]), dim=1)
    logits = features @ features.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(logits)).roll(len(first)))


def plain_clip(first: Tensor, second: Tensor) -> Tensor:
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / TEMPERATURE
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def plain_one_way(first: Tensor, second: Tensor) -> Tensor:
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits)))


def plain_queue(first: Tensor, second: Tensor, queue: Tensor) -> Tensor:
    query, key = F.normalize(first, dim=1), F.normalize(second, dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def our_queue(first: Tensor, second: Tensor, queue: Tensor) -> Tensor:
    """As ``methods.MoCo`` calls it: the queue holds unit features already."""
    query, key = F.normalize(first, dim=1), F.normalize(second, dim=1)
    return info_nce(query, key, queue, TEMPERATURE, similarity="dot", in_batch_negatives=False)


def lightly_loss(queue: Tensor | None = None) -> Callable[..., Tensor]:
    from lightly.loss import NTXentLoss

    if queue is None:
        loss = NTXentLoss(temperature=TEMPERATURE)
        return lambda first, second: loss(first, second)
    banked = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(len(queue), DIM))
    banked.memory_bank(torch.zeros(1, DIM), update=False)
    banked.memory_bank.bank = queue.clone()
    return lambda first, second, _: banked(first, second.detach())


def metric_learning_loss() -> Callable[..., Tensor]:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda first, second: loss(torch.cat([first, second]), torch.arange(len(first)).repeat(2))


def sentence_transformers_loss(cached: bool) -> Callable[..., Tensor]:
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError:  # before version 6
        from sentence_transformers import losses

    if not cached:
        plain = losses.MultipleNegativesRankingLoss(None, scale=1 / TEMPERATURE)
        return lambda first, second: plain.compute_loss_from_embeddings([first, second], None)
    chunked = losses.CachedMultipleNegativesRankingLoss(
        [torch.nn.Identity()], scale=1 / TEMPERATURE, mini_batch_size=256
    )

    def run(first: Tensor, second: Tensor) -> Tensor:
        # What it does with the embeddings; the model's own second pass is not a part of the loss.
        return chunked.calculate_loss([[first], [second]], with_backward=True)

    return run


def open_clip_loss() -> Callable[..., Tensor]:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda first, second: loss(F.normalize(first, dim=1), F.normalize(second, dim=1), 1 / TEMPERATURE)


def candidates(group: str, queue: Tensor | None) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Losses of a group by name; each is built only where it is wanted."""
    if group.startswith("NT-Xent"):
        return {
            OURS: lambda: lambda a, b: nt_xent(a, b, TEMPERATURE),
            "plain": lambda: plain_nt_xent,
            "plain, compiled": lambda: torch.compile(plain_nt_xent, dynamic=False),
            "lightly": lightly_loss,
            "pytorch-metric-learning": metric_learning_loss,
        }
    if "both ways" in group:
        return {
            OURS: lambda: lambda a, b: info_nce(a, b, temperature=TEMPERATURE, symmetric=True),
            "plain": lambda: plain_clip,
            "open_clip": open_clip_loss,
        }
    if "one way" in group:
        return {
            OURS: lambda: lambda a, b: info_nce(a, b, temperature=TEMPERATURE),
            "plain": lambda: plain_one_way,
            "sentence-transformers": lambda: sentence_transformers_loss(cached=False),
            "sentence-transformers, cached": lambda: sentence_transformers_loss(cached=True),
        }
    return {OURS: lambda: our_queue, "plain": lambda: plain_queue, "lightly": lambda: lightly_loss(queue)}


def make_inputs(group: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(count, DIM, generator=generator) for _ in range(2)]
    if "queue" in group:
        inputs.append(F.normalize(torch.randn(QUEUE, DIM, generator=generator), dim=1))
    return inputs


def forward_and_backward(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    value = loss(*leaves, *inputs[2:])
    if leaves[0].grad is None:
        value.backward()
    assert leaves[0].grad is not None
    return float(value.detach()), leaves[0].grad


def build(group: str, count: int, inputs: list[Tensor]) -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    built, missing = {}, []
    for name, make in candidates(group, inputs[2] if len(inputs) > 2 else None).items():
        if count <= MOST.get(name, sys.maxsize):
            try:
                built[name] = make()
            except ImportError:
                missing.append(name)
    return built, missing


def measure_time(group: str, count: int, rounds: int) -> dict[str, Any]:
    inputs = make_inputs(group, count)
    losses, missing = build(group, count, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    values, gradients = {}, {}
    for name, loss in losses.items():  # the warm-up, which also compiles
        values[name], gradients[name] = forward_and_backward(loss, inputs)
    for _ in range(rounds):
        for name, loss in losses.items():
            began = time.perf_counter()
            forward_and_backward(loss, inputs)
            seconds[name].append(time.perf_counter() - began)
    largest = gradients[OURS].abs().max()
    return {
        "seconds": seconds,
        "median": {name: statistics.median(of) for name, of in seconds.items()},
        "value": values,
        "gradient_difference": {n: float((g - gradients[OURS]).abs().max() / largest) for n, g in gradients.items()},
        "missing": missing,
    }


def peak_memory(group: str, count: int, name: str) -> float | None:
    """MiB beyond the inputs at the peak of forward plus backward, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", group, str(count), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_memory(group: str, count: int, name: str) -> None:
    torch.set_num_threads(1)
    inputs = make_inputs(group, count)
    loss = candidates(group, inputs[2] if len(inputs) > 2 else None)[name]()
    if "compiled" in name:
        loss(*[x.clone().requires_grad_() for x in inputs[:2]]).backward()  # the compiler's own memory is no loss's
        print(torch_peak(lambda: forward_and_backward(loss, inputs)))
        return
    forward_and_backward(loss, [inputs[0][:300], inputs[1][:300], *inputs[2:]])
    print(torch_peak(lambda: forward_and_backward(loss, inputs)))


def torch_peak(run: Callable[[], Any]) -> float:
    """Peak resident MiB while ``run`` works, over the size before it."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - before) / 2**20


def half_precision_errors(count: int = 2048) -> dict[str, float]:
    """Error of each loss on bf16 features against float64 of the same features."""
    first, second = (x.bfloat16() for x in make_inputs("NT-Xent", count))
    exact = float(plain_nt_xent(first.double(), second.double()))
    errors = {}
    for name, loss in build("NT-Xent", count, [])[0].items():
        if "compiled" not in name:
            errors[name] = abs(float(loss(first, second)) - exact)
    return errors


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", *RIVALS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", nargs=3, metavar=("GROUP", "N", "LOSS"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "losses.json")
    options = parser.parse_args()
    if options.memory_of:
        print_memory(options.memory_of[0], int(options.memory_of[1]), options.memory_of[2])
        return
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": f"python benchmarks/losses.py --rounds {options.rounds} --threads {options.threads}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "threads": options.threads},
        "versions": versions(),
        "setting": {"dim": DIM, "temperature": TEMPERATURE, "dtype": "float32"},
        "bf16_error": half_precision_errors(),
        "cells": [],
    }
    for group, sizes in SIZES.items():
        for count in sizes:
            rounds = options.rounds if count <= 2048 else max(1, options.rounds // 2)
            cell = {"group": group, "samples": count, **measure_time(group, count, rounds)}
            cell["peak_mib"] = {name: peak_memory(group, count, name) for name in cell["median"]}
            result["cells"].append(cell)
            ours = cell["median"][OURS]
            for name, seconds in cell["median"].items():
                memory = cell["peak_mib"][name]
                shown = "" if memory is None else f"{memory:9.1f} MiB"
                print(f"{group} N={count} {name}: {1e3 * seconds:.1f} ms ({seconds / ours:.2f}x) {shown}", flush=True)
            options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["bf16_error"]))


if __name__ == "__main__":
    main()
