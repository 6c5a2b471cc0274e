"""Weighted nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError

CHUNK_ROWS = 1024


def knn_accuracy(
    train_features: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test_features: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    neighbours: int = 200,
    temperature: float = 0.07,
) -> float:
    """Accuracy of weighted kNN (Wu et al. 2018, section 3.4): votes weigh exp(cosine / temperature).

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
    if len(train_features) == 0 or len(test_features) == 0:
        raise UserError(
            f"Nearest neighbours need training and test rows, but there are {len(train_features)} and "
            f"{len(test_features)}."
        )
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    bank = F.normalize(train_features, dim=1)
    k = min(neighbours, len(bank))
    right = 0
    # In chunks: the full similarity matrix of a large test set would not fit.
    for rows, labels in zip(test_features.split(CHUNK_ROWS), test_labels.split(CHUNK_ROWS), strict=True):
        similarity, index = (F.normalize(rows, dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, train_labels[index].long(), (similarity / temperature).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test_features)
