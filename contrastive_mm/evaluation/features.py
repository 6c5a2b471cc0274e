"""Features of a data set from a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.progress import progress
from contrastive_mm.views import Inputs


@torch.no_grad()
def extract_features(encoder: nn.Module, batches: Iterable[Inputs]) -> Float[Tensor, "samples dim"]:
    """Encode batch after batch in eval mode (no dropout, BatchNorm with its running statistics).

    Args:
        encoder: maps one batch of inputs to (B, D); its mode is put back afterwards.
        batches: inputs in the order wanted; moved to the encoder's device here.

    Returns:
        (N, D) features in float32 on the CPU.
    """
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    try:
        rows = [
            encoder(send_to_device(inputs, device)).float().cpu()
            for inputs in progress(batches, desc="encode", unit="batch")
        ]
    finally:
        encoder.train(was_training)
    return torch.cat(rows)
