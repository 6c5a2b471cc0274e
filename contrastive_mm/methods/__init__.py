"""The methods by name. A new one is a file beside these and a line in ``METHODS``."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.plugins import Registry, options_fault

if TYPE_CHECKING:  # for editors, which then complete these names; at run time __getattr__ finds them in METHODS
    from contrastive_mm.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
    from contrastive_mm.methods.byol import BYOL, BYOLConfig
    from contrastive_mm.methods.curl import CURL, CURLConfig
    from contrastive_mm.methods.dcl import DCL, DCLConfig
    from contrastive_mm.methods.moco import MoCo, MoCoConfig
    from contrastive_mm.methods.moco_v3 import MoCoV3, MoCoV3Config
    from contrastive_mm.methods.nnclr import NNCLR, NNCLRConfig
    from contrastive_mm.methods.npid import NPID, NPIDConfig
    from contrastive_mm.methods.simclr import SimCLR, SimCLRConfig
    from contrastive_mm.methods.simclr_v2 import SimCLRV2, SimCLRV2Config
    from contrastive_mm.methods.simcse import SimCSE, SimCSEConfig
    from contrastive_mm.methods.simsiam import SimSiam, SimSiamConfig
    from contrastive_mm.methods.supcon import SupCon, SupConConfig
    from contrastive_mm.methods.swav import SwAV, SwAVConfig
    from contrastive_mm.methods.vicreg import VICReg, VICRegConfig

METHODS = {
    "barlow-twins": "contrastive_mm.methods.barlow_twins:BarlowTwins",
    "byol": "contrastive_mm.methods.byol:BYOL",
    "curl": "contrastive_mm.methods.curl:CURL",
    "dcl": "contrastive_mm.methods.dcl:DCL",
    "moco": "contrastive_mm.methods.moco:MoCo",
    "moco-v3": "contrastive_mm.methods.moco_v3:MoCoV3",
    "nnclr": "contrastive_mm.methods.nnclr:NNCLR",
    "npid": "contrastive_mm.methods.npid:NPID",
    "simclr": "contrastive_mm.methods.simclr:SimCLR",
    "simclr-v2": "contrastive_mm.methods.simclr_v2:SimCLRV2",
    "simcse": "contrastive_mm.methods.simcse:SimCSE",
    "simsiam": "contrastive_mm.methods.simsiam:SimSiam",
    "supcon": "contrastive_mm.methods.supcon:SupCon",
    "swav": "contrastive_mm.methods.swav:SwAV",
    "vicreg": "contrastive_mm.methods.vicreg:VICReg",
}


def _find_fault(found: Any) -> str | None:
    """What keeps another package's object from being a method, or None."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        return "it is no subclass of contrastive_mm.methods.Method"
    if inspect.isabstract(found):
        return f"it doesn't define {', '.join(sorted(found.__abstractmethods__))}"
    return options_fault(getattr(found, "config_class", None))


METHOD_REGISTRY = Registry("method", "contrastive_mm.methods", METHODS, _find_fault)


def get_method(name: str) -> type[Method]:
    """The method of a name; no other method is imported.

    Args:
        name: one of ``METHODS``, or one that an installed package offers in the entry-point group
            ``contrastive_mm.methods``.

    Raises:
        UserError: there is none (the message offers the nearest name), or the package that offers it is broken.
    """
    method: type[Method] = METHOD_REGISTRY.load(name)
    return method


def __getattr__(name: str) -> Any:
    """A method's class, or its options' class, from the file that ``METHODS`` names."""
    for place in METHODS.values():
        module, _, method = place.partition(":")
        if name in (method, f"{method}Config"):
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'contrastive_mm.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = [place.partition(":")[2] for place in METHODS.values()]
    return sorted([*globals(), *classes, *(f"{name}Config" for name in classes)])
