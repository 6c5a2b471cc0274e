"""NPID: every sample is a class of its own, told apart by a bank with one slot a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.distributed import mean_row_count
from contrastive_mm.errors import UserError
from contrastive_mm.heads import ProjectionHead
from contrastive_mm.memory import InstanceBank
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.methods.options import BankOptions
from contrastive_mm.views import Views, encode_views

NORMALISER_MOMENTUM = 0.9
"""Share of the running normaliser kept at each step: it averages noise over ten steps, and follows the features."""

WHOLE_BANK = 16
"""Up to so many slots a draw, products with all slots are faster than looking drawn slots up, and take less memory."""


@dataclass(frozen=True)
class NPIDConfig(BankOptions):
    """Instance discrimination (Wu et al. 2018)."""

    temperature: float = 0.07
    """Divides the cosine similarity."""
    bank_size: int = 0
    """Slots of the bank, one for each sample to train on; 0 takes their number from the data."""
    negatives: int = 4096
    """Noise samples drawn from the bank for each sample; 0 takes the whole bank (the full softmax, section 3.1)."""
    bank_momentum: float = 0.5
    """Share of a slot's old feature that stays when its sample is seen again."""
    projection_dim: int = 128
    """Dimensions of the bank's features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 0:
            raise UserError(f"--negatives = {self.negatives}; it must be 0 (the whole bank) or more.")


class NPID(Method):
    """Non-parametric instance discrimination (Wu et al. 2018, arXiv 1805.01978, equations 2 to 7).

    A view's feature behind one linear layer is told from noise samples of the bank: with ``h`` the posterior
    probability that a feature is the sample's own (equation 6), the loss is the noise-contrastive one (equation 7).
    Features of all views of a step are mixed into their samples' slots afterwards. Needs ``Views.sample_ids``, and
    refuses ``Views.positives``: they relate the rows of two views, and views are compared with slots here. A mixed
    view would be written into the slot of one sample, and spoil it.

    The normaliser Z (equation 8) is a running mean over steps. Paper and code keep the estimate of the first batches,
    which compare features with random slots: once the slots hold features, the true Z is larger by orders of
    magnitude, each noise sample looks like a positive, and the loss rises a hundredfold even where nothing is learned.
    How slots are written where paper and code disagree is said at ``InstanceBank``. The paper's proximal term
    (section 3.3) is left out, as in the code.
    """

    config_class = NPIDConfig

    def __init__(self, encoder: nn.Module, config: NPIDConfig | None = None) -> None:
        config = config or NPIDConfig()
        super().__init__(encoder, config)
        self.temperature, self.negatives = config.temperature, config.negatives
        self.projector = ProjectionHead(self.feature_dim, 0, config.projection_dim, num_layers=1)
        self._options = config
        self.bank: InstanceBank | None = None
        if config.bank_size:
            self._make_bank(config.bank_size)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._log_normaliser: Tensor | None = None
        self._new_log_normaliser: Tensor | None = None

    def _make_bank(self, size: int) -> InstanceBank:
        options = self._options
        bank = InstanceBank(size, options.projection_dim, options.bank_momentum, **options.bank())
        self.bank = bank.to(next(self.projector.parameters()).device)
        return bank

    def _require_bank(self) -> InstanceBank:
        if self.bank is None:
            raise UserError(
                "NPID keeps a slot for each sample and doesn't know their number: set bank_size in NPIDConfig "
                "(--bank-size), or call set_num_samples before training."
            )
        return self.bank

    def set_num_samples(self, num_samples: int) -> None:
        """Make the bank, unless ``bank_size`` has said its size.

        Raises:
            UserError: ``bank_size`` is smaller.
        """
        bank = self.bank or self._make_bank(num_samples)
        if len(bank) < num_samples:
            raise UserError(
                f"--bank-size = {len(bank)}, but there are {num_samples} samples to train on, which need a slot "
                "each; 0 takes their number from the data."
            )

    def forward(self, views: Views) -> Objective:
        """Tell each view's own slot from the others, the mean over all full views.

        Raises:
            UserError: the views carry no sample ids, or one outside the bank, or the bank has no size yet.
        """
        views.refuse_positives("NPID")
        ids = views.sample_ids
        if ids is None:
            raise UserError("NPID keeps a slot a sample and needs Views.sample_ids: let the batch carry its `index`.")
        bank = self._require_bank()
        encoded = encode_views(self._project, views.inputs[: views.num_global])
        features = [F.normalize(feature.float(), dim=1) for feature in encoded]
        losses = [self._loss(feature, ids) for feature in features]
        if self.training:
            self._seen.append((ids, F.normalize(torch.stack(features).mean(0).detach(), dim=1)))
        own = (features[0].detach() * bank.read(ids)).sum(1).mean()
        pair = (features[0], bank.read(ids).float())
        return Objective(torch.stack(losses).mean(), {"positive_similarity": own}, features=pair)

    def after_step(self) -> None:
        """Keep the running normaliser, then mix this step's features into the bank."""
        if self._new_log_normaliser is not None:
            self._log_normaliser, self._new_log_normaliser = self._new_log_normaliser, None
        bank = self._require_bank()
        for ids, features in self._seen:
            bank.write(ids, features)
        self._seen.clear()
        if self._reads_all(bank):
            bank.prefetch()

    def get_extra_state(self) -> dict[str, float | None]:
        """The running normaliser, for ``state_dict``."""
        return {"log_normaliser": None if self._log_normaliser is None else float(self._log_normaliser)}

    def set_extra_state(self, state: Any) -> None:
        """Take back what ``get_extra_state`` gave."""
        kept = state["log_normaliser"]
        self._log_normaliser = None if kept is None else torch.tensor(kept)

    def _running_log_normaliser(self, estimate: Tensor) -> Tensor:
        """The logarithm of the mean of Z over earlier steps and this one; the first step's is its own estimate."""
        if self._log_normaliser is None:
            return estimate
        kept = self._log_normaliser.to(estimate) + math.log(NORMALISER_MOMENTUM)
        return torch.logaddexp(kept, estimate + math.log(1 - NORMALISER_MOMENTUM))

    def _project(self, inputs: object) -> object:
        return self.projector(self.encoder(inputs))

    def _loss(self, features: Float[Tensor, "batch dim"], ids: Tensor) -> Tensor:
        bank = self._require_bank()
        own = (features * bank.read(ids)).sum(1) / self.temperature
        if self.negatives == 0:
            logits = features @ bank.features().float().T / self.temperature
            return F.cross_entropy(logits, ids.long(), reduction="sum") / mean_row_count(features)
        noise = self._noise(features, bank) / self.temperature
        log_normaliser = self._running_log_normaliser(bank.log_normaliser(noise.detach()))
        if self.training:
            self._new_log_normaliser = log_normaliser
        # h = P / (P + m P_n), with P = exp(s) / Z and P_n = 1 / n: a sigmoid of s - log Z - log(m / n).
        offset = log_normaliser + math.log(self.negatives / len(bank))
        losses = -(F.logsigmoid(own - offset) + F.logsigmoid(offset - noise).sum(1))
        return losses.sum() / mean_row_count(features)

    def _noise(self, features: Float[Tensor, "batch dim"], bank: InstanceBank) -> Float[Tensor, "batch draws"]:
        """Dot products with drawn slots."""
        ids = bank.sample_negatives(len(features), self.negatives)
        if self._reads_all(bank):
            return (features @ bank.features().float().T).gather(1, ids)
        return torch.einsum("bd,bkd->bk", features, bank.read(ids).float())

    def _reads_all(self, bank: InstanceBank) -> bool:
        return self.negatives == 0 or len(bank) <= WHOLE_BANK * self.negatives
