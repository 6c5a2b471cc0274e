"""VICReg: views agree while every dimension keeps varying by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses.vicreg import vicreg
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.views import Views


@dataclass(frozen=True)
class VICRegConfig(MethodOptions):
    """VICReg (Bardes et al. 2022)."""

    invariance: float = 25.0
    """Weight of the squared difference between the views."""
    variance: float = 25.0
    """Weight of keeping each dimension's standard deviation at 1 or above."""
    covariance: float = 1.0
    """Weight of the covariances between different dimensions."""
    projection_layers: int = 3
    """Linear layers of the projection head (the paper's expander): 3 is the paper's; 0 compares the encoder's
    features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layers (8,192 in the paper)."""
    projection_dim: int = 512
    """Dimensions that are kept apart (8,192 in the paper)."""


class VICReg(Method):
    """VICReg (Bardes et al. 2022, arXiv 2105.04906, equations 1 to 6).

    Where paper and released code differ, or the code and this one:

    - The code divides the invariance by the dimensions and averages the two views' variance terms where the paper
      adds both up. The published weights go with the code, whose scale is used here.
    - The code's projection head has no bias in the last layer; it has one here, which only the invariance could see,
      and there it cancels.
    - Each view goes through the network by itself, so that BatchNorm normalises it over its own batch, as in the code.
    """

    config_class = VICRegConfig

    def __init__(self, encoder: nn.Module, config: VICRegConfig | None = None) -> None:
        config = config or VICRegConfig()
        super().__init__(encoder, config)
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers
        )

    def forward(self, views: Views) -> Objective:
        """Variance, invariance and covariance of the two views."""
        views.refuse_positives("VICReg")
        self.refuse_single_row(views)
        pair: tuple[Any, Any] = views.require_pair("VICReg")
        first, second = (self.projector(self.encoder(view)) for view in pair)
        loss = vicreg(first, second, self.config.invariance, self.config.variance, self.config.covariance)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        return Objective(loss, metrics, features=(first, second))
