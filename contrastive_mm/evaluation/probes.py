"""Linear models on frozen features, with scikit-learn and settings that no test label chooses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from contrastive_mm.errors import UserError


def _fit_logistic(features: NDArray[Any], labels: NDArray[Any]) -> LogisticRegression:
    """Logistic regression of at most 300 iterations; stopping there is part of the protocol, and no cause to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A tolerance above the default's: the last digits of the weights change no prediction, and take longest.
        return LogisticRegression(C=1.0, max_iter=300, tol=1e-3).fit(features, labels)


def _check_classes(train_labels: Int[Tensor, " train"], test_labels: Int[Tensor, " test"]) -> None:
    classes = len(train_labels.unique())
    if classes < 2 or len(test_labels) == 0:
        raise UserError(
            f"A linear probe needs training rows of at least 2 classes and a test row, but there are "
            f"{len(train_labels)} training rows of {classes} classes and {len(test_labels)} test rows."
        )


def linear_probe_accuracy(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
) -> float:
    """Accuracy of a logistic regression (standardised features, C = 1) trained on frozen features, 0 to 1.

    Raises:
        UserError: the training rows are not of two classes at least, or there are no test rows.
    """
    _check_classes(train_labels, test_labels)
    scaler = StandardScaler().fit(train_features.numpy())
    model = _fit_logistic(scaler.transform(train_features.numpy()), train_labels.numpy())
    return float(model.score(scaler.transform(test_features.numpy()), test_labels.numpy()))


def few_label_accuracy(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    per_class: int,
    draws: int = 20,
    seed: int = 0,
) -> float:
    """Accuracy of the linear probe with a few labels a class, the mean over random draws of the labels.

    Args:
        train_features: features to draw from.
        train_labels: their classes.
        test_features: features to classify.
        test_labels: their classes.
        per_class: labels drawn for each class.
        draws: how many times to draw.
        seed: of the draws; the same seed draws the same samples for every encoder, so encoders are paired.

    Returns:
        Mean share of test rows classified rightly, 0 to 1.

    Raises:
        UserError: a class has fewer than ``per_class`` samples, the training rows are not of two classes at least,
            or there are no test rows.
    """
    _check_classes(train_labels, test_labels)
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(train_labels == label).flatten() for label in train_labels.unique()]
    smallest = min(len(rows) for rows in members)
    if smallest < per_class:
        raise UserError(f"{per_class} labels a class were asked for, but one class has {smallest} samples.")
    scores = []
    for _ in range(draws):
        drawn = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:per_class]] for rows in members])
        # Scale by all training features: they are there without labels, and few rows give poor statistics.
        mean, scale = train_features.mean(0), train_features.std(0).clamp_min(1e-6)
        model = _fit_logistic(((train_features[drawn] - mean) / scale).numpy(), train_labels[drawn].numpy())
        scores.append(model.score(((test_features - mean) / scale).numpy(), test_labels.numpy()))
    return float(np.mean(scores))


def draw_share(
    labels: Int[Tensor, " samples"], share: float, draws: int, seed: int = 0
) -> list[Int[Tensor, " drawn"]]:
    """Random rows that keep their labels, the same share of each class, at least one row of each.

    Args:
        labels: classes of the rows to draw from.
        share: 0 to 1; a class of n rows keeps ``share * n``, rounded half up.
        draws: how many times to draw.
        seed: of the draws; the same seed draws the same rows, so encoders that are compared are paired.

    Returns:
        The numbers of the rows of each draw, in ascending order.

    Raises:
        UserError: a share outside of (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"A share of {share} of the labels; it must lie in (0, 1].")
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels.cpu() == label).flatten() for label in labels.cpu().unique()]
    counts = [max(1, math.floor(share * len(rows) + 0.5)) for rows in members]
    return [
        torch.cat(
            [
                rows[torch.randperm(len(rows), generator=generator)[:count]]
                for rows, count in zip(members, counts, strict=True)
            ]
        )
        .sort()
        .values
        for _ in range(draws)
    ]


def ridge_r2(
    train_features: Float[Tensor, "train dim"],
    train_targets: Float[Tensor, "train targets"],
    test_features: Float[Tensor, "test dim"],
    test_targets: Float[Tensor, "test targets"],
    labelled: int = 200,
    draws: int = 10,
    seed: int = 0,
) -> list[float]:
    """Share of each target's variance that a ridge regression on a few labelled rows explains (R squared).

    The penalty is chosen among powers of ten by leave-one-out on the labelled rows alone.

    Args:
        train_features: features to draw labelled rows from.
        train_targets: their true values.
        test_features: features to predict from.
        test_targets: their true values.
        labelled: rows drawn; all where there are fewer.
        draws: how many times to draw.
        seed: of the draws; the same seed draws the same rows for every encoder, so encoders are paired.

    Returns:
        One R squared a target, the mean over draws: 1 is perfect, 0 no better than the mean, below 0 worse. NaN for
        a target that never varies in the test rows: it has no variance to explain.

    Raises:
        UserError: fewer than two training or two test rows, or ``labelled`` below 2.
    """
    for name, rows in (("training", len(train_features)), ("test", len(test_features)), ("labelled", labelled)):
        if rows < 2:
            raise UserError(f"R squared needs at least 2 {name} rows, but there are {rows}.")
    generator = torch.Generator().manual_seed(seed)
    # One scale for all dimensions: scaling each by itself would blow up pixels that hardly ever change.
    centre = train_features.mean(0)
    scale = (train_features - centre).square().mean().sqrt().clamp_min(1e-12)
    train, test = ((features - centre) / scale for features in (train_features, test_features))
    known, true = _standardised(train_targets, test_targets)
    total = (true - true.mean(0)).square().sum(0)
    total[test_targets.amax(0) == test_targets.amin(0)] = torch.nan
    scores = []
    for _ in range(draws):
        drawn = torch.randperm(len(train), generator=generator)[:labelled]
        model = RidgeCV(alphas=np.logspace(-3, 4, 8)).fit(train[drawn].numpy(), known[drawn].float().numpy())
        predicted = torch.from_numpy(model.predict(test.numpy())).reshape(true.shape).double()
        scores.append(1 - (true - predicted).square().sum(0) / total)
    return [float(value) for value in torch.stack(scores).mean(0)]


def _standardised(
    train: Float[Tensor, "train targets"], test: Float[Tensor, "test targets"]
) -> tuple[Float[Tensor, "train targets"], Float[Tensor, "test targets"]]:
    """Both in the training part's standard deviations from its mean, in float64: small targets count like large."""
    mean, deviation = train.double().mean(0), train.double().std(0)
    deviation[train.amax(0) == train.amin(0)] = 1.0
    return (train.double() - mean) / deviation, (test.double() - mean) / deviation
