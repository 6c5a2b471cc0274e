"""Distillation with unlabelled images: SimCLR v2's third stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.training import TrainerConfig
from contrastive_mm.views import Views
from contrastive_mm.vision.few_labels.classifiers import Classifier
from contrastive_mm.vision.few_labels.fine_tuning import single_view
from contrastive_mm.vision.few_labels.labelled import UNLABELLED


@dataclass(frozen=True)
class DistillationConfig(MethodOptions):
    """Distillation on all training images."""

    epochs: int = 100
    """Passes over all training images (400 in SimCLR v2)."""
    batch_size: int = 256
    """Images a step."""
    learning_rate: float = 1e-3
    """Peak of the schedule: warm-up, then a cosine down to 0."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation layers."""
    temperature: float | None = None
    """Divides the scores of teacher and student; by default SimCLR v2's: 0.1 where a model is distilled into itself,
    1 where it is distilled into another."""
    teacher_share: float = 1.0
    """Weight of the teacher's predictions (alpha in equation 3); the rest goes to the labels. 1 uses no label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_share <= 1:
            raise UserError(f"--teacher-share {self.teacher_share}; it must lie between 0 and 1.")

    def trainer(self, base: TrainerConfig) -> TrainerConfig:
        """These options, with seed, device, precision and log of another training."""
        return dataclasses.replace(
            base,
            epochs=self.epochs,
            steps=None,
            optimizer="adamw",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_share=0.05,
        )


def distillation_loss(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's predictions with the teacher's (arXiv 2006.10029, equation 2), mean over rows.

    Both are softened by the temperature. No gradient goes to the teacher. The authors' notebook multiplies this by the
    squared temperature; the equation doesn't, and nor does this.

    Args:
        student: scores of the student.
        teacher: scores of the teacher for the same images.
        temperature: divides both.
    """
    return F.cross_entropy(student.float() / temperature, (teacher.detach().float() / temperature).softmax(dim=1))


def labelled_distillation_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    temperature: float,
    teacher_share: float,
) -> Float[Tensor, ""]:
    """Distillation together with the labels' cross-entropy (arXiv 2006.10029, equation 3).

    The equation sums over labelled images and over all images; both sums are divided by the rows of the batch here,
    so that labels weigh as much as they are many.

    Args:
        student: scores of the student.
        teacher: scores of the teacher for the same images.
        labels: classes; -1 where an image has none.
        temperature: divides the scores in the distillation's part.
        teacher_share: alpha.
    """
    supervised = F.cross_entropy(student.float(), labels, ignore_index=UNLABELLED, reduction="sum") / len(student)
    distilled = distillation_loss(student, teacher, temperature)
    return (1 - teacher_share) * supervised + teacher_share * distilled


class Distillation(Method):
    """A student learns to predict what a fine-tuned teacher predicts of the same view (arXiv 2006.10029, section 2).

    The teacher is frozen: without gradient, in eval mode, its BatchNorm statistics as they were. It is part of the
    state, so that a run resumes with the teacher that it began with.

    Args:
        student: trained in place.
        teacher: a classifier of the same classes.
        config: the options.
        temperature: of equation 2, where the options leave it open.

    Raises:
        UserError: the two tell a different number of classes apart.
    """

    config_class = DistillationConfig

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        config: DistillationConfig | None = None,
        temperature: float = 1.0,
    ) -> None:
        config = config or DistillationConfig()
        super().__init__(student.encoder, config)
        if student.linear.out_features != teacher.linear.out_features:
            raise UserError(
                f"The student tells {student.linear.out_features} classes apart and its teacher "
                f"{teacher.linear.out_features}: give both the classes of one data set."
            )
        self.temperature = temperature if config.temperature is None else config.temperature
        self.teacher_share = config.teacher_share
        self.classifier = student
        self.teacher = teacher.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views: Views) -> Objective:
        """Equation 2, or equation 3 where labels have a share, on the one view of each image.

        Raises:
            UserError: there are more views than one, or labels have a share and there are none.
        """
        images = single_view(views, "Distillation")
        with torch.no_grad():
            taught = self.teacher(images).float()
        logits = self.classifier(images).float()
        agreement = (logits.detach().argmax(dim=1) == taught.argmax(dim=1)).float().mean()
        if self.teacher_share == 1:
            loss = distillation_loss(logits, taught, self.temperature)
        elif views.labels is None:
            raise UserError(f"--teacher-share {self.teacher_share} leaves a share to labels, and there are none.")
        else:
            loss = labelled_distillation_loss(logits, taught, views.labels, self.temperature, self.teacher_share)
        return Objective(loss, {"teacher_agreement": agreement})
