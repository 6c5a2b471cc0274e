"""Which part of a data set evaluation holds back."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def split_rows(
    count: int, labels: Int[Tensor, " samples"] | None, share: float
) -> tuple[Int[Tensor, " train"], Int[Tensor, " validation"]]:
    """Hold back the last ``share`` of each class, in the order of the data; nothing that has no label.

    Args:
        count: samples in all.
        labels: their classes, below 0 for a sample without one; None where none has one.
        share: 0 to 1; each class keeps at least one sample for training.

    Returns:
        The numbers of the training and of the validation samples, each in ascending order.
    """
    if labels is None or share == 0:
        return torch.arange(count), torch.arange(0)
    held_back = torch.zeros(count, dtype=torch.bool)
    for label in labels[labels >= 0].unique():
        members = (labels == label).nonzero().flatten()
        kept = max(1, len(members) - round(share * len(members)))
        held_back[members[kept:]] = True
    return (~held_back).nonzero().flatten(), held_back.nonzero().flatten()
