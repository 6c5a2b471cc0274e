"""The methods by name. A new one is a file beside these and a line in ``METHODS``."""

from __future__ import annotations

from contrastive_mm.errors import unknown_name
from contrastive_mm.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.methods.byol import BYOL, BYOLConfig
from contrastive_mm.methods.curl import CURL, CURLConfig
from contrastive_mm.methods.moco import MoCo, MoCoConfig
from contrastive_mm.methods.simclr import SimCLR, SimCLRConfig
from contrastive_mm.methods.simcse import SimCSE, SimCSEConfig
from contrastive_mm.methods.simsiam import SimSiam, SimSiamConfig
from contrastive_mm.methods.swav import SwAV, SwAVConfig
from contrastive_mm.methods.vicreg import VICReg, VICRegConfig

METHODS: dict[str, type[Method]] = {
    "barlow-twins": BarlowTwins,
    "byol": BYOL,
    "curl": CURL,
    "moco": MoCo,
    "simclr": SimCLR,
    "simcse": SimCSE,
    "simsiam": SimSiam,
    "swav": SwAV,
    "vicreg": VICReg,
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
    "BYOL",
    "BYOLConfig",
    "BarlowTwins",
    "BarlowTwinsConfig",
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
    "SimSiam",
    "SimSiamConfig",
    "SwAV",
    "SwAVConfig",
    "VICReg",
    "VICRegConfig",
    "get_method",
]
