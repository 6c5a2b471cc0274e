"""The labelled share of a data set: drawn class by class, and the only labels that training on it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.errors import UserError

UNLABELLED = -1
"""Stands in a batch's ``label`` for an image that has none."""


@dataclass(frozen=True)
class Labelled:
    """The images whose labels may be used.

    Attributes:
        rows: (N,) their numbers in the data set.
        labels: (N,) their classes.
        num_classes: of the data set.
    """

    rows: Tensor
    labels: Tensor
    num_classes: int


def draw_labelled(
    labels: Int[Tensor, " images"] | None,
    rows: Int[Tensor, " train"],
    share: float,
    seed: int,
    num_classes: int | None = None,
) -> Labelled:
    """Draw a share of each class at random; every class keeps at least one image.

    The same seed draws the same images for every encoder, so comparisons are paired, and a smaller share's images
    are among a larger share's.

    Args:
        labels: class of each image of the data set; below 0 where it is not known.
        rows: the images to draw from.
        share: of each class, above 0 and at most 1.
        seed: of the draw.
        num_classes: of the data set; by default up to the largest that was drawn.

    Raises:
        UserError: no labels, labels of one class only, or a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"--labels {share}; a share of labels lies above 0 and goes up to 1 (0.01 is one per cent).")
    classes = [] if labels is None else [int(c) for c in labels[rows].unique() if c >= 0]
    if labels is None or len(classes) < 2:
        raise UserError(
            f"Fine-tuning needs labels of at least 2 classes, and the training images have {len(classes)}: give "
            "--data with labels, such as one folder a class."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in classes:
        members = rows[labels[rows] == label]
        order = torch.randperm(len(members), generator=generator)
        drawn.append(members[order[: max(1, round(share * len(members)))]])
    chosen = torch.cat(drawn).sort().values
    return Labelled(chosen, labels[chosen], num_classes or classes[-1] + 1)


def labelled_batches(
    labelled: Labelled, read: Callable[[Tensor], Tensor], batch_size: int, seed: int
) -> ShuffledBatches:
    """Batches of ``image`` and ``label`` of the labelled images alone, of at most ``batch_size``.

    Raises:
        UserError: there is only one labelled image.
    """

    def load(indices: Tensor) -> dict[str, Tensor]:
        return {"image": read(labelled.rows[indices]), "label": labelled.labels[indices]}

    return ShuffledBatches(len(labelled.rows), min(batch_size, len(labelled.rows)), load, seed, prefetch=2)


def partly_labelled_batches(
    labelled: Labelled, rows: Int[Tensor, " train"], read: Callable[[Tensor], Tensor], batch_size: int, seed: int
) -> ShuffledBatches:
    """Batches of ``image`` and ``label`` of all ``rows``; ``label`` is -1 for those that are not labelled.

    Raises:
        UserError: ``batch_size`` is below 2.
    """
    labels = torch.full((int(torch.cat([rows, labelled.rows]).max()) + 1,), UNLABELLED)
    labels[labelled.rows] = labelled.labels

    def load(indices: Tensor) -> dict[str, Tensor]:
        return {"image": read(rows[indices]), "label": labels[rows[indices]]}

    return ShuffledBatches(len(rows), min(batch_size, len(rows)), load, seed, prefetch=2)
