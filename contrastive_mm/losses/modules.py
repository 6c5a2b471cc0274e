"""The losses as modules, for people who like modules: options in the constructor, features in the call.

A module's temperature is a number, or a ``LearnableTemperature`` that is then among the module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.losses.barlow import barlow_twins
from contrastive_mm.losses.geometry import alignment_loss, uniformity_loss
from contrastive_mm.losses.info_nce import info_nce
from contrastive_mm.losses.nt_xent import dcl, hard_negative_nt_xent, nt_xent
from contrastive_mm.losses.regression import negative_cosine
from contrastive_mm.losses.ring import ring_info_nce
from contrastive_mm.losses.sigmoid import sigmoid_loss
from contrastive_mm.losses.similarity import LearnableTemperature, Similarity, check_temperature
from contrastive_mm.losses.supcon import supcon
from contrastive_mm.losses.swapped import swapped_prediction
from contrastive_mm.losses.triplet import triplet_margin
from contrastive_mm.losses.vicreg import vicreg


class TemperatureLoss(nn.Module):
    """A loss function with its options.

    Args:
        temperature: a number, or a module that gives a scalar tensor, such as ``LearnableTemperature``.
        options: the function's other keyword arguments. A similarity that is a module is trained with this one.

    Raises:
        UserError: a number not above 0; the function's errors come with the first call.
    """

    function: ClassVar[Callable[..., Tensor]]
    default_temperature: ClassVar[float] = 0.1

    def __init__(self, temperature: float | LearnableTemperature | None = None, **options: Any) -> None:
        super().__init__()
        temperature = self.default_temperature if temperature is None else temperature
        if not isinstance(temperature, nn.Module):
            check_temperature(temperature)
        self.temperature = temperature
        self.similarity: Similarity = options.pop("similarity", "cosine")
        self.options = options

    def forward(self, *features: Any, **more: Any) -> Float[Tensor, ""]:
        """The function's value; arguments as the function's."""
        temperature = self.temperature() if isinstance(self.temperature, nn.Module) else self.temperature
        options = {**self.options, **more}
        if self.similarity != "cosine":
            options["similarity"] = self.similarity
        return type(self).function(*features, temperature=temperature, **options)

    def extra_repr(self) -> str:
        """Options, for print."""
        shown = {"temperature": self.temperature, **self.options}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if not isinstance(value, nn.Module))


class NTXentLoss(TemperatureLoss):
    """``nt_xent`` as a module: ``NTXentLoss(0.1)(first, second)``."""

    function = staticmethod(nt_xent)


class InfoNCELoss(TemperatureLoss):
    """``info_nce`` as a module: ``InfoNCELoss(0.07, symmetric=True)(query, key)``."""

    function = staticmethod(info_nce)


class SupConLoss(TemperatureLoss):
    """``supcon`` as a module: ``SupConLoss(0.1)(first, second, labels)``."""

    function = staticmethod(supcon)


class DCLLoss(TemperatureLoss):
    """``dcl`` as a module: ``DCLLoss(0.1, weight_concentration=0.5)(first, second)``."""

    function = staticmethod(dcl)


class HardNegativeNTXentLoss(TemperatureLoss):
    """``hard_negative_nt_xent`` as a module: ``HardNegativeNTXentLoss(0.5, concentration=1.0)(first, second)``."""

    function = staticmethod(hard_negative_nt_xent)
    default_temperature = 0.5


class RingInfoNCELoss(TemperatureLoss):
    """``ring_info_nce`` as a module: ``RingInfoNCELoss(0.07, symmetric=True)(query, key)``."""

    function = staticmethod(ring_info_nce)


class SwappedPredictionLoss(TemperatureLoss):
    """``swapped_prediction`` as a module: ``SwappedPredictionLoss(0.1, epsilon=0.05)(scores)``."""

    function = staticmethod(swapped_prediction)


class SigmoidLoss(nn.Module):
    """``sigmoid_loss`` with the temperature and the bias that SigLIP learns (Zhai et al. 2023, section 3.2).

    Args:
        temperature: the first temperature.
        bias: the first bias.
        options: the function's other keyword arguments.

    Raises:
        UserError: as ``LearnableTemperature``.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, **options: Any) -> None:
        super().__init__()
        self.temperature = LearnableTemperature(temperature)
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        # A similarity with weights of its own is trained and saved with the rest.
        self.similarity: Similarity = options.pop("similarity", "cosine")
        self.options = options

    def forward(self, first: Tensor, second: Tensor) -> Float[Tensor, ""]:
        """The function's value."""
        return sigmoid_loss(first, second, self.temperature(), self.bias, self.similarity, **self.options)


class PlainLoss(nn.Module):
    """A loss function without temperature, with its options.

    Args:
        options: the function's keyword arguments.
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *features: Any, **more: Any) -> Float[Tensor, ""]:
        """The function's value; arguments as the function's."""
        return type(self).function(*features, **{**self.options, **more})

    def extra_repr(self) -> str:
        """Options, for print."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class TripletMarginLoss(PlainLoss):
    """``triplet_margin`` as a module: ``TripletMarginLoss(margin=0.2)(anchor, positive)``."""

    function = staticmethod(triplet_margin)


class BarlowTwinsLoss(PlainLoss):
    """``barlow_twins`` as a module."""

    function = staticmethod(barlow_twins)


class VICRegLoss(PlainLoss):
    """``vicreg`` as a module: ``VICRegLoss(invariance=25.0)(first, second)``."""

    function = staticmethod(vicreg)


class NegativeCosineLoss(PlainLoss):
    """``negative_cosine`` as a module: ``NegativeCosineLoss()(prediction, target)``."""

    function = staticmethod(negative_cosine)


class AlignmentLoss(PlainLoss):
    """``alignment_loss`` as a module: ``AlignmentLoss(power=2.0)(first, second)``."""

    function = staticmethod(alignment_loss)


class UniformityLoss(PlainLoss):
    """``uniformity_loss`` as a module: ``UniformityLoss(concentration=2.0)(features)``."""

    function = staticmethod(uniformity_loss)
