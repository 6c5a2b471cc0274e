"""Encoders of pixel observations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PixelEncoder(nn.Module):
    """Four convolutions, a linear layer and LayerNorm, as agents on pixels use (CURL, appendix A).

    Two convolutions halve the resolution where the paper's halves it once; on a CPU that is half of the time.

    Args:
        channels: of the stacked frames.
        size: side of the crops in pixels, at least 32.
        feature_dim: dimensions of the features.

    Shapes:
        (B, channels, size, size) -> (B, feature_dim).
    """

    def __init__(self, channels: int, size: int, feature_dim: int = 128) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(inplace=True),
        )
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                # Orthogonal weights keep the signal's size through the ReLUs; with torch's default it fades.
                nn.init.orthogonal_(layer.weight, gain=2**0.5)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, size, size)).flatten(1).shape[1]
        self.head = nn.Sequential(nn.Linear(flat, feature_dim), nn.LayerNorm(feature_dim))

    def forward(self, observations: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch dim"]:
        """Encode crops that are scaled to [-0.5, 0.5]."""
        return self.head(self.convolutions(observations).flatten(1))
