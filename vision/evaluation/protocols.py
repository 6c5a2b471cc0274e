"""What `contrastive-mm vision evaluate` measures: each protocol scores three representations alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_mm.evaluation import (
    LinearProbe,
    alignment,
    choose_strength,
    clustering_scores,
    default_neighbours,
    draw_share,
    effective_rank,
    extract_features,
    fit_linear_probe,
    knn_accuracy,
    retrieval_scores,
    uniformity,
)
from contrastive_mm.evaluation.linear import STRENGTHS
from contrastive_mm.progress import progress
from contrastive_mm.vision.domain import EVALUATION_BATCH, RAW_SIDE, ImageDomain
from contrastive_mm.vision.evaluation.corruptions import SEVERITIES, corrupt

TEMPERATURE = 0.07
SHARES = (0.01, 0.1)
DRAWS = 5
RECALL_AT = (1, 5, 10)
RESTARTS = 10
GEOMETRY_IMAGES = 2048
MOST_CONFUSED = 25
"""Classes up to which the whole confusion matrix is kept and drawn."""

Result = dict[str, Any]
ByRepresentation = dict[str, Tensor]


class FrozenFeatures:
    """Features of a data set's training and held-back part under several representations, each computed once.

    Args:
        domain: the images, split.
        encoders: representations by name, that of the run last; None stands for raw pixels.
        device: where protocols calculate.
        seed: of all random choices.
    """

    def __init__(
        self, domain: ImageDomain, encoders: Mapping[str, nn.Module | None], device: torch.device, seed: int
    ) -> None:
        self.domain = domain
        self.encoders = encoders
        self.device = device
        self.seed = seed
        self.train_rows = _labelled(domain.train_rows, domain.labels)
        self.held_back_rows = _labelled(domain.validation_rows, domain.labels)

    @property
    def train_labels(self) -> Tensor:
        """Classes of the training part."""
        assert self.domain.labels is not None
        return self.domain.labels[self.train_rows]

    @property
    def held_back_labels(self) -> Tensor:
        """Classes of the held-back part."""
        assert self.domain.labels is not None
        return self.domain.labels[self.held_back_rows]

    @cached_property
    def train(self) -> ByRepresentation:
        """Features of the training part, on the device."""
        return self.encode(self.train_rows, "encode training part")

    @cached_property
    def held_back(self) -> ByRepresentation:
        """Features of the held-back part, on the device."""
        return self.encode(self.held_back_rows, "encode held-back part")

    @cached_property
    def strengths(self) -> dict[str, float]:
        """C of each representation's probe, chosen on a fifth of the training labels."""
        return {name: choose_strength(x, self.train_labels, seed=self.seed) for name, x in self.train.items()}

    @cached_property
    def probes(self) -> dict[str, LinearProbe]:
        """A linear probe of each representation, trained on the training part."""
        labels = self.train_labels
        return {name: fit_linear_probe(x, labels, self.strengths[name]) for name, x in self.train.items()}

    def encode(
        self, rows: Tensor, task: str, change: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> ByRepresentation:
        """Features under each representation, the images read and changed once for all of them.

        Args:
            rows: numbers of the images.
            task: what the progress bar says.
            change: what is done to a batch of images, given their numbers too.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.encoders}
        for chunk in progress(rows.split(EVALUATION_BATCH), desc=task, unit="batch"):
            images = self.domain.images.read(chunk).to(self.device)
            images = images if change is None else change(images, chunk)
            for name, encoder in self.encoders.items():
                parts[name].append(self.domain.represent(encoder, images).cpu())
        return {name: torch.cat(features).to(self.device) for name, features in parts.items()}


def _labelled(rows: Tensor, labels: Tensor | None) -> Tensor:
    """Of these rows, those with a label: -1 stands for none."""
    return rows if labels is None else rows[labels[rows] >= 0]


def score_knn(features: FrozenFeatures) -> Result:
    """Weighted kNN: k = 200 or half of the smallest class, T = 0.07 (Wu et al. 2018)."""
    k = default_neighbours(features.train_labels)
    scores = {
        name: {
            "knn_accuracy": knn_accuracy(
                train, features.train_labels, features.held_back[name], features.held_back_labels, k, TEMPERATURE
            )
        }
        for name, train in features.train.items()
    }
    return {"scores": scores, "neighbours": k}


def score_linear(features: FrozenFeatures) -> Result:
    """Linear probe on all training labels, its penalty chosen on a fifth of them."""
    labels = features.held_back_labels
    scores: dict[str, Any] = {}
    per_class: dict[str, list[float]] = {}
    classes = labels.unique().tolist()
    for name, probe in features.probes.items():
        predicted = probe.predict(features.held_back[name]).cpu()
        right = (predicted == labels).double()
        scores[name] = {"linear_accuracy": float(right.mean())}
        per_class[name] = [float(right[labels == number].mean()) for number in classes]
    result = {"scores": scores, "strength": features.strengths, "classes": classes, "per_class": per_class}
    return result | _confusion(predicted, labels)  # of the last representation, the run's encoder


def _confusion(predicted: Tensor, labels: Tensor) -> Result:
    """Counts of (true, predicted) over all classes that occur among either, where they are few enough to draw."""
    names, numbers = torch.cat([labels, predicted]).unique(return_inverse=True)
    count = len(names)
    if count > MOST_CONFUSED:
        return {}
    true, found = numbers.split(len(labels))
    table = torch.bincount(true * count + found, minlength=count * count).view(count, count)
    return {"confusion_classes": names.tolist(), "confusion": table.tolist()}


def score_few_labels(features: FrozenFeatures) -> Result:
    """The probe (C = 1: there are no labels to choose by) on 1% and 10% of the labels, five draws."""
    labels = features.train_labels
    drawn = {f"{100 * share:g}": draw_share(labels, share, DRAWS, features.seed) for share in SHARES}
    draws: dict[str, dict[str, list[float]]] = {}
    for name, train in features.train.items():
        held_back = features.held_back[name]
        draws[name] = {}
        for percent, draw in drawn.items():
            # Standardised by all training images: those are there without their labels, and few rows vary by chance.
            draws[name][percent] = [
                fit_linear_probe(train[rows.to(features.device)], labels[rows], 1.0, statistics=train).accuracy(
                    held_back, features.held_back_labels
                )
                for rows in progress(draw, desc=f"{percent}% of labels, {name}", unit="draw")
            ]
    scores = {
        name: {f"few_label_accuracy_{percent}_percent": float(np.mean(values)) for percent, values in by.items()}
        for name, by in draws.items()
    }
    spread = {
        name: {
            f"few_label_accuracy_{percent}_percent": float(np.std(values, ddof=1)) for percent, values in by.items()
        }
        for name, by in draws.items()
    }
    counts = {percent: len(draw[0]) for percent, draw in drawn.items()}
    return {"scores": scores, "spread": spread, "draws": draws, "labels": counts, "all_labels": len(labels)}


def score_retrieval(features: FrozenFeatures) -> Result:
    """Held-back images search the training part by cosine; what shares their class is relevant."""
    scores = {}
    for name, gallery in features.train.items():
        found = retrieval_scores(
            features.held_back[name], features.held_back_labels, gallery, features.train_labels, RECALL_AT
        )
        del found["precision_at_1"]  # recall at 1 by another name
        scores[name] = found
    return {"scores": scores}


def score_clustering(features: FrozenFeatures) -> Result:
    """k-means on the held-back part, as many clusters as classes, the best of 10 starts by its own objective."""
    labels = features.held_back_labels
    scores = {
        name: clustering_scores(x, labels, RESTARTS, features.seed)
        for name, x in progress(features.held_back.items(), desc="k-means")
    }
    return {"scores": scores, "clusters": len(labels.unique())}


def score_corruption(features: FrozenFeatures, kind: str) -> Result:
    """The linear probe, trained on clean images, on held-back images under one kind of corruption."""
    labels = features.held_back_labels
    accuracy = {name: [probe.accuracy(features.held_back[name], labels)] for name, probe in features.probes.items()}
    for severity in range(1, SEVERITIES + 1):

        def change(images: Tensor, rows: Tensor, severity: int = severity) -> Tensor:
            return corrupt(images, kind, severity, rows, features.seed)

        corrupted = features.encode(features.held_back_rows, f"{kind} {severity}", change)
        for name, probe in features.probes.items():
            accuracy[name].append(probe.accuracy(corrupted[name], labels))
    scores = {name: {f"{kind}_accuracy": float(np.mean(curve[1:]))} for name, curve in accuracy.items()}
    return {"scores": scores, "accuracy_by_severity": accuracy}


def score_geometry(features: FrozenFeatures) -> Result:
    """Uniformity, effective rank and (where views are plain pairs) alignment of up to 2,048 images."""
    domain = features.domain
    candidates = domain.validation_rows if len(domain.validation_rows) > 1 else domain.train_rows
    spread = np.linspace(0, len(candidates) - 1, min(len(candidates), GEOMETRY_IMAGES)).astype(int)
    rows = candidates[torch.from_numpy(np.unique(spread))]
    scores = {
        name: {"uniformity": uniformity(x), "effective_rank": effective_rank(x)}
        for name, x in features.encode(rows, "encode for geometry").items()
    }
    for name, value in _alignments(features, rows).items():
        scores[name]["alignment"] = value
    return {"scores": scores, "images": len(rows)}


def _alignments(features: FrozenFeatures, rows: Tensor) -> dict[str, float]:
    """Mean squared distance of two views of an image on the sphere; nothing where views don't come in such pairs."""
    domain, total = features.domain, dict.fromkeys(features.encoders, 0.0)
    make_views = copy.deepcopy(domain.make_views)  # its random stream is at its start, and stays there for others
    for chunk in progress(rows.split(EVALUATION_BATCH), desc="alignment", unit="batch"):
        views = make_views({"image": domain.images.read(chunk).to(features.device)})
        if len(views.inputs) < 2 or views.positives is not None:
            return {}
        for name, encoder in features.encoders.items():
            first, second = (_represent_view(domain, encoder, view) for view in views.inputs[:2])
            total[name] += alignment(first, second) * len(chunk)
    return {name: value / len(rows) for name, value in total.items()}


def _represent_view(domain: ImageDomain, encoder: nn.Module | None, view: Any) -> Tensor:
    if encoder is not None:
        return extract_features(encoder, [view])
    side = min(domain.image_size, RAW_SIDE)
    return F.interpolate(view, (side, side), mode="bilinear", antialias=True).flatten(1)


def settings_of(protocol: str, seed: int) -> dict[str, Any]:
    """What a protocol's result depends on, besides the encoders and the data."""
    fixed: dict[str, dict[str, Any]] = {
        "knn": {"neighbours": "200, or half of the smallest class", "temperature": TEMPERATURE},
        "linear": {"strengths": STRENGTHS, "seed": seed},
        "few-labels": {"shares": SHARES, "draws": DRAWS, "strength": 1.0, "seed": seed},
        "retrieval": {"recall_at": RECALL_AT},
        "clustering": {"restarts": RESTARTS, "seed": seed},
        "geometry": {"images": GEOMETRY_IMAGES},
    }
    return fixed.get(protocol, {"severities": SEVERITIES, "strengths": STRENGTHS, "seed": seed})


PROTOCOLS: dict[str, Callable[[FrozenFeatures], Result]] = {
    "knn": score_knn,
    "linear": score_linear,
    "few-labels": score_few_labels,
    "retrieval": score_retrieval,
    "clustering": score_clustering,
    "geometry": score_geometry,
}
"""The protocols with one result each; robustness has one for each kind of corruption."""
