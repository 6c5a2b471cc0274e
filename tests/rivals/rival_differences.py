"""Losses of rivals that go by the same name and are not the same: what they do otherwise, rebuilt from our parts."""

import torch
import torch.nn.functional as F
from parity import Difference
from rival_cases import moco, pair, queued, samples, unit, views
from rival_libraries import (
    lightly,
    lightly_moco,
    metric_learning,
    metric_learning_triplet,
    sentence_ranking,
)

from contrastive_mm.losses import (
    cross_logsumexp,
    info_nce,
    negative_cosine,
    self_logsumexp,
    supcon,
    triplet_margin,
)


def squared_distances(anchor, positive):
    """(N, N) between normalised rows."""
    anchor, positive = (F.normalize(features, dim=1) for features in (anchor, positive))
    return (anchor[:, None] - positive[None]).square().sum(2)


def mean_of_hard_triplets_above_zero(given):
    loss = triplet_margin(views(given), views(given), 0.0, samples(given), "hard")
    squares, same = squared_distances(views(given), views(given)), samples(given)[:, None] == samples(given)[None]
    farthest, nearest = squares.masked_fill(~same, 0).amax(1), squares.masked_fill(same, torch.inf).amin(1)
    return loss * len(squares) / (farthest > nearest).sum()


def semi_hard_where_a_negative_is_farther(given):
    loss = triplet_margin(given.first, given.other, 0.5, mining="semi-hard")
    squares = squared_distances(given.first, given.other)
    own, farthest = squares.diagonal(), squares.masked_fill(torch.eye(len(squares), dtype=torch.bool), 0).amax(1)
    without = farthest <= own
    left_out = F.relu(own - farthest + 0.5)[without].sum()
    return (loss * len(squares) - left_out) / (~without).sum()


def each_positive_against_negatives_alone(given):
    labels = given.labels.repeat(2)
    features = F.normalize(views(given), dim=1) * given.temperature.rsqrt()
    negatives, similar = self_logsumexp(features, ids=labels)[:, None], features @ features.T
    positives = (labels[:, None] == labels[None]) & ~torch.eye(len(labels), dtype=torch.bool)
    return (torch.logaddexp(similar, negatives) - similar)[positives].mean()


def negatives_weighted_without_gradient(given):
    query, key = unit(given)
    numbers = torch.arange(len(query))
    # Two dot products in one: s / T, and 9 s without gradient.
    twofold = torch.cat([query / given.temperature, 9 * query.detach()], 1), torch.cat([key, key.detach()], 1)
    positive = (query * key).sum(1) / given.temperature
    return (torch.logaddexp(positive, cross_logsumexp(*twofold, numbers, numbers)) - positive).mean()


DIFFERENCES = (
    Difference(
        "MoCo with a queue that batches do not divide, lightly",
        "lightly",
        lambda given: moco(given, queued(given, batch=5)),
        lambda given: lightly_moco(*pair(given), given.stream, given.temperature, batch=5),
        explained="A batch that reaches the end of its bank is cut off there: of 20 rows in batches of 5 its bank of "
        "12 lacks rows 12 to 14 and still holds rows 5 to 7. FeatureQueue wraps and holds the newest 12.",
        reproduced=lambda given: moco(given, given.stream[[15, 16, 17, 18, 19, 5, 6, 7, 8, 9, 10, 11]]),
    ),
    Difference(
        "negative cosine without detach, lightly",
        "lightly",
        lambda given: negative_cosine(*pair(given)),
        lambda given: lightly("NegativeCosineSimilarity")(*pair(given)),
        explained="It gives the target a gradient, with which SimSiam and BYOL collapse; ours takes it away.",
        reproduced=lambda given: (
            negative_cosine(given.first, given.second)
            + negative_cosine(given.second, given.first)
            - negative_cosine(given.first, given.second).detach()
        ),
    ),
    Difference(
        "NT-Xent on classes, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: supcon(*pair(given), given.labels, given.temperature),
        lambda given: metric_learning("NTXentLoss", temperature=given.temperature)(
            views(given), given.labels.repeat(2)
        ),
        explained="With several positives it is not SupCon: each positive stands against the negatives alone, without "
        "the other positives, and every pair weighs the same where SupCon weighs every view the same.",
        reproduced=each_positive_against_negatives_alone,
    ),
    Difference(
        "hardness weights, sentence-transformers",
        "sentence-transformers",
        lambda given: info_nce(*pair(given), temperature=given.temperature),
        lambda given: sentence_ranking(
            given.temperature, *pair(given), hardness_mode="in_batch_negatives", hardness_strength=9.0
        ),
        explained="It adds 9 times the cosine, without gradient, to the logits of negatives (Lan et al. 2025, "
        "equation 5); hard_negative_nt_xent (Robinson et al. 2021) divides such weights by their mean and gives them "
        "a gradient.",
        reproduced=negatives_weighted_without_gradient,
    ),
    Difference(
        "hard triplets with its own mean, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: triplet_margin(views(given), views(given), 0.0, samples(given), "hard"),
        lambda given: metric_learning_triplet(
            views(given), views(given), samples(given), "hard", margin=0.0, reducer="AvgNonZeroReducer"
        ),
        explained="Its default is the mean over triplets with a loss above 0, so that the gradient does not fade as "
        "fewer are left; ours is over all, as in Hermans et al. 2017.",
        reproduced=mean_of_hard_triplets_above_zero,
    ),
    Difference(
        "semi-hard triplets, pytorch-metric-learning",
        "pytorch-metric-learning",
        lambda given: triplet_margin(given.first, given.other, 0.5, mining="semi-hard"),
        lambda given: metric_learning_triplet(
            given.first, given.other, torch.arange(len(given.first)), "semihard", margin=0.5
        ),
        explained="An anchor whose positive is farther away than all negatives is left out; ours takes the farthest "
        "negative then, as sentence-transformers does.",
        reproduced=semi_hard_where_a_negative_is_farther,
    ),
)
