"""NNCLR: the positive of a view is its nearest neighbour among earlier samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import info_nce
from contrastive_mm.losses.similarity import widen
from contrastive_mm.memory import FeatureQueue
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import BankOptions
from contrastive_mm.views import Views, encode_views

SEARCH_ROWS = 8192


@dataclass(frozen=True)
class NNCLRConfig(BankOptions):
    """NNCLR (Dwibedi et al. 2021)."""

    temperature: float = 0.1
    """Divides the cosine similarity."""
    queue_size: int = 4096
    """Earlier samples among which the neighbour is sought (98,304 on ImageNet)."""
    projection_layers: int = 3
    """Linear layers of the projection head: 3 is the paper's; 0 compares the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the hidden layers of projection and prediction head (2048 and 4096 in the paper)."""
    projection_dim: int = 128
    """Dimensions in which views are compared (256 in the paper)."""


class NNCLR(Method):
    """NNCLR (Dwibedi et al. 2021, arXiv 2104.14548, equations 3 and 4).

    The nearest neighbour of one view's projection in a queue of earlier projections is the query, the predictions
    for the other view are the keys; both directions are averaged. The paper's projection head has three layers with
    BatchNorm after each, the last one too; its prediction head has two. As in the paper one view's projections go
    into the queue. Until the queue holds anything, a view is its own neighbour (the paper starts from a random
    queue). No released code of the authors was found to compare with.
    """

    config_class = NNCLRConfig

    def __init__(self, encoder: nn.Module, config: NNCLRConfig | None = None) -> None:
        config = config or NNCLRConfig()
        super().__init__(encoder, config)
        self.temperature = config.temperature
        head = ProjectionHead(self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers)
        dim = head.output_dim
        self.projector = nn.Sequential(head, nn.BatchNorm1d(dim))
        self.predictor = ProjectionHead(dim, config.hidden_dim, dim)
        self.queue = FeatureQueue(config.queue_size, dim, **config.bank())
        self._new_keys: list[Tensor] = []

    def forward(self, views: Views) -> Objective:
        """InfoNCE from each view's neighbour to the other view's prediction."""
        self.refuse_single_row(views)
        projected = encode_views(self._project, views.require_pair("NNCLR"))
        first, second = (F.normalize(widen(view), dim=1) for view in projected)
        predicted_first, predicted_second = (self.predictor(view) for view in projected)
        losses = [
            info_nce(
                self._neighbour(view.detach()),
                prediction,
                temperature=self.temperature,
                positives=positives,
                gather=True,
            )
            for view, prediction, positives in zip(
                (first, second), (predicted_second, predicted_first), views.directions(), strict=True
            )
        ]
        if self.training:
            self._new_keys.append(first.detach())
        metrics = {"positive_similarity": positive_similarity(first, second)}
        loss = (losses[0] + losses[1]) / 2
        return Objective(loss, metrics, (first, second), candidates=len(first), temperature=self.temperature)

    def after_step(self) -> None:
        """Put this step's first views into the queue."""
        for keys in self._new_keys:
            self.queue.push(keys)
        self._new_keys.clear()
        self.queue.prefetch()

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))

    def _neighbour(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return nearest_rows(features, self.queue.features()) if len(self.queue) else features


def nearest_rows(query: Float[Tensor, "batch dim"], rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "batch dim"]:
    """The row with the largest dot product for each query, in blocks, so that no (batch, rows) matrix is held."""
    best = query.new_full((len(query),), -torch.inf)
    found = torch.zeros_like(query)
    for block in rows.split(SEARCH_ROWS):
        similarity, place = (query @ block.to(query).T).max(dim=1)
        better = similarity > best
        best = torch.where(better, similarity, best)
        found = torch.where(better[:, None], block[place].to(query), found)
    return found
