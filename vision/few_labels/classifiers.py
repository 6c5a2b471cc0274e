"""An encoder with a linear layer on top, and what share of the held-back images it classifies rightly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import extract_features, linear_probe_accuracy
from contrastive_mm.vision.few_labels.labelled import Labelled

if TYPE_CHECKING:
    from contrastive_mm.vision.domain import ImageDomain

EVALUATION_BATCH = 256


class Classifier(nn.Module):
    """Encoder, kept layers of a projection head (none, mostly), linear layer.

    Args:
        encoder: maps images to (B, ``encoder.feature_dim``).
        num_classes: outputs of the new linear layer.
        head: layers between the two, such as the first of SimCLR v2's projection head.
        head_dim: columns of ``head``'s output; needed where there is one.

    Shapes:
        (B, 3, H, W) -> (B, num_classes), unnormalised.
    """

    def __init__(
        self, encoder: nn.Module, num_classes: int, head: nn.Module | None = None, head_dim: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head if head is not None else nn.Identity()
        width = head_dim if head is not None else encoder.feature_dim
        self.linear = nn.Linear(int(width), num_classes)  # type: ignore[arg-type]

    def forward(self, images: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """A score for each class."""
        return self.linear(self.head(self.encoder(images)))


def count_parameters(module: nn.Module) -> int:
    """Weights and biases, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def image_outputs(
    module: nn.Module, domain: ImageDomain, rows: Int[Tensor, " images"]
) -> Float[Tensor, "images outputs"]:
    """What a module, in eval mode, says of whole images."""
    chunks = rows.split(EVALUATION_BATCH)
    return extract_features(module, (domain.make_views.plain(domain.images.read(chunk)) for chunk in chunks))


def held_back(domain: ImageDomain) -> tuple[Int[Tensor, " images"], Int[Tensor, " images"]]:
    """Numbers and classes of the held-back images whose class is known.

    Raises:
        UserError: there are none.
    """
    labels, rows = domain.labels, domain.validation_rows
    rows = rows if labels is None else rows[labels[rows] >= 0]
    if labels is None or len(rows) == 0:
        raise UserError(
            "No labelled image is held back from training, so nothing tells how good a classifier is: give --data "
            "with labels, and pretrain with --validation-share above 0."
        )
    return rows, labels[rows]


def held_back_accuracy(classifier: nn.Module, domain: ImageDomain) -> float:
    """Share of the held-back images that a classifier gives its highest score to the right class of.

    Raises:
        UserError: as ``held_back``.
    """
    rows, labels = held_back(domain)
    return float((image_outputs(classifier, domain, rows).argmax(dim=1) == labels).double().mean())


def probe_accuracy(encoder: nn.Module, domain: ImageDomain, labelled: Labelled) -> float:
    """Held-back accuracy of a logistic regression on frozen features of the labelled images alone.

    Raises:
        UserError: as ``held_back``.
    """
    rows, labels = held_back(domain)
    features = image_outputs(encoder, domain, torch.cat([labelled.rows, rows]))
    train, test = features.split([len(labelled.rows), len(rows)])
    return linear_probe_accuracy(train, labelled.labels, test, labels)
