"""Retrieval among samples with class labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError

CHUNK_ROWS = 1024


def retrieval_scores(
    query_features: Float[Tensor, "query dim"],
    query_labels: Int[Tensor, " query"],
    gallery_features: Float[Tensor, "gallery dim"],
    gallery_labels: Int[Tensor, " gallery"],
) -> dict[str, float]:
    """How well the nearest gallery rows by cosine share a query's label.

    Queries whose label the gallery lacks are left out.

    Args:
        query_features: rows that search.
        query_labels: their classes.
        gallery_features: rows that are searched; must not contain the queries themselves.
        gallery_labels: their classes.

    Returns:
        ``precision_at_1`` (share of queries whose nearest row has their label) and ``mean_average_precision``
        (mean over queries of the area under precision and recall), both 0 to 1.

    Raises:
        UserError: no query has a label that the gallery has, so there is nothing to find.
    """
    gallery = F.normalize(gallery_features, dim=1)
    known = torch.isin(query_labels, gallery_labels)
    if not known.any():
        raise UserError(
            f"Not one of the {len(query_labels)} queries has a label that occurs among the {len(gallery_labels)} "
            "gallery rows; retrieval needs classes that both have."
        )
    queries, labels = query_features[known], query_labels[known]
    first, average = 0.0, 0.0
    ranks = torch.arange(1, len(gallery) + 1)
    for rows, row_labels in zip(queries.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        order = (F.normalize(rows, dim=1) @ gallery.T).argsort(dim=1, descending=True)
        hit = (gallery_labels[order] == row_labels[:, None]).float()
        precision = hit.cumsum(1) / ranks
        first += float(hit[:, 0].sum())
        average += float(((precision * hit).sum(1) / hit.sum(1)).sum())
    return {"precision_at_1": first / len(queries), "mean_average_precision": average / len(queries)}
