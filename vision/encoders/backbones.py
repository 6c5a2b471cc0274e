"""What every image encoder is: features, and feature maps for dense tasks."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch dim"]
Maps = list[Float[Tensor, "batch _ _ _"]]

MOST_MAPS = 4
"""Feature maps that an encoder gives at most: the coarsest four resolutions, C2 to C5 of a ResNet."""
PROBE_SIDE = 256


class ImageEncoder(nn.Module, ABC):
    """Images to features, and to feature maps.

    Attributes:
        feature_dim: columns of the output.
        map_side: side of the images by which the maps are measured; None where every size does.

    Shapes:
        (B, 3, H, W) -> (B, feature_dim).
    """

    feature_dim: int
    map_side: int | None = None

    @abstractmethod
    def feature_maps(self, images: Images) -> Maps:
        """The maps that dense tasks build on (detection, segmentation), each coarser than the one before it.

        Returns:
            A map (B, ``map_dims[i]``, H / ``map_strides[i]``, W / ``map_strides[i]``) for each i, sides rounded up
            where the encoder pads: the last one of each of the four coarsest resolutions. A ResNet's have the
            strides 4, 8, 16 and 32, with the small-image stem 1, 2, 4 and 8; a vision transformer gives one map.
        """

    @property
    def map_dims(self) -> list[int]:
        """Channels of each feature map."""
        return [dim for dim, _ in self._map_shapes]

    @property
    def map_strides(self) -> list[int]:
        """Pixels of the image from one place of each feature map to the next."""
        return [stride for _, stride in self._map_shapes]

    @cached_property
    def _map_shapes(self) -> list[tuple[int, int]]:
        side = self.map_side or PROBE_SIDE
        maps = run_on_meta(_FeatureMaps(self), side)
        if len(maps) == 1:  # patches, of any side
            return [(maps[0].shape[1], side // maps[0].shape[2])]
        # Sides don't divide evenly where an encoder pads, or convolves without padding.
        return [(found.shape[1], int(2 ** round(math.log2(side / found.shape[2])))) for found in maps]


class _FeatureMaps(nn.Module):
    """Calls ``feature_maps``, for functions that call a module."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Images) -> Maps:
        return self.encoder.feature_maps(images)


@torch.no_grad()
def run_on_meta(module: nn.Module, side: int) -> Any:
    """What a module would give for two square images, as tensors without content: nothing is computed or changed."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    meta = {name: value.to("meta") for name, value in tensors}
    return torch.func.functional_call(module, meta, (torch.zeros(2, 3, side, side, device="meta"),))


def coarsest(maps: Iterable[Tensor]) -> list[Tensor]:
    """The last map of each resolution, of the four coarsest resolutions.

    Args:
        maps: in the order in which they were made, none finer than the one before it.
    """
    last: dict[Any, Tensor] = {}
    for found in maps:
        last[found.shape[2:]] = found
    return list(last.values())[-MOST_MAPS:]


def run_stages(stages: Iterable[Callable[[Tensor], Tensor]], images: Tensor) -> Iterator[Tensor]:
    """What comes out of each stage, one after the other."""
    for stage in stages:
        images = stage(images)
        yield images
