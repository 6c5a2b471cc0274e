"""How two features are compared, and how sharply.

Every similarity is a dot product of prepared features, so that one exact kernel serves all: cosine normalises,
dot leaves features as they are, and a bilinear form maps the queries first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.errors import UserError

Similarity: TypeAlias = Literal["cosine", "dot"] | Callable[[Tensor], Tensor]
"""``"cosine"``; ``"dot"``; or a map of the queries whose dot product with a key is the similarity, such as
``heads.BilinearSimilarity`` (CURL's q W k)."""

Temperature: TypeAlias = float | Tensor
"""A number, or a scalar tensor (``LearnableTemperature()()``) that receives a gradient."""

LARGEST_SCALE = 100.0


class LearnableTemperature(nn.Module):
    """A temperature that is learned as CLIP learns it (Radford et al. 2021, section 2.5).

    The logarithm of 1/T is the parameter. Where a step has taken it beyond 1/T = 100 it is put back, so that
    training can't run away to ever sharper softmaxes.

    Args:
        initial: first temperature.
        largest_scale: upper bound of 1/T.

    Raises:
        UserError: the initial temperature or the scale is not above 0, or the former below 1 / largest_scale.
    """

    def __init__(self, initial: float = 0.07, largest_scale: float = LARGEST_SCALE) -> None:
        super().__init__()
        check_temperature(initial)
        if not 0 < largest_scale < math.inf:
            raise UserError(f"largest_scale = {largest_scale}; it bounds 1 / temperature and must be above 0.")
        if 1 / initial > largest_scale:
            raise UserError(f"The first temperature {initial} is below 1 / largest_scale = {1 / largest_scale}.")
        self.largest_scale = largest_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(initial)))

    def extra_repr(self) -> str:
        """The temperature, for print."""
        return f"{float((-self.log_scale.detach()).exp()):.4g}, largest_scale={self.largest_scale}"

    def forward(self) -> Float[Tensor, ""]:
        """The temperature in use."""
        with torch.no_grad():
            # The parameter itself, as in CLIP's training loop: clamping only its use would leave it without gradient.
            self.log_scale.clamp_(max=math.log(self.largest_scale))
        return (-widen(self.log_scale)).exp()


def check_temperature(temperature: Temperature) -> None:
    """A number above 0; the value of a tensor is looked at on the CPU only.

    Raises:
        UserError: it is not.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise UserError(f"`temperature` has shape {tuple(temperature.shape)}; give one number or a scalar tensor.")
        if temperature.device.type != "cpu" or torch.compiler.is_compiling():
            return
    value = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    if not 0 < value < math.inf:
        raise UserError(f"temperature = {value}; it divides the similarity and must be above 0.")


def widen(features: Tensor) -> Tensor:
    """Features in float32 or wider: in half precision ``exp(similarity / T)`` loses the gradient's digits."""
    return features if features.dtype == torch.float64 else features.float()


def unit_rows(features: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows divided by their length. A row of zeros stays one and gets no gradient: its direction is unknown."""
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / length.masked_fill(length == 0, math.inf)


def check_symmetric(similarity: object) -> None:
    """Make sure that a similarity treats both of its sides alike.

    Raises:
        UserError: it is neither ``"cosine"`` nor ``"dot"``.
    """
    if callable(similarity):
        raise UserError("All views are compared alike here, which a map of the queries doesn't; use info_nce.")
    if similarity not in ("cosine", "dot"):
        raise UserError(f"similarity = {similarity!r}; it must be 'cosine' or 'dot'.")


def check_directions(symmetric: bool, similarity: Similarity) -> None:
    """Make sure that a similarity can be asked for from both sides, where it is.

    Raises:
        UserError: a map of the queries in two directions, or an unknown name.
    """
    if symmetric and callable(similarity):
        raise UserError("A map of the queries has one direction: set symmetric=False, or similarity='cosine'.")
    if not callable(similarity):
        _check_name(similarity)


def _check_name(similarity: str) -> None:
    if similarity not in ("cosine", "dot"):
        raise UserError(f"similarity = {similarity!r}; it must be 'cosine', 'dot' or a map of the queries.")


def prepare_query(features: Tensor, similarity: Similarity) -> Tensor:
    """Features on the left of the dot product, in float32 or wider.

    Raises:
        UserError: unknown name of a similarity.
    """
    if callable(similarity):
        return similarity(widen(features))
    return prepare_key(features, similarity)


def prepare_key(features: Tensor, similarity: Similarity) -> Tensor:
    """Features on the right of the dot product, in float32 or wider."""
    if not callable(similarity):
        _check_name(similarity)
    return unit_rows(widen(features)) if similarity == "cosine" else widen(features)


def scale_of(temperature: Temperature, features: Tensor) -> float | Tensor:
    """1 / T, fit to multiply ``features``; a tensor keeps its gradient."""
    if isinstance(temperature, Tensor):
        return 1.0 / temperature.to(features).reshape(())
    return 1.0 / float(temperature)


def full_precision(features: Tensor) -> torch.autocast:
    """Autocast would turn the dot products back to half precision; switch it off inside a loss."""
    return torch.autocast(features.device.type, enabled=False)
