"""Random crops of stacked frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from contrastive_mm.errors import UserError
from contrastive_mm.views import RandomStream, Views

Frames = UInt8[Tensor, "batch channels height width"]
Crops = Float[Tensor, "batch channels size size"]


class RandomCrops:
    """Two random crops of each observation (CURL, section 4.1).

    All frames of one stack are cut at the same place, so motion between them stays. The batch maps
    ``"observation"`` to (B, frames * channels, H, W) uint8; ``"index"`` (B,), where given, becomes the sample ids.

    Args:
        size: side of the square crops, in pixels.
        seed: of the crops' own random stream.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.stream = RandomStream(seed)

    def __call__(self, batch: Mapping[str, Tensor]) -> Views:
        """Two crops of each observation, scaled to [-0.5, 0.5]."""
        frames = batch["observation"]
        return Views((self.crop(frames), self.crop(frames)), sample_ids=batch.get("index"))

    def crop(self, frames: Frames) -> Crops:
        """One random crop of each observation; each offset, the last one too, is equally likely."""
        generator = self.stream.on(frames.device)
        offsets = []
        for side in frames.shape[2:]:
            _check_size(side, self.size)
            offsets.append(
                torch.randint(side - self.size + 1, (len(frames),), generator=generator, device=frames.device)
            )
        return _scale(cut(frames, offsets[0], offsets[1], self.size))

    def state_dict(self) -> dict[str, Any]:
        """The random stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the random stream."""
        self.stream.load_state_dict(state)


def cut(
    frames: Frames, top: Int[Tensor, " batch"], left: Int[Tensor, " batch"], size: int
) -> UInt8[Tensor, "batch channels size size"]:
    """The (size, size) square of each observation that begins at its row ``top`` and column ``left``."""
    place = torch.arange(size, device=frames.device)
    rows = (top[:, None] + place)[:, None, :, None]
    columns = (left[:, None] + place)[:, None, None, :]
    samples = torch.arange(len(frames), device=frames.device)[:, None, None, None]
    channels = torch.arange(frames.shape[1], device=frames.device)[None, :, None, None]
    return frames[samples, channels, rows, columns]


def centre_crop(frames: Frames, size: int) -> Crops:
    """The view that evaluation and acting use: the middle of each observation, scaled to [-0.5, 0.5]."""
    for side in frames.shape[2:]:
        _check_size(side, size)
    top, left = (frames.shape[2] - size) // 2, (frames.shape[3] - size) // 2
    return _scale(frames[:, :, top : top + size, left : left + size])


def _scale(frames: UInt8[Tensor, "batch channels size size"]) -> Crops:
    return frames.float() / 255 - 0.5


def _check_size(side: int, size: int) -> None:
    if size > side:
        raise UserError(f"Crops of {size} pixels don't fit into frames of {side}; set --crop-size to {side} or less.")
