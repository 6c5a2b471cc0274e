"""SimCLR v2: a deeper head, part of which is kept for fine-tuning, and a memory of earlier keys by option."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_mm.errors import UserError
from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import info_nce, nt_xent
from contrastive_mm.memory import FeatureQueue
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import BankOptions
from contrastive_mm.momentum import MomentumEncoder
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class SimCLRV2Config(BankOptions):
    """SimCLR v2 (Chen et al. 2020b)."""

    temperature: float = 0.1
    """Divides the cosine similarity."""
    projection_layers: int = 3
    """Linear layers of the projection head (3 in the paper)."""
    kept_layers: int = 1
    """Layers of the head that `fine_tuning_encoder` keeps (1 in the paper for few labels; 0, the paper's for all
    labels and SimCLR v1's, keeps none)."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layers (the encoder's width in the paper)."""
    projection_dim: int = 128
    """Dimensions in which views are compared."""
    queue_size: int = 0
    """Keys of earlier batches that are further negatives, from a momentum encoder (65,536 in the paper, where it
    adds about one per cent); 0 leaves the memory out."""
    momentum: float = 0.999
    """Share of the momentum encoder kept at each step; used with a queue only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kept_layers < self.projection_layers:
            raise UserError(
                f"--kept-layers = {self.kept_layers}; the head has {self.projection_layers} layers, and at least the "
                "last of them is thrown away."
            )


class SimCLRV2(Method):
    """SimCLR v2's pretraining (Chen et al. 2020, arXiv 2006.10029, section 2).

    NT-Xent behind a three-layer head; ``fine_tuning_encoder`` is the encoder with the head's first layer, from which
    the paper fine-tunes (section 3, figure 5). The released code has BatchNorm without a shift after the head's last
    linear layer too, which the paper doesn't mention; here it has a shift. With ``queue_size`` above 0 queries are
    compared with the momentum encoder's keys of the batch and of the queue, as in the paper's memory, which is MoCo's
    (section 2); the released code has none.
    """

    config_class = SimCLRV2Config

    def __init__(self, encoder: nn.Module, config: SimCLRV2Config | None = None) -> None:
        config = config or SimCLRV2Config()
        super().__init__(encoder, config)
        self.temperature, self.kept_layers = config.temperature, config.kept_layers
        self.hidden_dim = config.hidden_dim
        self.projector = nn.Sequential(
            ProjectionHead(self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers),
            nn.BatchNorm1d(config.projection_dim),
        )
        self.queue = None
        if config.queue_size:
            self.queue = FeatureQueue(config.queue_size, config.projection_dim, **config.bank())
        self.momentum_encoder = MomentumEncoder(self._online(), config.momentum) if config.queue_size else None
        self._new_keys: list[Tensor] = []

    def _online(self) -> nn.Sequential:
        return nn.Sequential(self.encoder, self.projector)

    def forward(self, views: Views) -> Objective:
        """NT-Xent between the two views, or InfoNCE against momentum keys where there is a memory."""
        pair = views.require_pair("SimCLR v2")
        first, second = encode_views(self._online(), pair)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        if self.queue is None or self.momentum_encoder is None:
            loss = nt_xent(first, second, self.temperature, positives=views.positives, gather=True)
            candidates = 2 * len(first) - 1
            return Objective(loss, metrics, (first, second), candidates=candidates, temperature=self.temperature)
        keys = [F.normalize(key.float(), dim=1) for key in encode_views(self.momentum_encoder, pair)]
        negatives = self.queue.features() if len(self.queue) else None
        losses = [
            info_nce(
                F.normalize(query.float(), dim=1),
                key,
                negatives=negatives,
                temperature=self.temperature,
                similarity="dot",
                positives=positives,
                gather=True,
            )
            for query, key, positives in zip((first, second), keys[::-1], views.directions(), strict=True)
        ]
        if self.training:
            self._new_keys += keys
        candidates = len(first) + (0 if negatives is None else len(negatives))
        pair_features = first, keys[1]
        return Objective(
            (losses[0] + losses[1]) / 2,
            metrics,
            pair_features,
            negatives=negatives,
            candidates=candidates,
            temperature=self.temperature,
        )

    def after_step(self) -> None:
        """With a memory: move the momentum encoder, then push this step's keys."""
        if self.queue is None or self.momentum_encoder is None:
            return
        self.momentum_encoder.update(self._online())
        for keys in self._new_keys:
            self.queue.push(keys)
        self._new_keys.clear()
        self.queue.prefetch()

    def fine_tuning_encoder(self) -> nn.Module:
        """The encoder with the head's first ``kept_layers`` layers; it shares their weights.

        Returns:
            Maps inputs to (B, ``feature_dim``) with the hidden width as ``feature_dim``, the encoder's where no
            layer is kept.
        """
        head = self.projector[0]
        assert isinstance(head, ProjectionHead)
        # Linear, BatchNorm and ReLU make a layer of the head.
        kept = nn.Sequential(self.encoder, *list(head)[: 3 * self.kept_layers])
        kept.feature_dim = self.hidden_dim if self.kept_layers else self.feature_dim  # type: ignore[assignment]
        return kept
