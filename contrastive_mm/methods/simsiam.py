"""SimSiam: each view predicts the other, which receives no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses.regression import negative_cosine
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.views import Views


@dataclass(frozen=True)
class SimSiamConfig(MethodOptions):
    """SimSiam (Chen & He 2021)."""

    projection_layers: int = 3
    """Linear layers of the projection head: 3 on ImageNet and 2 on CIFAR in the paper; 0 predicts the encoder's
    features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layers (2,048 in the paper)."""
    projection_dim: int = 512
    """Dimensions of the target and of its prediction (2,048 in the paper)."""
    prediction_hidden_dim: int = 128
    """Width of the predictor's hidden layer: a bottleneck of a quarter of projection_dim, as in the paper."""


class SimSiam(Method):
    """SimSiam (Chen & He 2021, arXiv 2011.10566): negative cosine in both directions, halved (equations 1 and 2).

    BYOL without the slow copy: the gradient that the target does not receive is what keeps it from collapsing.

    Where paper and released code differ, or the code and this one:

    - The projection head ends in BatchNorm, which in the code has no scale and shift. The paper only says that there
      is one; the code's is used here.
    - Each view goes through the network by itself, so that BatchNorm normalises it over its own batch, as in the code.
    - The paper's best results keep the predictor's learning rate constant (an option of the code). All parameters
      follow one schedule here.
    """

    config_class = SimSiamConfig

    def __init__(self, encoder: nn.Module, config: SimSiamConfig | None = None) -> None:
        config = config or SimSiamConfig()
        super().__init__(encoder, config)
        head = ProjectionHead(self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers)
        self.projector = nn.Sequential(head, nn.BatchNorm1d(head.output_dim, affine=False))
        self.predictor = ProjectionHead(head.output_dim, config.prediction_hidden_dim, head.output_dim)

    def forward(self, views: Views) -> Objective:
        """Predict each view's projection from the other view."""
        views.refuse_positives("SimSiam")
        self.refuse_single_row(views)
        pair: tuple[Any, Any] = views.require_pair("SimSiam")
        first, second = (self.projector(self.encoder(view)) for view in pair)
        forth = negative_cosine(self.predictor(first), second, gather=True)
        back = negative_cosine(self.predictor(second), first, gather=True)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        return Objective((forth + back) / 2, metrics, features=(first, second))
