"""An image encoder under a feature pyramid, as torchvision's detectors and segmenters take their backbones."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from contrastive_mm.vision.encoders.backbones import ImageEncoder, Images, _FeatureMaps, run_on_meta
from contrastive_mm.vision.encoders.libraries import refuse_size

BatchNorm: TypeAlias = Literal["trained", "frozen"]

FINEST_STRIDE = 2
MOST_PLACES = 336
"""Places a side that the finest level has at most: those of torchvision's recipe, 1333 pixels at stride 4."""
ANCHOR = 8
"""Side of a level's anchors in its strides, as torchvision has it: 32 pixels at stride 4."""
COARSE_STRIDE = 16
COARSE_ANCHORS = (2, 4, 8)
RATIOS = (0.5, 1.0, 2.0)


class PyramidBackbone(nn.Module):
    """An encoder's feature maps, joined by a feature pyramid network (Lin et al. 2017, arXiv 1612.03144).

    Levels finer than the images have use for are left out: those of stride 1, and those of more than 336 places a
    side; with ``finest``, those finer than it. Above the coarsest map, levels are added by pooling until their anchors
    span half the image.

    Attributes:
        out_channels: channels of each level.
        strides: pixels from one place of each level to the next.
        levels: names of the levels that came from maps; those after them, in ``strides``, are pooled.

    Args:
        encoder: used in place.
        image_size: side of the square images, in pixels.
        width: channels of each level.
        batch_norm: whether the encoder's BatchNorm layers go on learning from the batches, or keep their statistics
            and their weights as torchvision's recipes do.
        freeze: keep all of the encoder as it is, BatchNorm's statistics too.
        finest: stride of the finest level that is used; the level nearest to it is the first. None keeps all.

    Shapes:
        (B, 3, S, S) -> a dictionary of (B, width, S / stride, S / stride).

    Raises:
        UserError: the encoder can't take images of this size.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        image_size: int,
        width: int = 256,
        batch_norm: BatchNorm = "trained",
        freeze: bool = False,
        finest: int | None = None,
    ) -> None:
        super().__init__()
        with refuse_size(type(encoder).__name__, image_size):
            run_on_meta(_FeatureMaps(encoder), image_size)
        self.encoder = encoder
        self.out_channels = width
        self.image_size = image_size
        self._keeps_statistics = freeze or batch_norm == "frozen"
        self.first = _first_level(encoder.map_strides, image_size)
        if finest is not None:
            self.first += _nearest(encoder.map_strides[self.first :], finest)
        strides = encoder.map_strides[self.first :]
        self.levels = [str(level) for level in range(len(strides))]
        self._pooled = _pooled_levels(strides[-1], image_size)
        self.strides = [*strides, *(strides[-1] * 2 ** (extra + 1) for extra in range(self._pooled))]
        self.pyramid = FeaturePyramidNetwork(encoder.map_dims[self.first :], width)
        self._fix_weights(freeze)

    def _fix_weights(self, freeze: bool) -> None:
        if freeze:
            self.encoder.requires_grad_(False)
        elif self._keeps_statistics:
            for module in self._batch_norms():
                module.requires_grad_(False)

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> PyramidBackbone:
        """As ``nn.Module.train``, but statistics that are to be kept are kept."""
        super().train(mode)
        if self._keeps_statistics:
            for module in self._batch_norms():
                module.eval()
        return self

    def forward(self, images: Images) -> dict[str, Float[Tensor, "batch channels _ _"]]:
        """The levels, finest first."""
        maps = self.encoder.feature_maps(images)[self.first :]
        levels: dict[str, Tensor] = self.pyramid(dict(zip(self.levels, maps, strict=True)))
        last = levels[self.levels[-1]]
        for number in range(self._pooled):
            last = max_pool2d(last, kernel_size=1, stride=2)
            levels[f"pool{number}"] = last
        return levels

    def anchors(self) -> AnchorGenerator:
        """Anchors of three shapes at each level, 8 strides wide, and smaller ones where the finest level is coarse."""
        factors = COARSE_ANCHORS if self.strides[0] >= COARSE_STRIDE else (ANCHOR,)
        sizes = tuple(tuple(stride * factor for factor in factors) for stride in self.strides)
        return AnchorGenerator(sizes, (RATIOS,) * len(sizes))

    def level_near(self, stride: int) -> str:
        """The level from a map whose stride is nearest to this one."""
        return self.levels[_nearest(self.strides[: len(self.levels)], stride)]


def _first_level(strides: list[int], image_size: int) -> int:
    """The finest level that is used; the coarsest map always is."""
    finest = max(FINEST_STRIDE, image_size / MOST_PLACES)
    return next((level for level, stride in enumerate(strides) if stride >= finest), len(strides) - 1)


def _nearest(strides: list[int], stride: int) -> int:
    distances = [abs(math.log2(own / stride)) for own in strides]
    return distances.index(min(distances))


def _pooled_levels(stride: int, image_size: int) -> int:
    return max(0, math.ceil(math.log2(image_size / 2 / (stride * ANCHOR))))


def channel_statistics(normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each of three channels."""
    mean, deviation = (torch.tensor(values).expand(3).tolist() for values in normalisation)
    return mean, deviation
