"""Options that many methods share, checked where they are read: before any data is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypedDict

import torch

from contrastive_mm.errors import UserError

# By the ends of names: "variance" is VICReg's invariance and covariance too.
LEAST = {"_dim": 1, "_size": 1, "_layers": 0, "_steps": 0, "_weight": 0.0, "variance": 0.0}
ABOVE_ZERO = ("temperature", "epsilon", "weight_concentration")
SHARES = ("momentum", "bank_momentum")


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Base of the methods' option classes: refuses what no method can use, by the option's name.

    Raises:
        UserError: NaN or infinity, a temperature not above 0, a momentum outside 0..1, a weight below 0, a size or
            dimension below 1, ...
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, usual = getattr(self, field.name), field.default
            flag = f"--{field.name.replace('_', '-')} = {value}"
            if value is None or isinstance(value, bool | str):
                continue
            if not math.isfinite(value):
                raise UserError(f"{flag}; it must be a finite number.")
            if field.name in ABOVE_ZERO and not value > 0:
                raise UserError(f"{flag}; it must be above 0.")
            if field.name in SHARES and not 0 <= value <= 1:
                raise UserError(f"{flag}; it must lie between 0 and 1.")
            for ending, bound in LEAST.items():
                # A method whose default is smaller (no queue, say) allows that much.
                least = min(bound, usual) if isinstance(usual, int | float) else bound
                if field.name.endswith(ending) and not value >= least:
                    raise UserError(f"{flag}; it must be at least {least}.")


class BankStorage(TypedDict):
    """Keyword arguments of a bank."""

    dtype: torch.dtype
    device: str | None


@dataclasses.dataclass(frozen=True)
class BankOptions(MethodOptions):
    """Of methods with features of earlier batches: how these are kept."""

    bank_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which the bank keeps features; half precision takes half the memory."""
    bank_device: Literal["same", "cpu"] = "same"
    """Where the bank lies: on the device that trains, or on the CPU, from where it is copied ahead for each step."""

    def bank(self) -> BankStorage:
        """As keyword arguments of ``FeatureQueue`` and ``InstanceBank``."""
        return {
            "dtype": getattr(torch, self.bank_dtype),
            "device": None if self.bank_device == "same" else self.bank_device,
        }
