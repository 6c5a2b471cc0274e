"""Training, on Hugging Face Accelerate: one step (`Updater`) and the one loop of every domain (`Trainer`)."""

from contrastive_mm.training.accelerator import make_accelerator
from contrastive_mm.training.config import Precision, TrainerConfig
from contrastive_mm.training.optimization import build_optimizer, scheduled_rate
from contrastive_mm.training.trainer import Trainer
from contrastive_mm.training.updater import Updater

__all__ = [
    "Precision",
    "Trainer",
    "TrainerConfig",
    "Updater",
    "build_optimizer",
    "make_accelerator",
    "scheduled_rate",
]
