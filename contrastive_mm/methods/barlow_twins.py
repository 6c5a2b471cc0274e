"""Barlow Twins: the correlation between two views' dimensions becomes the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses.barlow import barlow_twins
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.views import Views


@dataclass(frozen=True)
class BarlowTwinsConfig(MethodOptions):
    """Barlow Twins (Zbontar et al. 2021)."""

    offdiagonal_weight: float = 5e-3
    """Weight of the correlations between different dimensions (the paper's lambda)."""
    projection_layers: int = 3
    """Linear layers of the projection head: 3 is the paper's; 0 compares the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layers (8,192 in the paper)."""
    projection_dim: int = 512
    """Dimensions that are decorrelated (8,192 in the paper, which gains from many)."""


class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2).

    Where paper and released code differ, or the code and this one:

    - The paper's weight of the redundancy term is 0.005, the code's 0.0051; the paper's is the default here.
    - The code adds 1e-5 to the variances (BatchNorm), the paper nothing; the code's is used here.
    - The code's projection head has no bias in the last layer. The loss takes off the mean: a bias does nothing.
    - In several processes the code's gradient is smaller by their number (see ``losses.barlow_twins``).
    - Each view goes through the network by itself, so that BatchNorm normalises it over its own batch, as in the code.
    """

    config_class = BarlowTwinsConfig

    def __init__(self, encoder: nn.Module, config: BarlowTwinsConfig | None = None) -> None:
        config = config or BarlowTwinsConfig()
        super().__init__(encoder, config)
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers
        )

    def forward(self, views: Views) -> Objective:
        """Redundancy reduction between the two views."""
        views.refuse_positives("Barlow Twins")
        self.refuse_single_row(views)
        pair: tuple[Any, Any] = views.require_pair("Barlow Twins")
        first, second = (self.projector(self.encoder(view)) for view in pair)
        loss = barlow_twins(first, second, self.config.offdiagonal_weight)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        return Objective(loss, metrics, features=(first, second))
