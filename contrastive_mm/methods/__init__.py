"""The methods by name. A new one is a file beside these and a line in ``METHODS``."""

from __future__ import annotations

from contrastive_mm.errors import unknown_name
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.methods.curl import CURL, CURLConfig
from contrastive_mm.methods.moco import MoCo, MoCoConfig
from contrastive_mm.methods.simclr import SimCLR, SimCLRConfig
from contrastive_mm.methods.simcse import SimCSE, SimCSEConfig

METHODS: dict[str, type[Method]] = {
    "curl": CURL,
    "moco": MoCo,
    "simclr": SimCLR,
    "simcse": SimCSE,
}


def get_method(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        UserError: there is none; the message offers the nearest name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


__all__ = [
    "CURL",
    "CURLConfig",
    "METHODS",
    "Method",
    "MoCo",
    "MoCoConfig",
    "Objective",
    "SimCLR",
    "SimCLRConfig",
    "SimCSE",
    "SimCSEConfig",
    "get_method",
]
