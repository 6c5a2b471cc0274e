"""Classifiers from a few labels, each a stage in a folder of its own: from scratch, fine-tuned, distilled."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.training import Trainer, TrainerConfig
from contrastive_mm.vision.domain import ImageDomain
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.few_labels.classifiers import (
    Classifier,
    count_parameters,
    held_back_accuracy,
    probe_accuracy,
)
from contrastive_mm.vision.few_labels.distillation import Distillation, DistillationConfig
from contrastive_mm.vision.few_labels.fine_tuning import FineTuning, FineTuningConfig, LightViews
from contrastive_mm.vision.few_labels.labelled import Labelled, labelled_batches, partly_labelled_batches
from contrastive_mm.vision.few_labels.stages import fingerprint, load_classifier, run_stage, save_classifier


@dataclass(frozen=True)
class FewLabels:
    """What classifiers are trained with and scored on; of the training images' labels it knows ``labelled`` alone.

    Attributes:
        domain: the images; its held-back part scores the last epoch of each classifier.
        labelled: the labels that may be used.
        base: seed, device, precision, log and checkpoints of every training.
        options: of training on labels.
    """

    domain: ImageDomain
    labelled: Labelled
    base: TrainerConfig
    options: FineTuningConfig

    def new_classifier(self, encoder: str) -> Classifier:
        """An encoder of this name with a linear layer on top, both with random weights that the seed decides."""
        torch.manual_seed(self.base.seed)
        return Classifier(build_image_encoder(encoder, self.domain.image_size), self.labelled.num_classes)

    def probe(self, classifier: Classifier, folder: Path) -> dict[str, float]:
        """Score a linear probe on the frozen encoder of a classifier that is not trained yet."""
        encoder = classifier.encoder
        settings = {"encoder": fingerprint(encoder), **self._data()}

        def train() -> dict[str, float]:
            accuracy = probe_accuracy(encoder, self.domain, self.labelled)
            width = int(encoder.feature_dim)  # type: ignore[arg-type]
            linear = (width + 1) * self.labelled.num_classes
            return {"accuracy": accuracy, "parameters": count_parameters(encoder) + linear}

        return run_stage(folder, settings, train)

    def from_scratch(self, encoder: str, folder: Path) -> dict[str, float]:
        """Train an encoder of this name and its linear layer on the labelled images alone, from random weights.

        Raises:
            UserError: as ``run_stage`` and ``held_back``.
        """
        options = dataclasses.replace(self.options, learning_rate=self.options.scratch_learning_rate)
        return self._supervised(self.new_classifier(encoder), options, folder)

    def fine_tune(self, classifier: Classifier, folder: Path) -> dict[str, float]:
        """Train all of a pretrained classifier on the labelled images.

        Args:
            classifier: trained in place, or loaded where the stage is done.
            folder: of the stage.

        Raises:
            UserError: as ``run_stage`` and ``held_back``.
        """
        return self._supervised(classifier, self.options, folder)

    def _supervised(self, classifier: Classifier, options: FineTuningConfig, folder: Path) -> dict[str, float]:
        read = self.domain.images.read
        batches = labelled_batches(self.labelled, read, options.batch_size, self.base.seed)
        return self._train(FineTuning(classifier, options), batches, folder)

    def distil(
        self, student: Classifier, teacher: Classifier, options: DistillationConfig, temperature: float, folder: Path
    ) -> dict[str, float]:
        """Train a student on a teacher's predictions for all training images.

        Args:
            student: trained in place, or loaded where the stage is done.
            teacher: fine-tuned.
            options: of the distillation.
            temperature: where the options leave it open.
            folder: of the stage.

        Raises:
            UserError: as ``run_stage`` and ``held_back``.
        """
        method = Distillation(student, teacher, options, temperature)
        rows, read = self.domain.train_rows, self.domain.images.read
        batches = partly_labelled_batches(self.labelled, rows, read, options.batch_size, self.base.seed)
        return self._train(method, batches, folder, {"temperature": method.temperature})

    def _train(
        self,
        method: FineTuning | Distillation,
        batches: ShuffledBatches,
        folder: Path,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        views, config, classifier = self._views(), method.config.trainer(self.base), method.classifier
        settings = {
            "weights": fingerprint(method),
            **self._data(),
            **dataclasses.asdict(method.config),
            "crop_scale": views.crop_scale,
            "flip": views.flip,
            "seed": config.seed,
            "precision": config.precision,
            **(extra or {}),
        }

        def train() -> dict[str, float]:
            trained = Trainer(method, views, batches, config, folder).train(resume=True)
            save_classifier(classifier, folder)
            return {
                "accuracy": held_back_accuracy(classifier, self.domain),
                "parameters": count_parameters(classifier),
                "steps": trained["steps"],
                "seconds": round(trained["seconds"], 1),
            }

        scores = run_stage(folder, settings, train)
        load_classifier(classifier, folder)
        return scores

    def _data(self) -> dict[str, Any]:
        rows = torch.stack([self.labelled.rows, self.labelled.labels])
        domain = self.domain
        data = {"data": domain.config.data, "test_data": domain.test_data, "images": len(domain.train_rows)}
        return data | {"labelled": fingerprint(rows), "content": domain.digest}

    def _views(self) -> LightViews:
        preset, own = self.domain.make_views.preset, self.options
        crop_scale = preset.first.crop_scale[0] if own.crop_scale is None else own.crop_scale
        flip = preset.first.flip if own.flip is None else own.flip
        return LightViews(self.domain.image_size, crop_scale, flip, self.base.seed, preset.normalisation)
