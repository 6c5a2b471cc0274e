"""BYOL: one network predicts what its slowly moving copy says of another view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses.regression import negative_cosine
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.momentum import MomentumEncoder
from contrastive_mm.views import Views


@dataclass(frozen=True)
class BYOLConfig(MethodOptions):
    """BYOL (Grill et al. 2020)."""

    momentum: float = 0.99
    """Share of the target network kept at the first step, rising to 1 over the run (0.996 in the paper)."""
    projection_layers: int = 2
    """Linear layers of the projection head: 2 is the paper's; 0 predicts the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the hidden layers of projection head and predictor (4,096 in the paper)."""
    projection_dim: int = 128
    """Dimensions of the target and of its prediction (256 in the paper)."""


class BYOL(Method):
    """BYOL (Grill et al. 2020, arXiv 2006.07733): equation 2 in both directions, added.

    The online network predicts the target network's projection of the other view: ``2 - 2 cos`` each way, so that
    the loss lies between 0 and 8. No negatives; the predictor and the slow target keep it from collapsing.

    Where paper and released code differ, or the code and this one:

    - The target starts as a copy of the online network here; the code draws it anew, and notes no difference.
    - Each view goes through the networks by itself, in training mode in the target too: BatchNorm normalises it over
      its own batch, as in the code.
    - The heads have a bias in the last layer and none before BatchNorm; in the code it is the other way round. A
      bias before BatchNorm does nothing. The paper does not say.
    - The code trains a linear classifier beside it on detached features; ``evaluate`` does that afterwards here.
    """

    config_class = BYOLConfig

    def __init__(self, encoder: nn.Module, config: BYOLConfig | None = None) -> None:
        config = config or BYOLConfig()
        super().__init__(encoder, config)
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers
        )
        dim = self.projector.output_dim
        self.predictor = ProjectionHead(dim, config.hidden_dim, dim)
        self.momentum_encoder = MomentumEncoder(self._online(), config.momentum)

    def _online(self) -> nn.Sequential:
        return nn.Sequential(self.encoder, self.projector)

    def set_total_steps(self, total_steps: int) -> None:
        """The momentum rises to 1 over the run (section 3.3)."""
        self.momentum_encoder.total_steps = total_steps

    def forward(self, views: Views) -> Objective:
        """Predict the target's projection of each view from the other view."""
        views.refuse_positives("BYOL")
        self.refuse_single_row(views)
        pair: tuple[Any, Any] = views.require_pair("BYOL")
        first, second = (self.projector(self.encoder(view)) for view in pair)
        first_target, second_target = (self.momentum_encoder(view) for view in pair)
        forth = negative_cosine(self.predictor(first), second_target, gather=True)
        back = negative_cosine(self.predictor(second), first_target, gather=True)
        loss = (2 + 2 * forth) + (2 + 2 * back)
        metrics = {"positive_similarity": positive_similarity(first, second)}
        return Objective(loss, metrics, features=(first, second))

    def after_step(self) -> None:
        """Move the target network."""
        self.momentum_encoder.update(self._online())
