"""Slowly moving copies of an encoder."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from contrastive_mm.errors import UserError

BufferRule: TypeAlias = Literal["own", "copy"]


def cosine_momentum(base: float, step: int, total: int) -> float:
    r"""The momentum of one update, on half a cosine from ``base`` up to 1.

    :math:`1 - (1 - base) (\cos(\pi k / K) + 1) / 2`: BYOL (Grill et al. 2020, section 3.3), and so MoCo v3's
    released code (Chen et al. 2021).

    Args:
        base: momentum of the first update.
        step: k, updates done so far; from ``total`` on the momentum is 1.
        total: K, updates in the run.
    """
    return 1.0 - (1.0 - base) * (math.cos(math.pi * min(step, total) / total) + 1.0) / 2.0


class MomentumEncoder(nn.Module):
    """A copy whose weights follow the original's: ``theta_k <- m theta_k + (1 - m) theta_q``.

    MoCo (He et al. 2020, equation 2). The copy receives no gradient. It follows the train/eval mode of the
    model around it, so dropout and BatchNorm act on keys as they act on queries. One ``update`` belongs to one
    optimizer step, however many batches its gradient was gathered from; ``state_dict`` holds how many there were.

    Args:
        source: the module to follow; copied here once, not held.
        momentum: m, from 0 (copy at each update) to 1 (never move); of the first update where it is scheduled.
        total_steps: updates over which m rises from ``momentum`` to 1 (``cosine_momentum``); None keeps it
            constant. The attribute may be set later, once the length of the run is known.
        buffers: ``"own"`` leaves buffers to the copy: its BatchNorm layers gather running statistics from the
            batches that it encodes itself, as in MoCo's released code. ``"copy"`` overwrites them with
            the source's at each update, which suits a copy that stays in eval mode and gathers none.
        module: a slow copy that exists already, such as an agent's target encoder: it is used, frozen and updated
            in place of a new copy.
        updated_elsewhere: whether the owner of ``module`` moves it; ``update`` then leaves it alone.

    Raises:
        UserError: momentum outside 0..1, total_steps below 1, another rule for buffers, ``updated_elsewhere``
            without ``module``, or a ``module`` that doesn't match ``source`` or has parameters in common with it.
    """

    def __init__(
        self,
        source: nn.Module,
        momentum: float = 0.99,
        *,
        total_steps: int | None = None,
        buffers: BufferRule = "own",
        module: nn.Module | None = None,
        updated_elsewhere: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise UserError(f"momentum = {momentum}; it must lie between 0 and 1.")
        if buffers not in ("own", "copy"):
            raise UserError(f"buffers = {buffers!r}; it must be 'own' or 'copy'.")
        if updated_elsewhere and module is None:
            raise UserError("updated_elsewhere=True needs `module`: the slow copy that its owner updates.")
        if module is not None:
            _check_follower(module, source, updated_elsewhere)
        self.momentum = momentum
        self.total_steps = total_steps
        self.buffer_rule = buffers
        self.updated_elsewhere = updated_elsewhere
        self.module = (copy.deepcopy(source) if module is None else module).requires_grad_(False)
        # A plain integer, not a tensor: reading it on a GPU would wait for it at every step.
        self._updates = 0

    @property
    def total_steps(self) -> int | None:
        """Updates over which the momentum rises to 1; None keeps it constant.

        Raises:
            UserError: it is set to a number below 1.
        """
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps: int | None) -> None:
        if total_steps is not None and total_steps < 1:
            raise UserError(f"total_steps = {total_steps}; it must be at least 1, or None for a constant momentum.")
        self._total_steps = total_steps

    @property
    def current_momentum(self) -> float:
        """The momentum of the next update."""
        if self.total_steps is None:
            return self.momentum
        return cosine_momentum(self.momentum, self._updates, self.total_steps)

    @torch.no_grad()
    def forward(self, inputs: Any) -> Any:
        """Encode without gradient."""
        return self.module(inputs)

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Move the copy's weights towards ``source``; call it after the optimizer's step.

        Raises:
            UserError: ``source`` has other parameters than the module that was followed so far.
        """
        if self.updated_elsewhere:
            return
        slow: list[Tensor] = list(self.module.parameters())
        fast: list[Tensor] = [parameter.detach() for parameter in source.parameters()]
        if [own.shape for own in slow] != [theirs.shape for theirs in fast]:
            raise UserError(
                f"`source` is not the module that is followed: {_first_difference(self.module, source)} (the copy's "
                "parameter first). Give update() what the momentum encoder was made with."
            )
        # One fused call over all weights; for ResNet-50 a loop over them takes three times as long. The function
        # is private: up to torch 2.14 there is no public one (torch.optim.swa_utils calls this one as well).
        torch._foreach_lerp_(slow, fast, 1.0 - self.current_momentum)
        if self.buffer_rule == "copy":
            for own, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
                own.copy_(theirs)
        self._updates += 1

    def get_extra_state(self) -> dict[str, int]:
        """How many updates there were, for ``state_dict``."""
        return {"updates": self._updates}

    def set_extra_state(self, state: Any) -> None:
        """Take back what ``get_extra_state`` gave."""
        self._updates = int(state["updates"])


def _check_follower(module: nn.Module, source: nn.Module, updated_elsewhere: bool) -> None:
    """Raise UserError where ``module`` can't be a slow copy of ``source``."""
    fast = {id(parameter) for parameter in source.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in fast:
            raise UserError(
                f"`module` has the parameter {name} in common with `source`: it would be frozen there too. "
                "Give a copy (copy.deepcopy), or leave `module` out."
            )
    difference = None if updated_elsewhere else _first_difference(module, source)
    if difference is not None:
        raise UserError(
            f"`module` has other parameters than `source` and can't follow it: {difference}. "
            "Build both alike, or set updated_elsewhere=True."
        )


def _first_difference(module: nn.Module, source: nn.Module) -> str | None:
    """What keeps the parameters of two modules from being matched in their order, or None."""
    slow, fast = list(module.named_parameters()), list(source.named_parameters())
    names = {name for name, _ in fast}
    for (name, own), (other, theirs) in zip(slow, fast, strict=False):
        # Another wrapper (a Sequential, say) may give other names; the same ones must stand in the same order.
        if name != other and name in names:
            return f"{name} stands in the place of {other}"
        if own.shape != theirs.shape:
            return f"{name} has shape {tuple(own.shape)}, there {tuple(theirs.shape)}"
    return None if len(slow) == len(fast) else f"{len(slow)} of them, there {len(fast)}"
