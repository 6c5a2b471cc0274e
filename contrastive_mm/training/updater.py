"""One step: views, objective, backward, optimizer, the method's own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.training.accelerator import make_accelerator
from contrastive_mm.training.chunks import encode_in_chunks
from contrastive_mm.views import ViewMaker


class Updater:
    """One optimizer step of a method on one raw batch, for loops of your own (an agent's update, say).

    Args:
        method: trained in place; moved to the accelerator's device.
        optimizer: over the method's parameters.
        make_views: turns a raw batch into views.
        accelerator: device and precision; by default float32 on the GPU where there is one.
        gradient_clip: largest norm of the gradient.
        chunk_size: samples that the encoder takes at once; see ``encode_in_chunks``.

    Raises:
        UserError: ``chunk_size`` is below 1.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        make_views: ViewMaker,
        accelerator: Accelerator | None = None,
        gradient_clip: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None:
            encode_in_chunks(method, chunk_size)
        self.accelerator = accelerator or make_accelerator()
        self.method = method
        self.make_views = make_views
        self.gradient_clip = gradient_clip
        self.on_objective: Callable[[Objective], None] | None = None
        """Called with each step's objective before anything is updated; it may read and must not write."""
        self._forward: nn.Module = self.accelerator.prepare(method)
        self.optimizer: Any = self.accelerator.prepare(optimizer)

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views, objective, backward, optimizer, then the method's ``after_step``.

        Args:
            batch: the raw batch; moved to the device here.

        Returns:
            The loss and the method's metrics as detached scalars, still on the device.
        """
        views = self.make_views(send_to_device(batch, self.accelerator.device))
        objective = self._forward(views)
        if self.on_objective is not None:
            self.on_objective(objective)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(objective.loss)
        metrics = {"loss": objective.loss.detach(), **objective.metrics}
        if self.gradient_clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.method.parameters(), self.gradient_clip)
            metrics["gradient_norm"] = torch.as_tensor(norm)
        self.optimizer.step()
        self.method.after_step()
        return metrics
