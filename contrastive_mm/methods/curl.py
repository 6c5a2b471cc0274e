"""CURL: bilinear similarity between crops of one observation, keys from a momentum encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from contrastive_mm.heads import BilinearSimilarity, LayerNormHead
from contrastive_mm.losses import info_nce
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.momentum import MomentumEncoder
from contrastive_mm.views import Views


@dataclass(frozen=True)
class CURLConfig(MethodOptions):
    """CURL's contrastive objective (Laskin et al. 2020)."""

    latent_dim: int = 50
    """Dimensions of the latent in which crops are compared."""
    momentum: float = 0.95
    """Share of the key encoder kept at each step (the paper's tau of 0.05)."""


class CURL(Method):
    """The contrastive objective of CURL (Laskin et al. 2020, arXiv 2004.04136, section 4 and equation 4).

    Queries and keys are (linear, LayerNorm) latents of two crops, compared by ``q W k`` without temperature,
    against the other keys of the batch. The paper's figure has no LayerNorm, its code does: it bounds the
    features, which the bilinear form needs.

    Args:
        encoder: as every method.
        config: the options.
        slow_encoder: a slowly moving copy of ``encoder`` that exists already, and that its owner moves: the target
            encoder of an agent, which the released code takes for both. It receives no gradient from here on. Only
            the head's copy is this method's own then. By default copies of both are, and are moved here.

    Raises:
        UserError: ``slow_encoder`` shares parameters with ``encoder``.
    """

    config_class = CURLConfig

    def __init__(
        self, encoder: nn.Module, config: CURLConfig | None = None, slow_encoder: nn.Module | None = None
    ) -> None:
        config = config or CURLConfig()
        super().__init__(encoder, config)
        self.projector = LayerNormHead(self.feature_dim, config.latent_dim)
        self.bilinear = BilinearSimilarity(config.latent_dim)
        self.momentum_encoder = MomentumEncoder(
            encoder, config.momentum, module=slow_encoder, updated_elsewhere=slow_encoder is not None
        )
        self.momentum_projector = MomentumEncoder(self.projector, config.momentum)

    def forward(self, views: Views) -> Objective:
        """InfoNCE of anchors with their positive crop against the batch's other crops."""
        self.refuse_single_row(views)
        anchor, positive = views.require_pair("CURL")
        query = self.projector(self.encoder(anchor))
        key = self.momentum_projector(self.momentum_encoder(positive))
        loss = info_nce(query, key, temperature=1.0, similarity=self.bilinear, positives=views.positives, gather=True)
        metrics = {"positive_similarity": positive_similarity(query, key)}
        return Objective(loss, metrics, features=(query, key), candidates=len(query))

    def after_step(self) -> None:
        """Move the key encoder and its head."""
        self.momentum_encoder.update(self.encoder)
        self.momentum_projector.update(self.projector)
