"""Options that training a detector and training a segmenter share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from contrastive_mm.errors import UserError
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.training import TrainerConfig
from contrastive_mm.vision.dense.pyramid import BatchNorm

LEAST_VALUES = {"batch_size": 2, "width": 4}
"""BatchNorm has nothing to normalise one image by, and FCN's head divides the width by 4."""


@dataclass(frozen=True)
class DenseConfig(MethodOptions):
    """Training on annotated images."""

    steps: int = 2000
    """Optimizer steps. 2,000 suit some hundred to a few thousand images; COCO's usual schedule is 90,000 of 16."""
    batch_size: int = 8
    """Images a step, at least 2."""
    learning_rate: float = 3e-4
    """Of AdamW at the peak of the schedule; a linear warm-up of a twentieth leads to it, and a cosine down to 0."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation layers."""
    width: int = 256
    """Channels of the pyramid's levels and of the heads; the box head has 4 times as many."""
    batch_norm: BatchNorm = "trained"
    """Whether the encoder's BatchNorm goes on learning, which MoCo fine-tunes with (section 4.2), or keeps statistics
    and weights as torchvision's recipes do. Frozen, it leaves random weights without normalisation."""
    freeze: bool = False
    """Keep all of the encoder as it is, and train what stands on it."""
    flip: float = 0.5
    """Probability of mirroring an image with all that is in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "width", "proposals", "regions"):
            value, least = getattr(self, name, None), LEAST_VALUES.get(name, 1)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}; it must be at least {least}.")
        if not 0 <= self.flip <= 1:
            raise UserError(f"--flip {self.flip}; a probability lies between 0 and 1.")

    def trainer(self, base: TrainerConfig) -> TrainerConfig:
        """These options, with seed, device, precision and log of another training."""
        return dataclasses.replace(
            base,
            steps=self.steps,
            optimizer="adamw",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_share=0.05,
            gradient_clip=1.0,
            diagnose=False,  # of contrastive features, which there are none of here
        )
