"""Weighted nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError

CHUNK_ROWS = 1024
MOST_NEIGHBOURS = 200


def default_neighbours(train_labels: Int[Tensor, " train"]) -> int:
    """The protocol's k: 200 (Wu et al. 2018), or half of the smallest class where that is less, at least 1.

    Only classes that are there count: numbers may have gaps, where a class of the data set has no sample.
    """
    smallest = int(train_labels.unique(return_counts=True)[1].min())
    return min(MOST_NEIGHBOURS, max(1, smallest // 2))


def knn_predict(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    neighbours: int = MOST_NEIGHBOURS,
    temperature: float = 0.07,
) -> Int[Tensor, " test"]:
    """Classes by weighted kNN (Wu et al. 2018, section 3.4): votes weigh exp(cosine / temperature).

    Exact, on the device that the features are on, in chunks of 1,024 test rows.

    Args:
        train_features: features that vote.
        train_labels: their classes, 0..C-1.
        test_features: features to classify.
        neighbours: k; at most the number of training rows are used.
        temperature: of the votes' weights.

    Returns:
        A class for each test row, on the features' device.

    Raises:
        UserError: there are no training or no test rows.
    """
    if len(train_features) == 0 or len(test_features) == 0:
        raise UserError(
            f"Nearest neighbours need training and test rows, but there are {len(train_features)} and "
            f"{len(test_features)}."
        )
    bank, labels = F.normalize(train_features, dim=1), train_labels.long().to(train_features.device)
    classes, k = int(labels.max()) + 1, min(neighbours, len(bank))
    predicted = []
    # In chunks: the full similarity matrix of a large test set would not fit.
    for rows in test_features.split(CHUNK_ROWS):
        similarity, index = (F.normalize(rows, dim=1) @ bank.T).topk(k, dim=1)
        # Weights relative to the nearest neighbour's: the same order, and no overflow at a low temperature.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=rows.device, dtype=weight.dtype)
        predicted.append(votes.scatter_add_(1, labels[index], weight).argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    neighbours: int = MOST_NEIGHBOURS,
    temperature: float = 0.07,
) -> float:
    """Accuracy of ``knn_predict``.

    Args:
        train_features: features that vote.
        train_labels: their classes, 0..C-1.
        test_features: features to classify.
        test_labels: their classes.
        neighbours: k; at most the number of training rows are used.
        temperature: of the votes' weights.

    Returns:
        Share of test rows classified rightly, 0 to 1.

    Raises:
        UserError: there are no training or no test rows.
    """
    predicted = knn_predict(train_features, train_labels, test_features, neighbours, temperature)
    return float((predicted == test_labels.to(predicted.device)).double().mean())
