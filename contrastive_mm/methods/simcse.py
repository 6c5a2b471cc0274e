"""SimCSE: the same input twice, told apart only by dropout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from contrastive_mm.losses import info_nce
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class SimCSEConfig:
    """SimCSE without labels (Gao et al. 2021)."""

    temperature: float = 0.05
    """Divides the cosine similarity."""
    mlp: bool = True
    """A linear layer with tanh before the loss, in training only: the paper's way with the first token's state.
    Its mean-pooled encoders go without."""


class SimCSE(Method):
    """Unsupervised SimCSE (Gao et al. 2021, arXiv 2104.08821, equation 4).

    InfoNCE with cosine similarity over the batch, one direction, behind a linear layer with tanh that is used
    in training only (section 6.3). With dropout views (``contrastive_mm.nlp``) it is the paper's method; with
    other views it is InfoNCE over them.
    """

    config_class = SimCSEConfig

    def __init__(self, encoder: nn.Module, config: SimCSEConfig | None = None) -> None:
        config = config or SimCSEConfig()
        super().__init__(encoder, config)
        self.temperature = config.temperature
        self.projector: nn.Module = nn.Identity()
        if config.mlp:
            self.projector = nn.Sequential(nn.Linear(self.feature_dim, self.feature_dim), nn.Tanh())

    def forward(self, views: Views) -> Objective:
        """InfoNCE from the first view to the second."""
        first, second = encode_views(self._project, views.require_pair("SimCSE"))
        loss = info_nce(first, second, temperature=self.temperature)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        return Objective(loss, metrics, features=(first, second), candidates=len(first))

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))
