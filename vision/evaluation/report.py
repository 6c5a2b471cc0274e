"""An evaluation's results as rows of a table and as a page of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from contrastive_mm.report import Page
from contrastive_mm.vision.evaluation.corruptions import KINDS
from contrastive_mm.vision.evaluation.pictures import (
    confusion_plot,
    corruption_plot,
    corruption_samples,
    few_label_plot,
)

CORRUPTION = "corruption:"
"""Before a kind of corruption, the name of its result."""
SHOWN_CLASSES = 8

TITLES = {
    "knn_accuracy": "kNN accuracy (k = {neighbours}, T = 0.07)",
    "linear_accuracy": "linear probe accuracy",
    "few_label_accuracy_1_percent": "few labels: 1% ({labels_1} labels)",
    "few_label_accuracy_10_percent": "few labels: 10% ({labels_10} labels)",
    "mean_average_precision": "retrieval: mAP",
    "recall_at_1": "retrieval: recall@1",
    "recall_at_5": "retrieval: recall@5",
    "recall_at_10": "retrieval: recall@10",
    "clustering_nmi": "clustering: NMI",
    "clustering_ari": "clustering: ARI",
    "clustering_accuracy": "clustering: accuracy ({clusters} clusters)",
    "uniformity": "uniformity (lower: more spread)",
    "effective_rank": "effective rank",
    "alignment": "alignment (lower: views closer)",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        metric: its key in ``evaluation.json``.
        title: what the table calls it.
        values: by representation.
        spread: standard deviation over draws by representation, where there are several.
    """

    metric: str
    title: str
    values: Mapping[str, float]
    spread: Mapping[str, float] | None = None

    def cells(self, representations: Sequence[str]) -> list[str]:
        """Text for a table: the title, then a cell a representation."""
        spread = self.spread
        return [
            self.title,
            *(
                f"{self.values[name]:.3f}" + ("" if spread is None else f" ± {spread[name]:.3f}")
                for name in representations
            ),
        ]


def _kinds(results: Mapping[str, Any]) -> list[str]:
    return [kind for kind in KINDS if CORRUPTION + kind in results]


def table_rows(results: Mapping[str, Any], protocols: Sequence[str]) -> list[Row]:
    """The rows of these protocols, in their order; kinds of corruption end in their mean.

    Args:
        results: by protocol.
        protocols: names of results, which may be missing.
    """
    rows = []
    for name in protocols:
        if name in results and not name.startswith(CORRUPTION):
            rows += _protocol_rows(results[name])
    return rows + _corruption_rows({name: results[name] for name in protocols if name in results})


def _protocol_rows(result: Mapping[str, Any]) -> list[Row]:
    scores, spread = result["scores"], result.get("spread")
    said = {**result, **{f"labels_{percent}": count for percent, count in result.get("labels", {}).items()}}
    return [
        Row(
            metric,
            TITLES[metric].format(**said),
            {name: values[metric] for name, values in scores.items()},
            None if spread is None else {name: values[metric] for name, values in spread.items()},
        )
        for metric in next(iter(scores.values()))
    ]


def _corruption_rows(results: Mapping[str, Any]) -> list[Row]:
    kinds = _kinds(results)
    if not kinds:
        return []
    rows = []
    for kind in kinds:
        scores = results[CORRUPTION + kind]["scores"]
        values = {name: by[f"{kind}_accuracy"] for name, by in scores.items()}
        rows.append(Row(f"{kind}_accuracy", f"corrupted: {kind.replace('_', ' ')}", values))
    mean = {name: float(np.mean([row.values[name] for row in rows])) for name in rows[0].values}
    number = f"{len(kinds)} kind{'s' if len(kinds) > 1 else ''}, severities 1 to 5"
    return [*rows, Row("mean_corruption_accuracy", f"mean corruption accuracy ({number})", mean)]


def add_evaluation(page: Page, results: Mapping[str, Any], names: Sequence[str] | None) -> None:
    """Add the pictures that results allow to a page.

    Args:
        page: the page.
        results: by protocol.
        names: of the classes by number; the numbers themselves where there are none.
    """
    few, linear = results.get("few-labels"), results.get("linear")
    if few:
        full = {name: by["linear_accuracy"] for name, by in linear["scores"].items()} if linear else None
        page.add_picture("Accuracy with few labels (points: draws of the labels)", few_label_plot(few, full))
    if kinds := _kinds(results):
        curves = {kind: results[CORRUPTION + kind]["accuracy_by_severity"] for kind in kinds}
        page.add_picture("Accuracy under corruption", corruption_plot(curves))
    if linear:
        if "confusion" in linear:
            classes = [_class_name(number, names) for number in linear["confusion_classes"]]
            title = "Confusion of the classes by the linear probe on the trained encoder, in percent of a row"
            page.add_picture(title, confusion_plot(linear["confusion"], classes))
        page.add_table("Accuracy of the linear probe by class, worst first", *_class_table(linear, names))


def add_corrupted_sample(page: Page, results: Mapping[str, Any], image: Tensor, number: int, seed: int) -> None:
    """Add a picture of one image under the kinds of corruption that there are results of."""
    if kinds := _kinds(results):
        page.add_picture("What the corruptions look like", corruption_samples(image, number, kinds, seed))


def _class_name(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names is not None and number < len(names) else str(number)


def _class_table(linear: Mapping[str, Any], names: Sequence[str] | None) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a class a row; of many classes the worst and the best under the last representation."""
    accuracy = linear["per_class"]
    representations = list(accuracy)
    order = np.argsort(accuracy[representations[-1]], kind="stable").tolist()
    rows = [
        [
            _class_name(linear["classes"][place], names),
            *(f"{accuracy[name][place]:.3f}" for name in representations),
        ]
        for place in order
    ]
    if len(rows) > 2 * SHOWN_CLASSES + 1:
        left_out = [f"({len(rows) - 2 * SHOWN_CLASSES} more)", *("" for _ in representations)]
        rows = [*rows[:SHOWN_CLASSES], left_out, *rows[-SHOWN_CLASSES:]]
    return ["class", *representations], rows
