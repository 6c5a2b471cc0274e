"""What the core asks of a domain, and where the domains are found."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from contrastive_mm.plugins import Registry, options_fault

if TYPE_CHECKING:
    from torch import Tensor, nn

    from contrastive_mm.batches import Batches
    from contrastive_mm.views import ViewMaker

DOMAINS = {
    "nlp": "contrastive_mm.nlp.domain:TextDomain",
    "rl": "contrastive_mm.rl.domain:ObservationDomain",
    "vision": "contrastive_mm.vision.domain:ImageDomain",
}
"""The project's own domains. A new one is a folder, and a line here."""

COMMAND_NAMES = ("demo", "embed", "evaluate")
"""What stands in a domain's place on the command line; no domain can take these names."""

CLASS_MEMBERS = ("default_method", "build_encoder", "train_batches", "evaluate", "embed", "save")


@dataclass(frozen=True)
class Embeddings:
    """Features with what they are features of.

    Attributes:
        features: (N, D) float32.
        ids: N names, unique in their source: a path, a row number, a frame.
        labels: N class names or numbers by which pictures are coloured; None where there is none.
        previews: N sentences, or N uint8 images of (H, W, 3), to show as neighbours.
    """

    features: Tensor
    ids: list[str]
    labels: list[str] | list[float] | None
    previews: Sequence[Any]


@runtime_checkable
class Domain(Protocol):
    """Everything that is particular to one kind of data.

    Made from its options (``config_class``, a dataclass), a seed, and a folder with what an earlier run of it
    saved (None in a new run). Its ``config`` then holds the options with every default decided, so that a saved
    configuration fits its encoder whatever data it is used on. It may list commands of its own
    (``domain_commands``).
    """

    config_class: ClassVar[type[Any]]
    default_method: ClassVar[str]
    config: Any

    def __init__(self, config: Any, seed: int, saved: Path | None = None) -> None: ...

    @property
    def make_views(self) -> ViewMaker:
        """What makes views of a batch; an attribute will do."""
        ...

    def build_encoder(self) -> nn.Module:
        """A new encoder with an integer ``feature_dim``, initialised from torch's global random state."""
        ...

    def train_batches(self) -> Batches:
        """Raw training batches, an epoch an iteration."""
        ...

    def evaluate(self, encoder: nn.Module | None) -> dict[str, float]:
        """Scores of frozen features on data held back from training; of the raw input where encoder is None."""
        ...

    def embed(self, encoder: nn.Module | None, everything: bool = False) -> Embeddings:
        """Embed the part held back from training (all where none is), or everything; raw input for None."""
        ...

    def save(self, folder: Path) -> None:
        """Keep what the options alone don't give back, such as a tokenizer."""
        ...


def _find_fault(found: Any) -> str | None:
    """What keeps another package's object from being a domain, or None."""
    for member in CLASS_MEMBERS:
        if not hasattr(found, member):
            return f"it has no {member!r}, which contrastive_mm.domain.Domain asks for"
    # `evaluate --data` and `embed` put another data set in the place of the one that a run was trained on.
    return options_fault(getattr(found, "config_class", None), required=("data",))


DOMAIN_REGISTRY = Registry("domain", "contrastive_mm.domains", DOMAINS, _find_fault, COMMAND_NAMES)


def load_domain(name: str) -> type[Any]:
    """Import the domain of a name, a class that fits ``Domain``; nothing of another domain is imported.

    Args:
        name: one of ``DOMAINS``, or one that an installed package offers in the entry-point group
            ``contrastive_mm.domains``.

    Raises:
        UserError: there is none (the message offers the nearest name), or the package that offers it is broken.
    """
    domain: type[Any] = DOMAIN_REGISTRY.load(name)
    return domain


def domain_commands(name: str) -> dict[str, Callable[[], Callable[..., None]]]:
    """What a domain does beyond pretraining, by the word behind its name on the command line.

    A domain lists them in ``commands``, a class attribute: word -> ``"module:function"``. A function's annotated
    parameters are its flags, its docstring is its help.

    Returns:
        For each word what imports and returns the function.

    Raises:
        UserError: as ``load_domain``.
    """
    commands: Mapping[str, str] = getattr(load_domain(name), "commands", {})
    return {word: partial(pkgutil.resolve_name, place) for word, place in commands.items()}


def recipe_folder(name: str) -> Path:
    """Where a domain's recipes lie: ``configs`` beside the module of its class.

    Raises:
        UserError: as ``load_domain``.
    """
    if name in DOMAINS:  # known without an import
        return Path(__file__).parent / name / "configs"
    return Path(inspect.getfile(load_domain(name))).parent / "configs"
