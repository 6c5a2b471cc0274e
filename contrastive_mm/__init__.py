"""Contrastive representation learning on one core: vision, text and reinforcement learning.

The names below are imported on first use, so that ``import contrastive_mm`` and ``contrastive-mm --help``
stay light and load neither torch nor any domain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrastive_mm.batches import ShuffledBatches
    from contrastive_mm.losses import info_nce, nt_xent
    from contrastive_mm.memory import FeatureQueue, InstanceBank
    from contrastive_mm.momentum import MomentumEncoder
    from contrastive_mm.positives import Positives
    from contrastive_mm.training import Trainer, TrainerConfig, Updater
    from contrastive_mm.views import Views, encode_views

__version__ = "0.1.0"

_HOME = {
    "FeatureQueue": "contrastive_mm.memory",
    "InstanceBank": "contrastive_mm.memory",
    "MomentumEncoder": "contrastive_mm.momentum",
    "Positives": "contrastive_mm.positives",
    "ShuffledBatches": "contrastive_mm.batches",
    "Trainer": "contrastive_mm.training",
    "TrainerConfig": "contrastive_mm.training",
    "Updater": "contrastive_mm.training",
    "Views": "contrastive_mm.views",
    "encode_views": "contrastive_mm.views",
    "info_nce": "contrastive_mm.losses",
    "nt_xent": "contrastive_mm.losses",
}

__all__ = [
    "FeatureQueue",
    "InstanceBank",
    "MomentumEncoder",
    "Positives",
    "ShuffledBatches",
    "Trainer",
    "TrainerConfig",
    "Updater",
    "Views",
    "encode_views",
    "info_nce",
    "nt_xent",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'contrastive_mm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
