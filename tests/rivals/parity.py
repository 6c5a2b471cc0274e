"""What a comparison with another library is: the tensors, a case, its value and its gradients.

The cases themselves are in ``rival_cases`` (the same loss) and ``rival_differences`` (another loss, explained);
``rival_libraries`` calls the rivals. ``benchmarks/rival_values.py`` records what these say where they are installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, DIM, PROTOTYPES, QUEUE = 7, 5, 4, 12

CONSTANT = ("queue", "stream", "queue_scores")
"""Inputs of floating point that no loss gives a gradient."""

SMALLEST = 1e-3
"""Values and gradients below this are compared absolutely, as if they were of this size."""

Loss = Callable[[Any], Tensor]
"""A function of what ``inputs`` gives."""


@dataclass(frozen=True)
class Case:
    """One of our losses beside a rival's."""

    name: str
    rival: str
    """The library's name on the package index."""
    ours: Loss
    theirs: Loss
    conversion: str = ""
    """What has to be done to one of the two, and why; empty where both are called as they are."""


@dataclass(frozen=True)
class Difference(Case):
    """A rival's loss that is another one than ours."""

    explained: str = ""
    """What the rival does otherwise."""
    reproduced: Loss | None = None
    """The rival's loss made of our parts, as the explanation says."""


@dataclass(frozen=True)
class Outcome:
    """The value of a loss and its gradients; an input that the loss did not use has none."""

    value: float
    gradients: dict[str, Tensor]

    def difference(self, other: Outcome) -> float:
        """Largest difference of the values and of all gradients, each relative to the size of ``other``'s."""
        differences = [abs(self.value - other.value) / max(abs(other.value), SMALLEST)]
        for name in self.gradients.keys() | other.gradients.keys():
            mine, its = (torch.as_tensor(each.gradients.get(name, 0.0)).double() for each in (self, other))
            differences.append(float((mine - its).abs().max()) / max(float(its.abs().max()), SMALLEST))
        # max() may pass over a NaN.
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def wave(rows: int, dim: int, frequency: float) -> Tensor:
    """Numbers from -1 to 1 by a formula, and so the same everywhere and always.

    The square of the position makes the rows of full rank; a plain sine of the position has rank 2.
    """
    numbers = [math.sin(math.sqrt(frequency) * (position + 1) ** 2) for position in range(rows * dim)]
    return torch.tensor(numbers, dtype=torch.float64).reshape(rows, dim)


def inputs(dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Small tensors of every kind that a case needs."""
    first = 1.3 * wave(ROWS, DIM, 2)
    floating = {
        "first": first,
        # Views of the same samples: positives are more alike than most negatives, but not all of them.
        "second": first + 0.8 * wave(ROWS, DIM, 3),
        # Rows that have nothing to do with them; as positives some are farther away than any negative.
        "other": 0.9 * wave(ROWS, DIM, 5),
        "queue": F.normalize(wave(QUEUE, DIM, 7), dim=1),
        # Keys of earlier steps in the order in which they came: more than the queue holds.
        "stream": F.normalize(wave(QUEUE + 8, DIM, 11), dim=1),
        "temperature": torch.tensor(0.2, dtype=torch.float64),
        "bias": torch.tensor(-1.5, dtype=torch.float64),
        "scores_0": wave(ROWS, PROTOTYPES, 13),
        "scores_1": wave(ROWS, PROTOTYPES, 17),
        "scores_2": wave(ROWS, PROTOTYPES, 19),
        "queue_scores": wave(2 * QUEUE, PROTOTYPES, 23),
    }
    # Classes of three, two, one and one samples; and who belongs with whom in a way that classes can't say.
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    steps = (torch.arange(ROWS)[:, None] - torch.arange(ROWS)[None]).abs()
    return SimpleNamespace(
        labels=labels,
        related=steps.eq(2) | steps.eq(5),
        **{name: tensor.to(dtype) for name, tensor in floating.items()},
    )


def evaluate(loss: Loss, dtype: torch.dtype = torch.float64) -> Outcome:
    """Value of a loss and its gradients by all inputs that may have one."""
    given = inputs(dtype)
    leaves = {
        name: tensor.requires_grad_()
        for name, tensor in vars(given).items()
        if tensor.is_floating_point() and name not in CONSTANT
    }
    value = loss(given).reshape(())
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return Outcome(float(value.detach()), found)
