"""SimCSE: the same input twice, told apart only by dropout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from contrastive_mm.distributed import gather_with_gradient
from contrastive_mm.errors import UserError
from contrastive_mm.losses import info_nce
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import MethodOptions
from contrastive_mm.views import Views, encode_views


@dataclass(frozen=True)
class SimCSEConfig(MethodOptions):
    """SimCSE without labels (Gao et al. 2021)."""

    temperature: float = 0.05
    """Divides the cosine similarity."""
    mlp: bool = True
    """A linear layer with tanh before the loss, in training only: the paper's way with the first token's state.
    Its mean-pooled encoders go without."""


class SimCSE(Method):
    """SimCSE (Gao et al. 2021, arXiv 2104.08821), without labels (equation 4) and with them (equation 5).

    InfoNCE with cosine similarity over the batch, one direction, behind a linear layer with tanh that is used
    in training only (section 6.3). With two dropout views (``contrastive_mm.nlp``) it is the unsupervised method;
    with an anchor and its positive, and as third view a hard negative, the supervised one: every hard negative of
    the batch is a candidate for every anchor.

    Where paper and released code differ, or the code and this one:

    - The paper keeps the layer in its supervised models; here it is a part of training in both.
    - The paper's appendix and the code can weigh an anchor's own hard negative otherwise than the others'. The paper
      found no gain over equal weights, which are taken here.
    - In several processes the code compares with the others' sentences without their gradient, which then is not
      that of the whole batch. Here it is.
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
        """InfoNCE from the first view to the second, against the third too where there is one.

        Raises:
            UserError: one view, or more than three.
        """
        if len(views.inputs) not in (2, 3):
            raise UserError(
                f"SimCSE compares 2 views, or 2 and a hard negative, but the view maker gave {len(views.inputs)}."
            )
        first, second, *hard = encode_views(self._project, views.inputs)
        loss = info_nce(
            first,
            second,
            negatives=gather_with_gradient(hard[0]).rows if hard else None,
            temperature=self.temperature,
            positives=views.positives,
            gather=True,
        )
        metrics = {"positive_similarity": positive_similarity(first, second)}
        candidates = len(first) * (1 + len(hard))
        return Objective(loss, metrics, (first, second), candidates=candidates, temperature=self.temperature)

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))
