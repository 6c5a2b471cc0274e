"""Linear models on frozen features, with scikit-learn and settings that no test label chooses."""

from __future__ import annotations

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


def linear_probe_accuracy(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
) -> float:
    """Accuracy of a logistic regression (standardised features, C = 1) trained on frozen features, 0 to 1."""
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
        UserError: a class has fewer than ``per_class`` samples.
    """
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
        One R squared a target, the mean over draws: 1 is perfect, 0 no better than the mean, below 0 worse.
    """
    generator = torch.Generator().manual_seed(seed)
    # One scale for all dimensions: scaling each by itself would blow up pixels that hardly ever change.
    centre = train_features.mean(0)
    scale = (train_features - centre).square().mean().sqrt().clamp_min(1e-12)
    mean, deviation = train_targets.mean(0), train_targets.std(0).clamp_min(1e-12)
    scores = []
    for _ in range(draws):
        drawn = torch.randperm(len(train_features), generator=generator)[:labelled]
        model = RidgeCV(alphas=np.logspace(-3, 4, 8))
        model.fit(
            ((train_features[drawn] - centre) / scale).numpy(),
            ((train_targets[drawn] - mean) / deviation).numpy(),
        )
        predicted = torch.from_numpy(model.predict(((test_features - centre) / scale).numpy()))
        predicted = predicted.reshape(test_targets.shape).float() * deviation + mean
        residual = ((test_targets - predicted) ** 2).sum(0)
        scores.append(1 - residual / ((test_targets - test_targets.mean(0)) ** 2).sum(0).clamp_min(1e-12))
    return [float(value) for value in torch.stack(scores).mean(0)]
