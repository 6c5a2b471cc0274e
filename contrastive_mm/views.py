"""What a domain hands to a method: several views of the same samples.

A method never learns what an image, a sentence or an observation is; it sees ``Views``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.positives import Positives

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""One view of a batch: a tensor, or tensors by name (token ids and attention mask, say), rows first."""


def num_rows(inputs: Inputs) -> int:
    """The number of samples in one view."""
    tensor = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    return tensor.shape[0]


@dataclass(frozen=True)
class Views:
    """Several views of one batch; row ``i`` of each view is sample ``i``.

    Attributes:
        inputs: the V views. The first ``num_global`` are full views; the rest are small crops, which methods
            with multi-crop compare with the full ones.
        num_global: how many views are full ones.
        sample_ids: (B,) number of each sample in its data set, for banks that keep one slot a sample.
        labels: (B,) class of each sample, for supervised positives; None where there is none.
        positives: how much row j of the second view belongs with row i of the first, where it is not simply the same
            row: mixed samples, groups, soft weights, neighbours in time. Methods that regress or cluster, and NPID,
            refuse it; all others take it.

    Raises:
        UserError: no view at all, an empty one, views of different numbers of rows, ids or labels of another
            number, or ``num_global`` out of range.
    """

    inputs: tuple[Inputs, ...]
    num_global: int = 2
    sample_ids: Tensor | None = None
    labels: Tensor | None = None
    positives: Positives | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("Views needs at least one view; `inputs` is empty.")
        if any(not isinstance(view, Tensor) and not view for view in self.inputs):
            raise UserError("Views: a view of named tensors names none; `inputs` holds an empty mapping.")
        rows = [num_rows(view) for view in self.inputs]
        if len(set(rows)) > 1:
            raise UserError(f"Views must have one row a sample in every view, but their row counts are {rows}.")
        for name in ("sample_ids", "labels"):
            value = getattr(self, name)
            if value is not None and (value.ndim == 0 or len(value) != rows[0]):
                raise UserError(
                    f"Views.{name} has shape {tuple(value.shape)}, but the views have {rows[0]} rows; give one a row."
                )
        if not 1 <= self.num_global <= len(self.inputs):
            raise UserError(
                f"num_global = {self.num_global}, but there are {len(self.inputs)} views; "
                f"set it to a number from 1 to {len(self.inputs)}."
            )

    @property
    def batch_size(self) -> int:
        """The number of samples."""
        return num_rows(self.inputs[0])

    def require_pair(self, method: str) -> tuple[Inputs, Inputs]:
        """The two views that a two-view method works on.

        Raises:
            UserError: there are not exactly two views.
        """
        if len(self.inputs) != 2:
            raise UserError(
                f"{method} compares exactly 2 views, but the view maker gave {len(self.inputs)}: have it make 2 (of "
                "images: --small-crops 0), or choose a method that takes more, such as swav."
            )
        return self.inputs[0], self.inputs[1]

    def directions(self) -> tuple[Positives | None, Positives | None]:
        """``positives`` of the first view's rows in the second, and of the second view's rows in the first."""
        return self.positives, None if self.positives is None else self.positives.transposed()

    def refuse_positives(self, method: str) -> None:
        """For methods that have no use for ``positives``, which would train as if there were none.

        Raises:
            UserError: there are some.
        """
        if self.positives is not None:
            raise UserError(
                f"{method} holds each row against its own sample only, and takes no Views.positives (mixed views, "
                "groups, ...): leave them out (of images: --mix none), or choose a method that compares a batch's "
                "samples, such as simclr."
            )


@runtime_checkable
class ViewMaker(Protocol):
    """Turns a raw batch into views, on the batch's device, random for each sample.

    A view maker that holds random state also has ``state_dict`` and ``load_state_dict``, so that a resumed
    run draws the views which the uninterrupted run would have drawn.
    """

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """Make the views of one batch."""
        ...


class RandomStream:
    """A seeded source of random numbers on whichever device they are asked for.

    Views draw from a stream of their own, so switching them on or off leaves every other random number of a
    program (dropout, an agent's exploration) as it was.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator for a device, made from the seed at the first call."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[key]

    def state_dict(self) -> dict[str, Any]:
        """The seed and the state of each generator used so far."""
        return {"seed": self.seed, "states": {k: g.get_state() for k, g in self._generators.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.seed = state["seed"]
        self._generators = {}
        for key, value in state["states"].items():
            self.on(torch.device(key)).set_state(value)


def _signature(inputs: Inputs) -> tuple[Any, ...]:
    """Views of one signature can share a forward pass: same names and same shape but for the rows."""
    if isinstance(inputs, Tensor):
        return (inputs.shape[1:], inputs.dtype)
    return tuple(sorted((name, tensor.shape[1:], tensor.dtype) for name, tensor in inputs.items()))


def _concatenate(views: list[Inputs]) -> Inputs:
    first = views[0]
    if isinstance(first, Tensor):
        return torch.cat([view for view in views if isinstance(view, Tensor)])
    names = list(first)
    mappings = [view for view in views if not isinstance(view, Tensor)]
    return {name: torch.cat([view[name] for view in mappings]) for name in names}


def encode_views(encoder: Callable[[Any], Any], inputs: tuple[Inputs, ...]) -> list[Float[Tensor, "batch ..."]]:
    """Encode several views, all views of one size in one forward pass.

    One pass over both views is faster than two, and BatchNorm then sees the statistics of all views together,
    as in SimCLR (Chen et al. 2020, section 2.1) and SwAV's multi-crop.

    Args:
        encoder: maps (B, ...) to pooled (B, D) or dense (B, T, D) features.
        inputs: the views; those of equal shape are concatenated along the rows.

    Returns:
        The (B, D) or (B, T, D) output for each view, in the order of ``inputs``; T may differ from view to view.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, view in enumerate(inputs):
        groups.setdefault(_signature(view), []).append(index)
    outputs: dict[int, Tensor] = {}
    for indices in groups.values():
        members = [inputs[index] for index in indices]
        encoded = encoder(members[0] if len(members) == 1 else _concatenate(members))
        outputs.update(zip(indices, encoded.split([num_rows(view) for view in members]), strict=True))
    return [outputs[index] for index in range(len(inputs))]
