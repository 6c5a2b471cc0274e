"""SimCLR: every other view in the batch is a negative."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import nt_xent
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class SimCLRConfig(MethodOptions):
    """SimCLR (Chen et al. 2020)."""

    temperature: float = 0.1
    """Divides the cosine similarity; lower looks harder at the nearest negatives."""
    projection_layers: int = 2
    """Linear layers of the projection head: 2 is the paper's; 0 compares the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layer (2048 with a ResNet-50 in the paper)."""
    projection_dim: int = 128
    """Dimensions in which views are compared."""


class SimCLR(Method):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709): NT-Xent over two views of each sample (equation 1).

    The paper's section 2.1 has a plain two-layer perceptron for a head; the released code puts BatchNorm behind both
    layers, this one behind the hidden layer. The encoder's output before the head is the representation
    (section 4.2).
    """

    config_class = SimCLRConfig

    def __init__(self, encoder: nn.Module, config: SimCLRConfig | None = None) -> None:
        config = config or SimCLRConfig()
        super().__init__(encoder, config)
        self.temperature = config.temperature
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers
        )

    def forward(self, views: Views) -> Objective:
        """NT-Xent between the two views."""
        first, second = encode_views(self._project, views.require_pair("SimCLR"))
        loss = nt_xent(first, second, self.temperature, positives=views.positives, gather=True)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        candidates = 2 * len(first) - 1
        return Objective(loss, metrics, (first, second), candidates=candidates, temperature=self.temperature)

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))
