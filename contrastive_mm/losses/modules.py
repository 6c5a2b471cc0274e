"""The losses as modules, for people who like modules: options in the constructor, features in the call.

A module's temperature is a number, or a ``LearnableTemperature`` that is then among the module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.losses.info_nce import info_nce
from contrastive_mm.losses.nt_xent import dcl, hard_negative_nt_xent, nt_xent
from contrastive_mm.losses.similarity import LearnableTemperature, Similarity, check_temperature
from contrastive_mm.losses.supcon import supcon


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

    def forward(self, *features: Tensor | None, **more: Any) -> Float[Tensor, ""]:
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
    """``hard_negative_nt_xent`` as a module; its temperature is a number."""

    function = staticmethod(hard_negative_nt_xent)
    default_temperature = 0.5
