"""Fixed protocols that say what frozen features are worth."""

from contrastive_mm.evaluation.clustering import clustering_scores, matched_accuracy
from contrastive_mm.evaluation.features import extract_features
from contrastive_mm.evaluation.kept import KeptResults, read_results
from contrastive_mm.evaluation.knn import default_neighbours, knn_accuracy, knn_predict
from contrastive_mm.evaluation.linear import LinearProbe, choose_strength, fit_linear_probe
from contrastive_mm.evaluation.probes import draw_share, few_label_accuracy, linear_probe_accuracy, ridge_r2
from contrastive_mm.evaluation.retrieval import retrieval_scores
from contrastive_mm.evaluation.splits import split_rows
from contrastive_mm.evaluation.unlabelled import unlabelled_scores
from contrastive_mm.geometry import alignment, effective_rank, uniformity

__all__ = [
    "KeptResults",
    "LinearProbe",
    "alignment",
    "choose_strength",
    "clustering_scores",
    "default_neighbours",
    "draw_share",
    "effective_rank",
    "extract_features",
    "few_label_accuracy",
    "fit_linear_probe",
    "knn_accuracy",
    "knn_predict",
    "linear_probe_accuracy",
    "matched_accuracy",
    "read_results",
    "retrieval_scores",
    "ridge_r2",
    "split_rows",
    "uniformity",
    "unlabelled_scores",
]
