"""Semantic segmentation with a pretrained encoder: torchvision's FCN and DeepLab heads, and the mean overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from contrastive_mm.errors import UserError
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.progress import progress
from contrastive_mm.views import Views
from contrastive_mm.vision.dense.batches import SceneLoader, fitted_size
from contrastive_mm.vision.dense.data import VOID, DenseData, Scene, read_class_map
from contrastive_mm.vision.dense.options import DenseConfig
from contrastive_mm.vision.dense.pyramid import PyramidBackbone, channel_statistics
from contrastive_mm.vision.encoders.backbones import Images
from contrastive_mm.vision.few_labels.fine_tuning import single_view
from contrastive_mm.vision.views.presets import NORMALISATIONS, Normalisation

HEAD_STRIDE = {"fcn": 4, "deeplab": 8}
"""Stride that each head works at: the finest of a ResNet's pyramid, and that of torchvision's DeepLab."""
LARGEST_RATES = (12, 24, 36)
RATE_PLACES = 65
"""Places a side of the maps that DeepLab's rates were made for (513 pixels at stride 8)."""


@dataclass(frozen=True)
class SegmentationConfig(DenseConfig):
    """Training of a segmenter; fixed before any held-back image is looked at."""

    head: Literal["fcn", "deeplab"] = "deeplab"
    """fcn is one convolution at stride 4; deeplab (v3) sees wide surroundings at stride 8."""


class Segmenter(nn.Module):
    """A head of torchvision's on one level of an encoder's pyramid, which holds what the coarser ones tell.

    Args:
        backbone: the encoder under its pyramid.
        num_classes: without the background.
        head: ``fcn`` (Long et al. 2015) or ``deeplab`` (v3, Chen et al. 2017, arXiv 1706.05587), whose rates shrink
            with the map, for beyond its border there is nothing to see.
        normalisation: what the encoder was trained to see.

    Shapes:
        (B, 3, S, S), values in 0..1 -> logits (B, num_classes + 1, S, S), the background first.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head: Literal["fcn", "deeplab"] = "deeplab",
        normalisation: Normalisation = "half",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.level = backbone.level_near(HEAD_STRIDE[head])
        width = backbone.out_channels
        if head == "fcn":
            self.head: nn.Module = FCNHead(width, num_classes + 1)
        else:
            places = backbone.image_size / backbone.strides[int(self.level)]
            rates = [max(1, round(rate * min(1.0, places / RATE_PLACES))) for rate in LARGEST_RATES]
            self.head = DeepLabHead(width, num_classes + 1, rates)
        for name, values in zip(("mean", "deviation"), channel_statistics(NORMALISATIONS[normalisation]), strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Images) -> Float[Tensor, "batch classes height width"]:
        """Logits of each pixel's class."""
        levels = self.backbone((images - self.mean) / self.deviation)
        logits = self.head(levels[self.level])
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


class Segmentation(Method):
    """Cross-entropy of each pixel's class, through the whole network.

    Args:
        segmenter: trained in place.
        config: the options.
    """

    config_class = SegmentationConfig

    def __init__(self, segmenter: Segmenter, config: SegmentationConfig | None = None) -> None:
        super().__init__(segmenter.backbone.encoder, config or SegmentationConfig())
        self.segmenter = segmenter

    def forward(self, views: Views) -> Objective:
        """Mean over the pixels that count."""
        view: Mapping[str, Tensor] = single_view(views, "Segmentation")
        logits, classes = self.segmenter(view["image"]).float(), view["class_map"].long()
        counted = classes != VOID
        total = F.cross_entropy(logits, classes, ignore_index=VOID, reduction="sum")
        count = counted.sum().clamp(min=1)  # a batch may have no pixel that counts
        right = ((logits.detach().argmax(dim=1) == classes) & counted).sum() / count
        return Objective(total / count, {"pixel_accuracy": right})


@torch.no_grad()
def segment_scenes(
    segmenter: Segmenter, data: DenseData, batch_size: int = 8
) -> list[UInt8[np.ndarray, "height width"]]:
    """Each pixel's class in each scene, at its own size; the segmenter is left in eval mode."""
    segmenter.eval()
    device = next(segmenter.parameters()).device
    loader = SceneLoader(data, segmenter.backbone.image_size, "classes")
    found = []
    starts = range(0, len(data), batch_size)
    for start in progress(starts, desc="segment", unit="batch"):
        scenes = data.scenes[start : start + batch_size]
        logits = segmenter(loader.images(scenes).to(device).float() / 255)
        classes = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        found += [_at_own_size(guess, scene) for guess, scene in zip(classes, scenes, strict=True)]
    return found


def _at_own_size(classes: UInt8[np.ndarray, "size size"], scene: Scene) -> UInt8[np.ndarray, "height width"]:
    height, width = fitted_size(scene.height, scene.width, len(classes))
    shown = Image.fromarray(np.ascontiguousarray(classes[:height, :width]))
    return np.array(shown.resize((scene.width, scene.height), Image.Resampling.NEAREST))


def mean_overlap(data: DenseData, found: Sequence[UInt8[np.ndarray, "height width"]]) -> dict[str, Any]:
    """VOC's measure: intersection over union of each class's pixels in all scenes, and its mean.

    Args:
        data: the truth.
        found: each pixel's class in each scene.

    Returns:
        ``mIoU``, a mean over the background and the classes that the truth or the guess has; ``pixel_accuracy``; and
        ``IoU_by_class``, None for classes that neither has.

    Raises:
        UserError: no pixel counts.
    """
    names = ["background", *data.class_names]
    table = np.zeros((len(names), len(names)), np.int64)
    for scene, guess in zip(data.scenes, found, strict=True):
        truth = read_class_map(scene, len(data.class_names))
        counted = truth != VOID
        pairs = truth[counted].astype(np.int64) * len(names) + guess[counted]
        table += np.bincount(pairs, minlength=len(names) ** 2).reshape(table.shape)
    if not table.sum():
        raise UserError(f"{data.source}: no pixel of its {len(data)} images has a class.")
    shared = table.diagonal()
    union = table.sum(axis=0) + table.sum(axis=1) - shared
    overlap = [float(both / either) if either else None for both, either in zip(shared, union, strict=True)]
    known = [value for value in overlap if value is not None]
    return {
        "mIoU": sum(known) / len(known),
        "pixel_accuracy": float(shared.sum() / table.sum()),
        "IoU_by_class": dict(zip(names, overlap, strict=True)),
    }
