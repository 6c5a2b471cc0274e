"""The page and the tables of a transfer to detection or segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive_mm.metrics import read_metrics
from contrastive_mm.report import Page, loss_plot
from contrastive_mm.vision.dense.starts import folder_name, label
from contrastive_mm.vision.dense.tasks import DenseTask


def score_rows(task: DenseTask, result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table with an initialisation a row."""
    headers = ["initialisation", *task.columns, "minutes"]
    rows = [
        [label(start), *(f"{score[name]:.3f}" for name in task.columns), f"{score['seconds'] / 60:.1f}"]
        for start, score in result["scores"].items()
    ]
    return headers, rows


def _class_table(task: DenseTask, result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    scores = {label(start): score[task.by_class] for start, score in result["scores"].items()}
    names = list(next(iter(scores.values())))
    rows = [[name, *(_figure(column[name]) for column in scores.values())] for name in names]
    return ["class", *scores], rows


def _figure(value: float | None) -> str:
    return "none there" if value is None else f"{value:.3f}"


def transfer_page(folder: Path, task: DenseTask, result: Mapping[str, Any], picture: bytes) -> Page:
    """What a transfer found: scores, pictures, losses.

    Args:
        folder: of the trainings.
        task: what was learned.
        result: as in the JSON file.
        picture: of held-back images.
    """
    page = Page(f"{task.title} with {result['encoder']}")
    for start, text in result["began"].items():
        name = label(start)
        page.add_text(f"{name[0].upper()}{name[1:]}: {text}.")
    counts = f"{result['training_images']} images trained on, {result['test_images']} scored"
    options: Mapping[str, Any] = result["options"]
    page.add_text(
        f"{counts}, {result['image_size']} pixels a side, {options['steps']} steps of {options['batch_size']} images. "
        f"BatchNorm of the encoder: {'frozen' if options['freeze'] else options['batch_norm']}."
    )
    page.add_table("Scores after the last step", *score_rows(task, result))
    page.add_picture(task.caption, picture)
    logs = {label(start): folder / folder_name(start) / "metrics.jsonl" for start in result["scores"]}
    page.add_picture("Loss", loss_plot({name: read_metrics(log) for name, log in logs.items()}))
    page.add_table(task.by_class.replace("_", " "), *_class_table(task, result))
    return page
