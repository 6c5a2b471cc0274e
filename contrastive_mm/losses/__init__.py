"""Contrastive losses as pure functions of features; no method, no state, useful without the rest.

Every loss computes in float32 or wider, whatever the features' type, and none holds a matrix of all pairs.
"""

from contrastive_mm.losses.geometry import alignment_loss, uniformity_loss
from contrastive_mm.losses.info_nce import info_nce
from contrastive_mm.losses.logsumexp import cross_logsumexp, self_logsumexp, two_way_logsumexp, use_form
from contrastive_mm.losses.modules import (
    DCLLoss,
    HardNegativeNTXentLoss,
    InfoNCELoss,
    NTXentLoss,
    SupConLoss,
)
from contrastive_mm.losses.nt_xent import dcl, hard_negative_nt_xent, nt_xent
from contrastive_mm.losses.ring import ring_info_nce
from contrastive_mm.losses.similarity import LearnableTemperature, Similarity, Temperature
from contrastive_mm.losses.supcon import supcon

__all__ = [
    "DCLLoss",
    "HardNegativeNTXentLoss",
    "InfoNCELoss",
    "LearnableTemperature",
    "NTXentLoss",
    "Similarity",
    "SupConLoss",
    "Temperature",
    "alignment_loss",
    "cross_logsumexp",
    "dcl",
    "hard_negative_nt_xent",
    "info_nce",
    "nt_xent",
    "ring_info_nce",
    "self_logsumexp",
    "supcon",
    "two_way_logsumexp",
    "uniformity_loss",
    "use_form",
]
