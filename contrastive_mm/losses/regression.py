"""Regression of one view's features on another's: the loss of methods without negatives."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from contrastive_mm.distributed import mean_row_count, refuse_together
from contrastive_mm.losses.checks import check_pair
from contrastive_mm.losses.similarity import full_precision, prepare_key


def negative_cosine(
    prediction: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"], gather: bool = False
) -> Float[Tensor, ""]:
    r"""Mean of :math:`-\cos(p_i, z_i)`: SimSiam's D (Chen & He 2021, equation 1).

    BYOL's loss (Grill et al. 2020, equation 2), the squared distance of the normalised features, is
    :math:`2 - 2 \cos(p_i, z_i)`, that is ``2 + 2 * negative_cosine(prediction, target)``.

    **The target receives no gradient**, whatever it comes from: both methods collapse with one.

    Args:
        prediction: (N, D) output of the predictor.
        target: (N, D) features of the other view; row i belongs with row i of ``prediction``.
        gather: in several processes, weigh the rows of all alike where they hold unequal numbers: the average of the
            processes' gradients is then that of the whole batch's loss. Nothing else is shared.

    Returns:
        The loss from -1 to 1 (in one process), a scalar in float32 (float64 for float64 features).

    Raises:
        UserError: shapes differ, no rows, or features that are not finite floating point.
    """
    with refuse_together(prediction, gather):
        check_pair(prediction, target, "prediction", "target")
    with full_precision(prediction):
        cosines = prepare_key(prediction, "cosine") * prepare_key(target.detach(), "cosine")
        return -cosines.sum() / (mean_row_count(prediction) if gather else len(prediction))
