"""SwAV: views agree on the cluster that they are assigned to, not on their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_mm.distributed import process_count, process_index
from contrastive_mm.errors import UserError
from contrastive_mm.heads import ProjectionHead
from contrastive_mm.losses.similarity import full_precision, widen
from contrastive_mm.losses.swapped import swapped_prediction
from contrastive_mm.memory import FeatureQueue
from contrastive_mm.methods.base import Method, Objective, positive_similarity
from contrastive_mm.methods.options import BankOptions
from contrastive_mm.views import Views, encode_views

FULL_VIEWS = 2


@dataclass(frozen=True)
class SwAVConfig(BankOptions):
    """SwAV (Caron et al. 2020)."""

    temperature: float = 0.1
    """Divides the scores where one view predicts another's assignment."""
    num_prototypes: int = 300
    """Clusters (3,000 on ImageNet): several times the number of classes that the data may have."""
    epsilon: float = 0.05
    """Smoothness of the assignments; larger is softer. Lower it where all samples share one
    assignment, or the loss stays at log(num_prototypes)."""
    sinkhorn_iterations: int = 3
    """Rounds that make the assignments use every prototype equally."""
    freeze_prototypes_steps: int = 100
    """Steps at the start in which the prototypes stay as they are (the released code's first epoch)."""
    queue_size: int = 0
    """Earlier features of each full view that help to spread the assignments, for batches smaller than the number
    of prototypes (3,840 at a batch of 256 in the paper); 0 keeps none."""
    queue_start_steps: int = 500
    """Steps before the queue is used (15 epochs in the paper): early features change too quickly."""
    projection_layers: int = 2
    """Linear layers of the projection head: 2 is the paper's; 0 compares the encoder's features themselves."""
    hidden_dim: int = 512
    """Width of the projection head's hidden layer (2048 with a ResNet-50 in the paper)."""
    projection_dim: int = 128
    """Dimensions in which features meet the prototypes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_prototypes", 2), ("queue_size", 0), ("sinkhorn_iterations", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} = {getattr(self, name)}; it must be at least {least}.")


class SwAV(Method):
    """SwAV (Caron et al. 2020, arXiv 2006.09882): swapped prediction (equations 1 to 5) with multi-crop (equation 6).

    Every view after the first ``Views.num_global`` is a small crop: it predicts the assignments of the full views and
    gives none itself. Views of one size share a forward pass.

    Where paper and released code differ, or the code and this one:

    - The paper adds the terms of all pairs of views; the code takes their mean, and so does this one.
    - The code brings the prototypes to length 1 before each step, this one after each step (and at the start), so
      that a saved model is normalised too.
    - Frozen prototypes get a gradient of 0 here, and none in the code; their directions stay the same, and
      DistributedDataParallel need not look for unused parameters.
    - The code begins to fill the queue when it is due and waits until it is full. Here it is filled from the first
      step, so that it is ready when it is due, and used with what it holds.
    - Scores are computed in float32 under mixed precision too; the code divides half-precision scores by 0.05.

    In several processes the queue holds the features of all of them, and each brings its share of it.
    """

    config_class = SwAVConfig

    def __init__(self, encoder: nn.Module, config: SwAVConfig | None = None) -> None:
        config = config or SwAVConfig()
        super().__init__(encoder, config)
        self.projector = ProjectionHead(
            self.feature_dim, config.hidden_dim, config.projection_dim, config.projection_layers
        )
        dim = self.projector.output_dim
        self.prototypes = nn.Linear(dim, config.num_prototypes, bias=False)
        self._normalise_prototypes()
        self.queues: Any = nn.ModuleList(
            FeatureQueue(config.queue_size, dim, **config.bank())
            for _ in range(FULL_VIEWS if config.queue_size else 0)
        )
        # A plain integer, not a tensor: reading it on a GPU would wait for it at every step.
        self._steps = 0
        self._new_features: list[list[Tensor]] = []

    def forward(self, views: Views) -> Objective:
        """Swapped prediction between each full view and every other view."""
        self._check(views)
        encoded = encode_views(self._project, views.inputs)
        with full_precision(encoded[0]):
            features = [F.normalize(widen(each), dim=1) for each in encoded]
            prototypes = self._prototype_weights().to(features[0])
            scores = [F.linear(each, prototypes) for each in features]
            loss = swapped_prediction(
                scores,
                views.num_global,
                self.config.temperature,
                self.config.epsilon,
                self.config.sinkhorn_iterations,
                self._queue_scores(),
            )
        if self.training and self.queues:
            self._new_features.append([each.detach() for each in features[:FULL_VIEWS]])
        # What is predicted, and not the codes: Sinkhorn's are spread evenly by construction.
        use = (scores[0].detach() / self.config.temperature).softmax(1).mean(0)
        metrics = {"positive_similarity": positive_similarity(features[0], features[1])}
        return Objective(loss, metrics, features=(features[0], features[1]), prototype_use=use)

    def after_step(self) -> None:
        """Bring the prototypes back to length 1, and put this step's features into the queues."""
        self._normalise_prototypes()
        self._steps += 1
        for of_views in self._new_features:
            for queue, features in zip(self.queues, of_views, strict=True):
                queue.push(features)
        self._new_features.clear()
        for queue in self.queues:
            queue.prefetch()

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps, for ``state_dict``."""
        return {"steps": self._steps}

    def set_extra_state(self, state: Any) -> None:
        """Take back what ``get_extra_state`` gave."""
        self._steps = int(state["steps"])

    def _check(self, views: Views) -> None:
        views.refuse_positives("SwAV")
        if len(views.inputs) < 2:
            raise UserError("SwAV compares views of a sample: the view maker gave 1, it must give at least 2.")
        if self.queues and views.num_global != FULL_VIEWS:
            raise UserError(
                f"SwAV keeps a queue for each of {FULL_VIEWS} full views, but the view maker says "
                f"num_global = {views.num_global}; set it to {FULL_VIEWS}, or --queue-size to 0."
            )

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))

    def _prototype_weights(self) -> Tensor:
        weights = self.prototypes.weight
        return weights.detach() + 0 * weights if self._steps < self.config.freeze_prototypes_steps else weights

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def _queue_scores(self) -> list[Tensor] | None:
        """This process's share of the queues against the prototypes; None while they are not to be used."""
        if not self.queues or self._steps < self.config.queue_start_steps or len(self.queues[0]) == 0:
            return None
        held = [queue.features()[process_index() :: process_count()] for queue in self.queues]
        return [F.linear(features.float(), self.prototypes.weight.detach().float()) for features in held]
