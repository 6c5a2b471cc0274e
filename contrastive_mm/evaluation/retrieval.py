"""Retrieval among samples with class labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.progress import progress

CHUNK_CELLS = 1 << 26
"""Cosines that are ranked at a time: 256 MiB of them."""


def retrieval_scores(
    query_features: Float[Tensor, "query dim"],
    query_labels: Int[Tensor, " query"],
    gallery_features: Float[Tensor, "gallery dim"],
    gallery_labels: Int[Tensor, " gallery"],
    recall_at: Sequence[int] = (),
) -> dict[str, float]:
    """How well the nearest gallery rows by cosine share a query's label.

    Queries whose label the gallery lacks are left out. Exact, on the device that the features are on.

    Args:
        query_features: rows that search.
        query_labels: their classes.
        gallery_features: rows that are searched; must not contain the queries themselves.
        gallery_labels: their classes.
        recall_at: numbers k for ``recall_at_k``.

    Returns:
        ``precision_at_1`` (share of queries whose nearest row has their label), ``mean_average_precision``
        (mean over queries of the area under precision and recall, over the whole gallery) and, for each k asked
        for, ``recall_at_k``: the share of queries with a row of their label among the k nearest (Oh Song et al.
        2016, section 5; not the share of relevant rows found). All lie between 0 and 1.

    Raises:
        UserError: no query has a label that the gallery has, so there is nothing to find; or a k below 1.
    """
    if any(k < 1 for k in recall_at):
        raise UserError(f"recall_at = {tuple(recall_at)}; each k must be at least 1.")
    device = gallery_features.device
    gallery, query_labels, gallery_labels = (
        F.normalize(gallery_features, dim=1),
        query_labels.to(device),
        gallery_labels.to(device),
    )
    known = torch.isin(query_labels, gallery_labels)
    if not known.any():
        raise UserError(
            f"Not one of the {len(query_labels)} queries has a label that occurs among the {len(gallery_labels)} "
            "gallery rows; retrieval needs classes that both have."
        )
    queries, labels = F.normalize(query_features[known], dim=1), query_labels[known]
    chunk = max(1, CHUNK_CELLS // len(gallery))
    average, found = 0.0, dict.fromkeys((1, *recall_at), 0.0)
    pairs = list(zip(queries.split(chunk), labels.split(chunk), strict=True))
    for rows, row_labels in progress(pairs, desc="rank", unit="chunk"):
        order = (rows @ gallery.T).argsort(dim=1, descending=True)
        hit = gallery_labels[order] == row_labels[:, None]
        average += float(_average_precision(hit).sum())
        for k in found:
            found[k] += float(hit[:, :k].any(dim=1).sum())
    scores = {"precision_at_1": found[1] / len(queries), "mean_average_precision": average / len(queries)}
    return scores | {f"recall_at_{k}": found[k] / len(queries) for k in recall_at}


def _average_precision(hit: Bool[Tensor, "query gallery"]) -> Float[Tensor, " query"]:
    """Mean precision at the ranks of the hits; each row has one at least."""
    ranks = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    precision = hit.cumsum(1) / ranks
    return (precision * hit).sum(1) / hit.sum(1)
