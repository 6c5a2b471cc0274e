"""Fixed protocols that say what frozen features are worth."""

from contrastive_mm.evaluation.features import extract_features
from contrastive_mm.evaluation.knn import knn_accuracy
from contrastive_mm.evaluation.probes import few_label_accuracy, linear_probe_accuracy, ridge_r2
from contrastive_mm.evaluation.retrieval import retrieval_scores
from contrastive_mm.evaluation.splits import split_rows
from contrastive_mm.evaluation.unlabelled import unlabelled_scores
from contrastive_mm.geometry import alignment, effective_rank, uniformity

__all__ = [
    "alignment",
    "effective_rank",
    "extract_features",
    "few_label_accuracy",
    "knn_accuracy",
    "linear_probe_accuracy",
    "retrieval_scores",
    "ridge_r2",
    "split_rows",
    "uniformity",
    "unlabelled_scores",
]
