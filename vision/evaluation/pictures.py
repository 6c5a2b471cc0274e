"""Pictures of an evaluation: corruption curves and samples, confusion matrix, few-label curve; all as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

from contrastive_mm.report import plain, png
from contrastive_mm.vision.evaluation.corruptions import SEVERITIES, corrupt

COLOURS = ("tab:grey", "tab:orange", "tab:blue")
"""Of the untrained encoder, the raw input and the trained encoder."""
COLUMNS = 3
LONGEST_NAME = 16


def _shortened(name: str) -> str:
    return plain(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…")


def corruption_plot(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Accuracy over severity, a panel a kind of corruption and a line a representation.

    Args:
        curves: by kind and representation, the accuracy at severities 0 to 5.
    """
    rows, columns = -(-len(curves) // COLUMNS), min(COLUMNS, len(curves))
    figure = Figure(figsize=(max(5.8, 1 + 3 * columns), 0.9 + 2.4 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (kind, lines) in zip(panels, curves.items(), strict=False):
        for colour, (name, accuracy) in zip(COLOURS, lines.items(), strict=True):
            axes.plot(range(SEVERITIES + 1), accuracy, marker="o", markersize=3, color=colour, label=plain(name))
        axes.set_title(kind.replace("_", " "), fontsize=10)
        axes.set(xticks=range(SEVERITIES + 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(curves) - columns) : len(curves)]:
        axes.tick_params(labelbottom=True)  # nothing stands below it that has the numbers
    figure.supxlabel("severity (0: clean)", fontsize=10)
    figure.supylabel("accuracy of the linear probe", fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return png(figure)


def corruption_samples(image: UInt8[Tensor, "3 size size"], number: int, kinds: Sequence[str], seed: int) -> bytes:
    """One image under each kind of corruption (a row each) at severities 0 to 5 (a column each).

    Args:
        image: the image.
        number: its number in its data set, on which its noise depends.
        kinds: rows.
        seed: of the noise.
    """
    figure = Figure(figsize=(1.8 + 1.15 * (SEVERITIES + 1), 0.4 + 1.2 * len(kinds)), dpi=110, layout="constrained")
    panels = figure.subplots(len(kinds), SEVERITIES + 1, squeeze=False)
    for kind, row in zip(kinds, panels, strict=True):
        for severity, axes in enumerate(row):
            changed = corrupt(image[None], kind, severity, torch.tensor([number]), seed)[0]
            axes.imshow(changed.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if kind == kinds[0]:
                axes.set_title("clean" if severity == 0 else f"severity {severity}", fontsize=9)
        row[0].set_ylabel(kind.replace("_", "\n"), fontsize=9, rotation=0, ha="right", va="center")
    return png(figure)


def confusion_plot(table: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """Shares of each true class (row) that are taken for each class (column).

    Args:
        table: counts of (true, predicted).
        names: of the classes.
    """
    counts = np.array(table, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.6, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    places, labels = range(len(names)), [_shortened(name) for name in names]
    long = max(len(label) for label in labels) > 4
    axes.set_xticks(
        places, labels, rotation=60 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )
    axes.set_yticks(places, labels)
    axes.set(xlabel="found by the linear probe", ylabel="true class")
    for row, column in np.argwhere(share >= 0.005).tolist():
        colour = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, f"{100 * share[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the true class")
    return png(figure)


def few_label_plot(result: Mapping[str, Any], full: Mapping[str, float] | None) -> bytes:
    """Accuracy over the number of labels: the mean, and beside it each draw; a line a representation.

    Args:
        result: of the few-label protocol.
        full: the accuracy with all labels by representation, where it is known.
    """
    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    counts = list(result["labels"].values())
    for aside, (colour, (name, draws)) in enumerate(zip(COLOURS, result["draws"].items(), strict=True), start=1):
        means = [float(np.mean(values)) for values in draws.values()]
        places = counts
        if full is not None:
            places, means = [*counts, result["all_labels"]], [*means, full[name]]
        axes.plot(places, means, marker="o", markersize=4, color=colour, label=plain(name))
        for count, values in zip(counts, draws.values(), strict=True):
            axes.scatter([count * 1.05**aside] * len(values), values, s=14, color=colour, alpha=0.6, linewidths=0)
    ticks = dict(zip(counts, (f"{count}\n({percent}%)" for percent, count in result["labels"].items()), strict=True))
    if full is not None:
        ticks[result["all_labels"]] = f"{result['all_labels']}\n(all)"
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set(xlabel="labelled images", ylabel="accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)
