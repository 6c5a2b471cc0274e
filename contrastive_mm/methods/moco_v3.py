"""MoCo v3: momentum keys of the same batch, no queue, a prediction head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import info_nce
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.momentum import MomentumEncoder
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class MoCoV3Config(MethodOptions):
    """MoCo v3 (Chen, Xie and He 2021)."""

    temperature: float = 0.2
    """Divides the cosine similarity (0.2 for ViT, 1.0 for ResNet-50 in the released code)."""
    momentum: float = 0.99
    """Share of the key encoder kept at each step, rising to 1 over the run on half a cosine."""
    projection_layers: int = 3
    """Linear layers of the projection head: 3 is the paper's (the released code has 2 for ResNet-50); 0 compares the
    encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the heads' hidden layers (4096 in the paper)."""
    projection_dim: int = 128
    """Dimensions in which query and key are compared (256 in the paper)."""


class MoCoV3(Method):
    """MoCo v3 (Chen, Xie and He 2021, arXiv 2104.02057, algorithm 1).

    Both views are queries, behind projection and prediction head, and both are keys, from the momentum encoder
    without prediction head; a query's negatives are the other keys of the batch. Both directions are added and
    multiplied by 2 T, as in the algorithm: the gradient keeps its size when T changes. The projection head has three
    layers and the prediction head two, with BatchNorm after each (section 5), without affine weights in the last, as
    in the released code for ViT. That for ResNet-50 has two layers, and no BatchNorm after the prediction head's last.
    """

    config_class = MoCoV3Config

    def __init__(self, encoder: nn.Module, config: MoCoV3Config | None = None) -> None:
        config = config or MoCoV3Config()
        super().__init__(encoder, config)
        self.temperature = config.temperature
        head = ProjectionHead(self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers)
        dim = head.output_dim
        self.projector = nn.Sequential(head, nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(ProjectionHead(dim, config.hidden_dim, dim), nn.BatchNorm1d(dim, affine=False))
        self.momentum_encoder = MomentumEncoder(self._online(), config.momentum)

    def _online(self) -> nn.Sequential:
        return nn.Sequential(self.encoder, self.projector)

    def set_total_steps(self, total_steps: int) -> None:
        """The momentum rises to 1 over the run."""
        self.momentum_encoder.total_steps = total_steps

    def forward(self, views: Views) -> Objective:
        """InfoNCE of each view's query with the other view's key."""
        pair = views.require_pair("MoCo v3")
        first, second = encode_views(nn.Sequential(self.encoder, self.projector, self.predictor), pair)
        first_key, second_key = encode_views(self.momentum_encoder, pair)
        options: dict[str, Any] = {"temperature": self.temperature, "gather": True}
        forth, back = views.directions()
        losses = info_nce(first, second_key, positives=forth, **options)
        losses = losses + info_nce(second, first_key, positives=back, **options)
        metrics = {"positive_similarity": positive_similarity(first, second_key)}
        return Objective(2 * self.temperature * losses, metrics, features=(first, second_key))

    def after_step(self) -> None:
        """Move the key encoder."""
        self.momentum_encoder.update(self._online())
