"""SimCLR v2's three stages as a table and as a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

HEADLINE = "Held-back accuracy with few labels"
COLOURS = {
    "from scratch": "0.75",
    "linear probe": "tab:cyan",
    "fine-tuned": "tab:blue",
    "distilled into itself": "tab:orange",
    "student from scratch": "0.55",
    "distilled into the student": "tab:red",
}


def _shares(results: Sequence[dict[str, Any]]) -> list[str]:
    return list(results[0]["labels"])


def accuracies(results: Sequence[dict[str, Any]], share: str, stage: str) -> list[float]:
    """A stage's held-back accuracy with each seed."""
    return [result["labels"][share]["scores"][stage]["accuracy"] for result in results]


def _stages(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The stages in their order, with the parameters of each."""
    scores = results[0]["labels"][_shares(results)[0]]["scores"]
    return {stage: int(score["parameters"]) for stage, score in scores.items()}


def stage_rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a stage a row, a share of labels a column; mean and standard deviation over seeds."""
    shares = _shares(results)
    counts = [results[0]["labels"][share]["labelled_images"] for share in shares]
    headers = ["classifier", "parameters"]
    headers += [f"{_percent(share)} of labels ({count:,})" for share, count in zip(shares, counts, strict=True)]
    rows = [
        [stage, f"{parameters:,}", *(_spread(accuracies(results, share, stage)) for share in shares)]
        for stage, parameters in _stages(results).items()
    ]
    return headers, rows


def _percent(share: str) -> str:
    return f"{100 * float(share):.3g}%"


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def note(results: Sequence[dict[str, Any]], encoder: str, student: str | None) -> str:
    """What the figures are."""
    spread = "Of one seed." if len(results) == 1 else f"Mean and standard deviation over {len(results)} seeds."
    smaller = f" The student is {student}." if student is not None else ""
    return (
        f"Accuracy after the last epoch on images held back from every stage. {spread} The encoder is {encoder}: "
        f"pretrained without labels, then fine-tuned with its linear layer; distillation sees all training images, "
        f"and the teacher's predictions for them.{smaller}"
    )


def stage_plot(results: Sequence[dict[str, Any]]) -> bytes:
    """A group of bars for each share of labels, a bar for each stage, as PNG; whiskers are standard deviations."""
    shares, stages = _shares(results), list(_stages(results))
    figure = Figure(figsize=(3 + 2.6 * len(shares), 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(stages)
    for number, stage in enumerate(stages):
        values = [accuracies(results, share, stage) for share in shares]
        places = [group + (number - (len(stages) - 1) / 2) * width for group in range(len(shares))]
        deviations = [statistics.stdev(each) for each in values] if len(results) > 1 else None
        means = [statistics.mean(each) for each in values]
        axes.bar(places, means, width, yerr=deviations, capsize=3, color=COLOURS[stage], label=stage)
    axes.set(ylabel="held-back accuracy", ylim=(0.0, 1.0))
    axes.set_xticks(range(len(shares)), [f"{_percent(share)} of the labels" for share in shares])
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
