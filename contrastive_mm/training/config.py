"""How a method is trained: the options, the same in every domain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from contrastive_mm.errors import UserError

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainerConfig:
    """How a method is trained, in any domain."""

    epochs: int = 100
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps; takes the place of epochs where it is given."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation layers."""
    warmup_share: float = 0.05
    """Part of the run in which the learning rate rises linearly; a cosine to 0 follows."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    chunk_size: int | None = None
    """Samples that the encoder takes at once, for batches that don't fit in memory: it is run twice then, and the loss
    still sees the whole batch (GradCache). BatchNorm inside the encoder takes the statistics of a chunk."""
    precision: Precision = "no"
    """Mixed precision: bf16 on newer CPUs and GPUs, fp16 (with gradient scaling) on GPUs. Losses stay in float32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    seed: int = 0
    """Decides initial weights, data order, views and dropout."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    diagnose: bool = True
    """Watch for collapse and other failures: log the geometry of the features and say in one line what is wrong."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "log_every", "checkpoint_every", "keep_checkpoints", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} = {value}; it must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate = {self.learning_rate}; it must be a number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay = {self.weight_decay}; it must be 0 or above.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise UserError(f"--gradient-clip = {self.gradient_clip}; it must be above 0. Leave it out not to clip.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed = {self.seed}; it must lie between 0 and 2^63 - 1.")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"--warmup-share = {self.warmup_share}; it must lie in [0, 1).")
