"""A linear probe for data of any size: full-batch L-BFGS on the device that the features are on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.progress import progress

CHUNK_ROWS = 1 << 16
ITERATIONS = 300
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.2
SMALLEST_SCALE = 0.1
"""Of the median deviation: no dimension is divided by less."""


@dataclass(frozen=True)
class LinearProbe:
    """A trained linear classifier of frozen features.

    Attributes:
        classes: (C,) labels that it tells apart, ascending.
        mean: (D,) taken off features.
        scale: (D,) by which they are then divided.
        weight: (C, D), of standardised features.
        bias: (C,).
    """

    classes: Int[Tensor, " classes"]
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, " classes"]

    def predict(self, features: Float[Tensor, "samples dim"]) -> Int[Tensor, " samples"]:
        """The likeliest label of each row, on the probe's device."""
        rows = features.to(self.weight.device).split(CHUNK_ROWS)
        standardised = ((chunk - self.mean) / self.scale for chunk in rows)
        best = [F.linear(chunk, self.weight, self.bias).argmax(dim=1) for chunk in standardised]
        return self.classes[torch.cat(best)]

    def accuracy(self, features: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"]) -> float:
        """Share of rows whose label it finds, 0 to 1."""
        return float((self.predict(features) == labels.to(self.weight.device)).double().mean())


def fit_linear_probe(
    features: Float[Tensor, "samples dim"],
    labels: Int[Tensor, " samples"],
    strength: float = 1.0,
    statistics: Float[Tensor, "others dim"] | None = None,
) -> LinearProbe:
    """Multinomial logistic regression on standardised features.

    Minimises the summed cross-entropy plus ||W||^2 / (2 ``strength``), the bias free: scikit-learn's objective with
    ``C = strength``. At most 300 iterations of L-BFGS from zero.

    Args:
        features: rows to learn from; where they lie, the work is done.
        labels: their classes, any integers.
        strength: C, the inverse of the penalty.
        statistics: features whose mean and deviation standardise; by default ``features`` themselves.

    Raises:
        UserError: the rows are not of two classes at least.
    """
    classes, target = labels.to(features.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"A linear probe needs rows of at least 2 classes, but there are {len(labels)} rows of {len(classes)}."
        )
    mean, scale = _standardisation(features if statistics is None else statistics)
    rows = (features - mean) / scale
    weight = torch.zeros(len(classes), features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(len(classes), device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-4, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=features.device)
        # In chunks, each with its own backward pass: a million rows' logits of a thousand classes would not fit.
        for inputs, wanted in zip(rows.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True):
            loss = F.cross_entropy(F.linear(inputs, weight, bias), wanted, reduction="sum") / len(rows)
            loss.backward()
            total += loss.detach()
        penalty = weight.square().sum() / (2 * strength * len(rows))
        penalty.backward()
        return total + penalty.detach()

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearProbe(classes, mean, scale, weight.detach(), bias.detach())


def _standardisation(
    features: Float[Tensor, "samples dim"],
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Mean and standard deviation of each dimension, the latter at least a tenth of the median of those that vary.

    A pixel that is black in nearly every training image would else be blown up, and a little light or noise there
    would outweigh the picture.
    """
    mean, scale = features.mean(0), features.std(0, correction=0)
    varies = features.amax(0) > features.amin(0)
    if not varies.any():
        return mean, torch.ones_like(scale)
    return mean, scale.clamp_min(SMALLEST_SCALE * float(scale[varies].median()))


def choose_strength(
    features: Float[Tensor, "samples dim"],
    labels: Int[Tensor, " samples"],
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> float:
    """The strength whose probe does best on a fifth of the training rows that it did not learn from.

    The fifth is drawn from each class; of equals the strongest penalty is taken. Where no class has a row to
    spare (fewer than 3 samples each) the strength is 1.

    Args:
        features: training features.
        labels: their classes.
        strengths: candidates for C.
        seed: of the draw.
    """
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(HELD_OUT * len(members))]]] = True
    if not held_out.any():
        return 1.0
    known, unknown = features[(~held_out).to(features.device)], features[held_out.to(features.device)]
    best, chosen = -1.0, 1.0
    for strength in progress(sorted(strengths), desc="choose penalty", unit="fit"):
        accuracy = fit_linear_probe(known, labels[~held_out], strength).accuracy(unknown, labels[held_out])
        if accuracy > best:
            best, chosen = accuracy, strength
    return chosen
