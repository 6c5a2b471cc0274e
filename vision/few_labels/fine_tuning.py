"""Supervised fine-tuning, as a method: the Trainer's schedule, log, checkpoints and exact resume come with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.training import TrainerConfig
from contrastive_mm.views import Views
from contrastive_mm.vision.few_labels.classifiers import Classifier
from contrastive_mm.vision.views.augment import ImageViews
from contrastive_mm.vision.views.presets import Normalisation, Preset, Recipe


@dataclass(frozen=True)
class FineTuningConfig(MethodOptions):
    """Fine-tuning on the labelled images; fixed before any held-back image is looked at."""

    epochs: int = 60
    """Passes over the labelled images (SimCLR v2: 60 with 1% of the labels, 30 with 10% and more)."""
    batch_size: int = 64
    """Images a step; all labelled ones where there are fewer."""
    learning_rate: float = 1e-3
    """Peak of the schedule, from which a cosine goes down to 0; there is no warm-up."""
    scratch_learning_rate: float = 3e-3
    """The same for training from scratch, to which a larger one is kind: random weights have nothing to lose."""
    weight_decay: float = 0.0
    """None in SimCLR v2's fine-tuning."""
    crop_scale: float | None = None
    """Smallest share of the image's area that a crop takes; by default as in pretraining."""
    flip: float | None = None
    """Probability of mirroring; by default as in pretraining."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_scale is not None and not 0 < self.crop_scale <= 1:
            raise UserError(f"--crop-scale {self.crop_scale}; it must lie in (0, 1].")
        if self.flip is not None and not 0 <= self.flip <= 1:
            raise UserError(f"--flip {self.flip}; a probability lies between 0 and 1.")

    def trainer(self, base: TrainerConfig) -> TrainerConfig:
        """These options, with seed, device, precision and log of another training."""
        return dataclasses.replace(
            base,
            epochs=self.epochs,
            steps=None,
            optimizer="adamw",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_share=0.0,
        )


class FineTuning(Method):
    """Cross-entropy on labels, through the whole network (Chen et al. 2020, arXiv 2006.10029, section 2).

    With ``classifier.head`` it starts from a middle layer of the projection head, as SimCLR v2 does.

    Args:
        classifier: trained in place.
        config: the options.
    """

    config_class = FineTuningConfig

    def __init__(self, classifier: Classifier, config: FineTuningConfig | None = None) -> None:
        super().__init__(classifier.encoder, config or FineTuningConfig())
        self.classifier = classifier

    def forward(self, views: Views) -> Objective:
        """Mean cross-entropy of the one view of each sample.

        Raises:
            UserError: there are no labels, or more views than one.
        """
        logits = self.classifier(single_view(views, "Fine-tuning")).float()
        if views.labels is None:
            raise UserError("Fine-tuning needs Views.labels: give it batches with a 'label'.")
        right = (logits.detach().argmax(dim=1) == views.labels).float().mean()
        return Objective(F.cross_entropy(logits, views.labels), {"training_accuracy": right})


def single_view(views: Views, method: str) -> Any:
    """The one view of each sample that a supervised objective works on.

    Raises:
        UserError: there is more than one.
    """
    if len(views.inputs) != 1:
        raise UserError(f"{method} works on 1 view of each image, but the view maker gave {len(views.inputs)}.")
    return views.inputs[0]


class LightViews:
    """One view of each image: random resized crop and flip (arXiv 2006.10029, section 3.1).

    Args:
        size: side of the square views, in pixels.
        crop_scale: smallest share of the image's area that a crop takes; the largest is 1.
        flip: probability of mirroring.
        seed: of the views' own random stream.
        normalisation: what values are brought to; as in pretraining.
    """

    def __init__(
        self,
        size: int,
        crop_scale: float = 0.08,
        flip: float = 0.5,
        seed: int = 0,
        normalisation: Normalisation = "half",
    ) -> None:
        self.crop_scale, self.flip = crop_scale, flip
        light = Recipe(crop_scale=(crop_scale, 1.0), flip=flip, jitter=0.0, greyscale=0.0, blur=0.0)
        self.views = ImageViews(size, Preset(light, normalisation=normalisation), seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """The view of each ``image``, with the batch's ``label``."""
        return Views((self.views.augment(batch["image"]),), num_global=1, labels=batch.get("label"))

    def state_dict(self) -> dict[str, Any]:
        """The random stream's state."""
        return self.views.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random stream."""
        self.views.load_state_dict(state)
