"""SupCon: labels say which samples belong together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from contrastive_mm.errors import UserError
from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import supcon
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.positives import Positives
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class SupConConfig(MethodOptions):
    """Supervised contrastive learning (Khosla et al. 2020)."""

    temperature: float = 0.1
    """Divides the cosine similarity."""
    projection_layers: int = 2
    """Linear layers of the projection head, which is thrown away after training."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layer (2048 in the paper)."""
    projection_dim: int = 128
    """Dimensions in which views are compared."""


class SupCon(Method):
    """SupCon (Khosla et al. 2020, arXiv 2004.11362, equation 2): all views of the same class attract each other.

    Needs ``Views.labels`` or ``Views.positives`` over the samples. Of mixed samples that have labels, a row belongs
    with its own class by its share and with its partner's class by the rest; both views are taken as mixed alike.
    Other positives take the labels' place. The paper's head is a plain two-layer
    perceptron without BatchNorm, as here. The released code scales the loss by temperature / base temperature,
    which is 1 at its defaults and left out here.
    """

    config_class = SupConConfig

    def __init__(self, encoder: nn.Module, config: SupConConfig | None = None) -> None:
        config = config or SupConConfig()
        super().__init__(encoder, config)
        self.temperature = config.temperature
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers, batch_norm=False
        )

    def forward(self, views: Views) -> Objective:
        """SupCon over the two views.

        Raises:
            UserError: the views carry neither labels nor positives.
        """
        relation: Tensor | Positives | None = views.labels
        if views.positives is not None:
            relation = views.positives
            if relation.partner is not None and relation.ids is None:
                relation = dataclasses.replace(relation, ids=views.labels)
        if relation is None:
            raise UserError(
                "SupCon needs labels, one for each sample, but this data has none, or not for all: choose another "
                "--method, such as simclr, or leave out what has no label."
            )
        first, second = encode_views(self._project, views.require_pair("SupCon"))
        loss = supcon(first, second, relation, self.temperature, gather=True)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        candidates = 2 * len(first) - 1
        return Objective(loss, metrics, (first, second), candidates=candidates, temperature=self.temperature)

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))
