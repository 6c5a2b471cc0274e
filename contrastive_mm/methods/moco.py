"""MoCo: a queue of earlier keys as negatives, encoded by a momentum encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import info_nce
from contrastive_mm.memory import FeatureQueue
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import BankOptions
from contrastive_mm.momentum import MomentumEncoder
from contrastive_mm.views import Views


@dataclass(frozen=True)
class MoCoConfig(BankOptions):
    """MoCo (He et al. 2020) with the two-layer head of MoCo v2 (Chen et al. 2020b).

    MoCo v1 is --projection-layers 1 --temperature 0.07, with views that are cropped and coloured, but not blurred.
    """

    temperature: float = 0.2
    """Divides the cosine similarity: 0.07 in MoCo v1, 0.2 in v2."""
    queue_size: int = 4096
    """Keys kept as negatives (65,536 on ImageNet). Keep it below the size of the data set: a longer queue
    holds every sample's own keys and pushes them away."""
    momentum: float = 0.99
    """Share of the key encoder kept at each step (0.999 with ImageNet's long schedules)."""
    projection_layers: int = 2
    """Linear layers of the projection head: 2 in MoCo v2, 1 in v1; 0 compares the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layer."""
    projection_dim: int = 128
    """Dimensions in which query and key are compared."""


class MoCo(Method):
    """MoCo (He et al. 2020, arXiv 1911.05722, algorithm 1) with MoCo v2's head (arXiv 2003.04297).

    Version 1 has one linear layer in the place of the head (``projection_layers=1``), and T = 0.07.

    The first view gives the queries, the second the keys. Keys are read from the queue before the new ones are
    pushed, so that no positive is also a negative. Where the released code starts from a queue of random unit
    vectors, this queue starts empty; in the very first step the batch's other keys are the negatives.

    The released code shuffles samples among GPUs for BatchNorm. On one device both encoders normalise over the
    whole batch, and there is nothing to shuffle.
    """

    config_class = MoCoConfig

    def __init__(self, encoder: nn.Module, config: MoCoConfig | None = None) -> None:
        config = config or MoCoConfig()
        super().__init__(encoder, config)
        self.temperature = config.temperature
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers, batch_norm=False
        )
        self.momentum_encoder = MomentumEncoder(self._online(), config.momentum)
        self.queue = FeatureQueue(config.queue_size, self.projector.output_dim, **config.bank())
        self._new_keys: list[Tensor] = []

    def _online(self) -> nn.Sequential:
        return nn.Sequential(self.encoder, self.projector)

    def forward(self, views: Views) -> Objective:
        """InfoNCE of each query with its key against the queue."""
        self.refuse_single_row(views)
        first, second = views.require_pair("MoCo")
        # Normalised here, and compared by their dot product: the queue's keys, which are normalised too, would
        # otherwise be normalised again at every step.
        query = F.normalize(self.projector(self.encoder(first)).float(), dim=1)
        key = F.normalize(self.momentum_encoder(second).float(), dim=1)
        negatives = self.queue.features() if len(self.queue) else None
        # Mixed samples have their positives among the batch's keys, which are then candidates too (i-Mix).
        in_batch = negatives is None or views.positives is not None
        loss = info_nce(
            query,
            key,
            negatives=negatives,
            temperature=self.temperature,
            similarity="dot",
            in_batch_negatives=in_batch,
            positives=views.positives,
            gather=True,
        )
        if self.training:
            self._new_keys.append(key)
        candidates = (len(query) if in_batch else 1) + (0 if negatives is None else len(negatives))
        metrics = {"positive_similarity": positive_similarity(query, key)}
        return Objective(loss, metrics, (query, key), negatives, candidates, self.temperature)

    def after_step(self) -> None:
        """Move the key encoder, then put this step's keys into the queue."""
        self.momentum_encoder.update(self._online())
        for keys in self._new_keys:
            self.queue.push(keys)
        self._new_keys.clear()
        self.queue.prefetch()
