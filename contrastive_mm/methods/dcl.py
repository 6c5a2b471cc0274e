"""DCL: SimCLR whose positives are no longer among the candidates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses import dcl
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class DCLConfig(MethodOptions):
    """Decoupled contrastive learning (Yeh et al. 2022)."""

    temperature: float = 0.1
    """Divides the cosine similarity."""
    weight_concentration: float | None = None
    """Sigma of the weighted form DCLW (0.5 in the paper), which weighs distant positives more; none by default."""
    projection_layers: int = 2
    """Linear layers of the projection head; 0 compares the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layer."""
    projection_dim: int = 128
    """Dimensions in which views are compared."""


class DCL(Method):
    """DCL (Yeh et al. 2022, arXiv 2110.06848): SimCLR's model with the decoupled loss.

    Small batches lose less than with SimCLR, since an easy positive no longer shrinks the negatives' gradient.

    Where paper and released code differ, or the code and this one:

    - The paper sums over rows; the code takes the mean over one direction, this one over both.
    - The code subtracts 103 from the logits of a row with itself and with its positive. They are left out here: at a
      temperature of 0.01 and below they would come back.
    - The code compares features as they are, and leaves it to the caller to normalise them.
    - In the code DCLW's weights carry a gradient, which the paper does not speak of; here they don't.
    """

    config_class = DCLConfig

    def __init__(self, encoder: nn.Module, config: DCLConfig | None = None) -> None:
        config = config or DCLConfig()
        super().__init__(encoder, config)
        self.options = config
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers
        )

    def forward(self, views: Views) -> Objective:
        """The decoupled loss between the two views."""
        first, second = encode_views(self._project, views.require_pair("DCL"))
        loss = dcl(
            first,
            second,
            self.options.temperature,
            weight_concentration=self.options.weight_concentration,
            positives=views.positives,
            gather=True,
        )
        metrics = {"positive_similarity": positive_similarity(first, second)}
        # With positives their number differs from row to row.
        candidates = 2 * len(first) - 2 if views.positives is None else None
        return Objective(loss, metrics, (first, second), candidates=candidates, temperature=self.options.temperature)

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))
