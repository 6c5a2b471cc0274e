"""Contrastive losses as pure functions of features; no method, no state, useful without the rest.

Every loss computes in float32 or wider, whatever the features' type, and none holds a matrix of all pairs.
"""

from contrastive_mm.losses.barlow import barlow_twins
from contrastive_mm.losses.geometry import alignment_loss, uniformity_loss
from contrastive_mm.losses.info_nce import info_nce
from contrastive_mm.losses.logsumexp import cross_logsumexp, self_logsumexp, two_way_logsumexp, use_form
from contrastive_mm.losses.modules import (
    AlignmentLoss,
    BarlowTwinsLoss,
    DCLLoss,
    HardNegativeNTXentLoss,
    InfoNCELoss,
    NegativeCosineLoss,
    NTXentLoss,
    RingInfoNCELoss,
    SigmoidLoss,
    SupConLoss,
    SwappedPredictionLoss,
    TripletMarginLoss,
    UniformityLoss,
    VICRegLoss,
)
from contrastive_mm.losses.nt_xent import dcl, hard_negative_nt_xent, nt_xent
from contrastive_mm.losses.regression import negative_cosine
from contrastive_mm.losses.ring import ring_info_nce
from contrastive_mm.losses.sigmoid import sigmoid_loss
from contrastive_mm.losses.similarity import LearnableTemperature, Similarity, Temperature
from contrastive_mm.losses.supcon import supcon
from contrastive_mm.losses.swapped import sinkhorn, swapped_prediction
from contrastive_mm.losses.triplet import triplet_margin
from contrastive_mm.losses.vicreg import vicreg

__all__ = [
    "AlignmentLoss",
    "NegativeCosineLoss",
    "RingInfoNCELoss",
    "SwappedPredictionLoss",
    "UniformityLoss",
    "BarlowTwinsLoss",
    "DCLLoss",
    "HardNegativeNTXentLoss",
    "InfoNCELoss",
    "LearnableTemperature",
    "NTXentLoss",
    "SigmoidLoss",
    "Similarity",
    "SupConLoss",
    "Temperature",
    "TripletMarginLoss",
    "VICRegLoss",
    "alignment_loss",
    "barlow_twins",
    "cross_logsumexp",
    "dcl",
    "hard_negative_nt_xent",
    "info_nce",
    "negative_cosine",
    "nt_xent",
    "ring_info_nce",
    "self_logsumexp",
    "sigmoid_loss",
    "sinkhorn",
    "supcon",
    "swapped_prediction",
    "triplet_margin",
    "two_way_logsumexp",
    "uniformity_loss",
    "use_form",
    "vicreg",
]
