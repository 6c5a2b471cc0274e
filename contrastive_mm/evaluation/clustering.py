"""Whether features fall into clusters that are the classes."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from contrastive_mm.errors import UserError


def matched_accuracy(clusters: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> float:
    """Share of samples whose cluster is matched with their class, 0 to 1.

    Each cluster is matched with at most one class and each class with at most one cluster, so that the share is
    the largest there is (Kuhn 1955, the Hungarian method; Yang et al. 2010, section 4.2).

    Raises:
        UserError: there are no samples.
    """
    if len(labels) == 0:
        raise UserError("Clusters of no samples can't be matched with classes; give at least one sample.")
    cluster, label = (values.cpu().unique(return_inverse=True)[1] for values in (clusters, labels))
    classes = int(label.max()) + 1
    counts = torch.bincount(cluster * classes + label, minlength=(int(cluster.max()) + 1) * classes)
    table = counts.view(-1, classes).numpy()
    matched = linear_sum_assignment(table, maximize=True)
    return float(table[matched].sum() / len(labels))


def clustering_scores(
    features: Float[Tensor, "samples dim"],
    labels: Int[Tensor, " samples"],
    restarts: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """k-means on normalised features with as many clusters as there are classes, held against the classes.

    Of the restarts, the one of the smallest within-cluster sum of squares counts: no label chooses it.

    Args:
        features: rows to cluster.
        labels: their classes; used for their number, and to score the clusters.
        restarts: random starts (k-means++).
        seed: of the starts.

    Returns:
        ``clustering_nmi`` (normalised mutual information, arithmetic mean), ``clustering_ari`` (adjusted Rand
        index, which is 0 by chance) and ``clustering_accuracy`` (``matched_accuracy``).

    Raises:
        UserError: there are no samples.
    """
    if len(labels) == 0:
        raise UserError("There are no samples to cluster; give at least one.")
    points = F.normalize(features, dim=1).cpu().numpy()
    kmeans = KMeans(len(labels.unique()), n_init=restarts, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct points than clusters: a collapsed encoder, and its scores will say so.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = kmeans.fit_predict(points).astype(np.int64)
    classes = labels.cpu()
    return {
        "clustering_nmi": float(normalized_mutual_info_score(classes.numpy(), clusters)),
        "clustering_ari": float(adjusted_rand_score(classes.numpy(), clusters)),
        "clustering_accuracy": matched_accuracy(torch.from_numpy(clusters), classes),
    }
