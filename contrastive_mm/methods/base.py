"""What every method is: an encoder to keep, an objective over views, and what follows an optimizer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.errors import UserError
from contrastive_mm.views import Views


@dataclass(frozen=True)
class Objective:
    """What a method computes from views.

    Attributes:
        loss: scalar to minimise.
        metrics: further scalars worth a curve, detached.
        features: the two (N, D) features of each sample that the loss compares, row i with row i. This and what
            follows is for ``contrastive_mm.diagnosis``, which leaves out what a method does not tell.
        negatives: (K, D) negatives from outside the batch (a queue's content), as they were when the loss read
            them: a view of the queue holds other keys after ``after_step``.
        candidates: how many candidates a query chooses its positive from, the positive included. A model that
            tells nothing apart has the loss log(candidates).
        temperature: what the method's ``--temperature`` divides similarities by, where ``candidates`` are told too.
        prototype_use: (K,) mean assignment of the batch to each prototype, with sum 1.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    features: tuple[Tensor, Tensor] | None = None
    negatives: Tensor | None = None
    candidates: int | None = None
    temperature: float | None = None
    prototype_use: Tensor | None = None

    def __post_init__(self) -> None:
        # Methods hand over what they have; a figure for the log must take no part in the gradient.
        if self.features is not None:
            object.__setattr__(self, "features", tuple(features.detach() for features in self.features))


class Method(nn.Module, ABC):
    """A contrastive method around an encoder.

    ``forward`` reads banks and momentum encoders and never writes them; ``after_step``, called once after each
    optimizer step, writes them. Weights, banks and counters are all in ``state_dict``.

    Args:
        encoder: maps one view's inputs to (B, ``encoder.feature_dim``); it is what a user keeps.
        config: the method's options.

    Raises:
        UserError: the encoder has no integer ``feature_dim``.
    """

    config_class: ClassVar[type[Any]]
    encoder: nn.Module

    def __init__(self, encoder: nn.Module, config: Any) -> None:
        super().__init__()
        if not isinstance(getattr(encoder, "feature_dim", None), int):
            raise UserError(
                f"{type(encoder).__name__} has no integer `feature_dim`: set it to the number of columns of the "
                "encoder's output, so that the method can size its head."
            )
        self.encoder = encoder
        self.config = config

    @property
    def feature_dim(self) -> int:
        """Dimensions of the encoder's output."""
        return int(self.encoder.feature_dim)  # type: ignore[arg-type]

    @abstractmethod
    def forward(self, views: Views) -> Objective:
        """Compute the objective of one batch of views."""

    def refuse_single_row(self, views: Views) -> None:
        """For methods that encode each view by itself: in training BatchNorm has nothing to normalise one row by.

        Raises:
            UserError: the batch has one sample, and BatchNorm layers of this method are being trained.
        """
        if views.batch_size != 1 or not self.training:
            return
        if any(isinstance(module, nn.BatchNorm1d) and module.training for module in self.modules()):
            raise UserError(
                f"{type(self).__name__} got a batch of 1 sample, which its BatchNorm layers can't train on: give "
                "batches of at least 2, and leave out a last batch that is smaller."
            )

    def set_num_samples(self, num_samples: int) -> None:
        """Learn how many samples there are to train on, for banks with a slot for each; called before training."""

    def set_total_steps(self, total_steps: int) -> None:
        """Learn how many optimizer steps the run has, for schedules; called once, before the first step."""

    def after_step(self) -> None:
        """Update banks and momentum encoders; call it after the optimizer's step."""


def positive_similarity(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean cosine between the two features of each sample: near 1 the views look alike to the model."""
    return F.cosine_similarity(first.detach().float(), second.detach().float()).mean()
