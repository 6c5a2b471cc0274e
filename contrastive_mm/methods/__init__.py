"""The methods by name. A new one is a file beside these and a line in ``METHODS``."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.plugins import Registry, options_fault

if TYPE_CHECKING:  # for editors, which then complete these names; at run time __getattr__ finds them in METHODS
    from contrastive_mm.methods.curl import CURL, CURLConfig
    from contrastive_mm.methods.moco import MoCo, MoCoConfig
    from contrastive_mm.methods.simclr import SimCLR, SimCLRConfig
    from contrastive_mm.methods.simcse import SimCSE, SimCSEConfig

METHODS = {
    "curl": "contrastive_mm.methods.curl:CURL",
    "moco": "contrastive_mm.methods.moco:MoCo",
    "simclr": "contrastive_mm.methods.simclr:SimCLR",
    "simcse": "contrastive_mm.methods.simcse:SimCSE",
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
