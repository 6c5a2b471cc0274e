"""Losses that a rival library has too: the same value and the same gradients on the same tensors."""

import torch
import torch.nn.functional as F
from parity import DIM, QUEUE, Case
from rival_libraries import (
    lightly,
    lightly_moco,
    metric_learning,
    metric_learning_dot,
    metric_learning_queue,
    metric_learning_related,
    metric_learning_triplet,
    open_clip,
    sentence_ranking,
    sentence_triplet,
)

from contrastive_mm.losses import (
    alignment_loss,
    barlow_twins,
    dcl,
    hard_negative_nt_xent,
    info_nce,
    negative_cosine,
    nt_xent,
    sigmoid_loss,
    supcon,
    swapped_prediction,
    triplet_margin,
    uniformity_loss,
    vicreg,
)
from contrastive_mm.memory import FeatureQueue

BOTH_VIEWS = ("query_to_doc", "query_to_query")
"""sentence-transformers' name for candidates from both views."""


def views(given):
    return torch.cat([given.first, given.second])


def samples(given):
    """The number of each row's sample in ``views``."""
    return torch.arange(len(given.first)).repeat(2)


def unit(given):
    return F.normalize(given.first, dim=1), F.normalize(given.second, dim=1)


def pair(given):
    return given.first, given.second


def moco(given, negatives):
    return info_nce(*pair(given), negatives, given.temperature, in_batch_negatives=False)


def queued(given, batch):
    queue = FeatureQueue(QUEUE, DIM, dtype=given.stream.dtype)
    for rows in given.stream.split(batch):
        queue.push(rows)
    return queue.features()


NT_XENT = (
    Case(
        "nt_xent, lightly",
        "lightly",
        lambda given: nt_xent(*pair(given), given.temperature),
        lambda given: lightly("NTXentLoss", temperature=given.temperature)(*pair(given)),
    ),
    Case(
        "nt_xent at T = 0.01, lightly",
        "lightly",
        lambda given: nt_xent(*pair(given), 0.01),
        lambda given: lightly("NTXentLoss", temperature=0.01)(*pair(given)),
    ),
    Case(
        "nt_xent, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: nt_xent(*pair(given), given.temperature),
        lambda given: metric_learning("NTXentLoss", temperature=given.temperature)(views(given), samples(given)),
        conversion="It knows classes and no views: both views of a sample get the sample's number as their class.",
    ),
    Case(
        "nt_xent of dot products, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: nt_xent(*pair(given), given.temperature, similarity="dot"),
        lambda given: metric_learning_dot(views(given), samples(given), given.temperature),
        conversion="As with cosines; and its similarity normalises unless told not to.",
    ),
    Case(
        "nt_xent, sentence-transformers",
        "sentence-transformers",
        lambda given: nt_xent(*pair(given), 0.2),
        lambda given: (
            sum(sentence_ranking(0.2, *order, directions=BOTH_VIEWS) for order in (pair(given), pair(given)[::-1])) / 2
        ),
        conversion="Its anchors are the rows of one view alone: NT-Xent is the mean of both orders of the views.",
    ),
    Case(
        "hard_negative_nt_xent without prior and weights, lightly",
        "lightly",
        lambda given: hard_negative_nt_xent(*pair(given), given.temperature, concentration=0.0, positive_prior=0.0),
        lambda given: lightly("NTXentLoss", temperature=given.temperature)(*pair(given)),
        conversion="None of the four has these weights or debiased negatives; without both the loss is NT-Xent.",
    ),
    Case(
        "dcl, lightly",
        "lightly",
        lambda given: dcl(*pair(given), given.temperature),
        lambda given: lightly("DCLLoss", temperature=given.temperature)(*pair(given)),
    ),
    Case(
        "dcl with weights (DCLW), lightly",
        "lightly",
        lambda given: dcl(*pair(given), given.temperature, weight_concentration=0.5),
        lambda given: lightly("DCLWLoss", temperature=given.temperature, sigma=0.5)(*pair(given)),
    ),
)

INFO_NCE = (
    Case(
        "info_nce with a queue alone (MoCo), lightly",
        "lightly",
        lambda given: moco(given, given.queue),
        lambda given: lightly_moco(*pair(given), given.queue, given.temperature, batch=QUEUE),
    ),
    Case(
        "info_nce with a FeatureQueue that has turned over (MoCo), lightly",
        "lightly",
        lambda given: moco(given, queued(given, batch=4)),
        lambda given: lightly_moco(*pair(given), given.stream, given.temperature, batch=4),
        conversion="Its bank starts with random rows, ours empty: both are filled before they are used.",
    ),
    Case(
        "info_nce with batch and queue, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: info_nce(*pair(given), given.queue, given.temperature),
        lambda given: metric_learning_queue(*pair(given), given.queue, given.temperature),
        conversion="It knows classes and no queue: every row of the queue is a class of its own.",
    ),
    Case(
        "info_nce, sentence-transformers",
        "sentence-transformers",
        lambda given: info_nce(*pair(given), temperature=given.temperature),
        lambda given: sentence_ranking(given.temperature, *pair(given)),
    ),
    Case(
        "info_nce with given negatives (supervised SimCSE), sentence-transformers",
        "sentence-transformers",
        lambda given: info_nce(*pair(given), given.other, given.temperature),
        lambda given: sentence_ranking(given.temperature, *pair(given), given.other),
    ),
    Case(
        "info_nce both ways, sentence-transformers",
        "sentence-transformers",
        lambda given: info_nce(*pair(given), temperature=given.temperature, symmetric=True),
        lambda given: sentence_ranking(
            given.temperature,
            *pair(given),
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        ),
    ),
    Case(
        "info_nce both ways (CLIP), open_clip",
        "open_clip_torch",
        lambda given: info_nce(*pair(given), temperature=given.temperature, symmetric=True),
        lambda given: open_clip("ClipLoss", *unit(given), given.temperature),
        conversion="Its models normalise features, so its loss does not.",
    ),
    Case(
        "info_nce both ways of dot products, open_clip",
        "open_clip_torch",
        lambda given: info_nce(*pair(given), temperature=given.temperature, symmetric=True, similarity="dot"),
        lambda given: open_clip("ClipLoss", *pair(given), given.temperature),
    ),
    Case(
        "sigmoid_loss (SigLIP), open_clip",
        "open_clip_torch",
        lambda given: sigmoid_loss(*pair(given), given.temperature, given.bias),
        lambda given: open_clip("SigLipLoss", *unit(given), given.temperature, given.bias),
        conversion="Its models normalise features, so its loss does not.",
    ),
)

LABELLED = (
    Case(
        "supcon of two views, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: supcon(*pair(given), given.labels, given.temperature),
        lambda given: metric_learning("SupConLoss", temperature=given.temperature)(
            views(given), given.labels.repeat(2)
        ),
    ),
    Case(
        "supcon of one view with classes of one sample, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: supcon(given.first, None, given.labels, given.temperature),
        lambda given: metric_learning("SupConLoss", temperature=given.temperature)(given.first, given.labels),
    ),
    Case(
        "supcon of a matrix, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: supcon(given.first, None, given.related, given.temperature),
        lambda given: metric_learning_related(given.first, given.related, given.temperature),
        conversion="It takes pairs of row numbers in the place of a matrix.",
    ),
    Case(
        "triplet_margin, hard, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: triplet_margin(views(given), views(given), 0.5, given.labels.repeat(2), "hard"),
        lambda given: metric_learning_triplet(views(given), views(given), given.labels.repeat(2), "hard", 0.5),
        conversion="Its default is the mean over triplets with a loss above 0; it is told to take that over all.",
    ),
    Case(
        "triplet_margin, hard, sentence-transformers",
        "sentence-transformers",
        lambda given: triplet_margin(
            views(given), views(given), 1.0, given.labels.repeat(2), "hard", normalize=False, squared=False
        ),
        lambda given: sentence_triplet("BatchHardTripletLoss", views(given), given.labels.repeat(2), margin=1.0),
    ),
    Case(
        "triplet_margin with soft margin, sentence-transformers",
        "sentence-transformers",
        lambda given: triplet_margin(
            views(given), views(given), None, given.labels.repeat(2), "hard", normalize=False, squared=False
        ),
        lambda given: sentence_triplet("BatchHardSoftMarginTripletLoss", views(given), given.labels.repeat(2)),
    ),
    Case(
        "triplet_margin, semi-hard, sentence-transformers",
        "sentence-transformers",
        lambda given: triplet_margin(
            torch.cat([given.first, given.other]),
            torch.cat([given.other, given.first]),
            0.5,
            samples(given),
            normalize=False,
            squared=False,
        ),
        lambda given: sentence_triplet(
            "BatchSemiHardTripletLoss", torch.cat([given.first, given.other]), samples(given), margin=0.5
        ),
        conversion="It takes every pair of a class as anchor and positive: the class is the sample, of two views.",
    ),
)

WITHOUT_NEGATIVES = (
    Case(
        "barlow_twins, lightly",
        "lightly",
        lambda given: barlow_twins(*pair(given), offdiagonal_weight=0.02),
        lambda given: lightly("BarlowTwinsLoss", lambda_param=0.02)(*pair(given)),
    ),
    Case(
        "vicreg, lightly",
        "lightly",
        lambda given: vicreg(*pair(given), 25.0, 15.0, 2.0),
        lambda given: lightly("VICRegLoss", lambda_param=25.0, mu_param=15.0, nu_param=2.0)(*pair(given)),
    ),
    Case(
        "vicreg, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: vicreg(*pair(given), 25.0, 15.0, 2.0),
        lambda given: metric_learning("VICRegLoss", invariance_lambda=25, variance_mu=15, covariance_v=2)(
            given.first, ref_emb=given.second
        ),
    ),
    Case(
        "negative_cosine (SimSiam, BYOL), lightly",
        "lightly",
        lambda given: negative_cosine(*pair(given)),
        lambda given: lightly("NegativeCosineSimilarity")(given.first, given.second.detach()),
        conversion="It leaves it to the caller to take the target's gradient away.",
    ),
    Case(
        "swapped_prediction (SwAV), lightly",
        "lightly",
        lambda given: swapped_prediction([given.scores_0, given.scores_1], 2, given.temperature),
        lambda given: lightly("SwaVLoss", temperature=given.temperature)([given.scores_0, given.scores_1], []),
    ),
    Case(
        "swapped_prediction of full views and a crop with a queue (SwAV), lightly",
        "lightly",
        lambda given: swapped_prediction(
            [given.scores_0, given.scores_1, given.scores_2],
            2,
            given.temperature,
            epsilon=0.1,
            iterations=4,
            queue_scores=given.queue_scores.split(QUEUE),
        ),
        lambda given: lightly("SwaVLoss", temperature=given.temperature, sinkhorn_epsilon=0.1, sinkhorn_iterations=4)(
            [given.scores_0, given.scores_1], [given.scores_2], given.queue_scores.split(QUEUE)
        ),
    ),
    Case(
        "alignment_loss and uniformity_loss, lightly",
        "lightly",
        lambda given: (
            alignment_loss(*pair(given), power=3.0)
            + 0.7 * (uniformity_loss(given.first, 1.5) + uniformity_loss(given.second, 1.5)) / 2
        ),
        lambda given: lightly("HypersphereLoss", t=1.5, lam=0.7, alpha=3.0)(*pair(given)),
        conversion="It has one loss of alignment and of the mean uniformity of both views.",
    ),
)

CASES = (*NT_XENT, *INFO_NCE, *LABELLED, *WITHOUT_NEGATIVES)
