"""Memory of features from earlier batches. Banks are read in ``forward`` and written in ``after_step``."""

from __future__ import annotations

from contrastive_mm.memory.instance import InstanceBank
from contrastive_mm.memory.queue import FeatureQueue

__all__ = ["FeatureQueue", "InstanceBank"]
