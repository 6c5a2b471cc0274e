"""Object detection with a pretrained encoder: torchvision's Faster and Mask R-CNN, and COCO's average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from contrastive_mm.errors import UserError
from contrastive_mm.methods.base import Method, Objective
from contrastive_mm.progress import progress
from contrastive_mm.views import Views
from contrastive_mm.vision.dense.batches import SceneLoader, box_scale, fitted_size
from contrastive_mm.vision.dense.data import DETECTION_MISSING, DenseData, Scene, encode_region, mask_tools
from contrastive_mm.vision.dense.options import DenseConfig
from contrastive_mm.vision.dense.pyramid import PyramidBackbone, channel_statistics
from contrastive_mm.vision.few_labels.fine_tuning import single_view
from contrastive_mm.vision.views.presets import NORMALISATIONS, Normalisation

BOX_SIDE, MASK_SIDE = 7, 14
"""Places a side of the features that a box's class and mask are told from, as in torchvision."""
SCORES = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class DetectionConfig(DenseConfig):
    """Training of a detector; fixed before any held-back image is looked at."""

    proposals: int = 1000
    """Regions of each image that the first stage hands on to the second."""
    regions: int = 512
    """Of these, regions of each image that the second stage learns from at a step; fewer make a step cheaper, which
    tells on a CPU."""


def build_detector(
    backbone: PyramidBackbone,
    num_classes: int,
    masks: bool = False,
    normalisation: Normalisation = "half",
    config: DetectionConfig | None = None,
) -> FasterRCNN:
    """Faster R-CNN of torchvision (Ren et al. 2015), or Mask R-CNN (He et al. 2017), on an encoder.

    Anchors and levels are the backbone's, the numbers of proposals and regions the options'; all else is
    torchvision's, with layers of ``width`` instead of 256 channels and 4 times as many in the box head. Its images are
    squares with values in 0..1.

    Args:
        backbone: the encoder under its pyramid.
        num_classes: without the background.
        masks: tell objects' masks too.
        normalisation: what the encoder was trained to see.
        config: the options.
    """
    config = config or DetectionConfig()
    width, size = backbone.out_channels, backbone.image_size
    mean, deviation = channel_statistics(NORMALISATIONS[normalisation])
    common: dict[str, Any] = {
        # Squares of this side come as they are; size_divisible would fill them up to sides that an encoder may refuse.
        **{"min_size": size, "max_size": size, "size_divisible": 1, "image_mean": mean, "image_std": deviation},
        "rpn_anchor_generator": backbone.anchors(),
        "box_roi_pool": MultiScaleRoIAlign(backbone.levels, BOX_SIDE, sampling_ratio=2),
        "box_head": TwoMLPHead(width * BOX_SIDE**2, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, num_classes + 1),
        "box_batch_size_per_image": config.regions,
    }
    for stage in ("train", "test"):
        common[f"rpn_pre_nms_top_n_{stage}"] = common[f"rpn_post_nms_top_n_{stage}"] = config.proposals
    if not masks:
        return FasterRCNN(backbone, **common)
    return MaskRCNN(
        backbone,
        mask_roi_pool=MultiScaleRoIAlign(backbone.levels, MASK_SIDE, sampling_ratio=2),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        **common,
    )


class Detection(Method):
    """The sum of a detector's losses, through the whole network.

    Args:
        detector: of ``build_detector``; trained in place.
        config: the options.
    """

    config_class = DetectionConfig

    def __init__(self, detector: FasterRCNN, config: DetectionConfig | None = None) -> None:
        super().__init__(detector.backbone.encoder, config or DetectionConfig())  # type: ignore[arg-type]
        self.detector = detector

    def forward(self, views: Views) -> Objective:
        """The losses of ``SceneViews``: class and box of both stages, and the mask's."""
        view = single_view(views, "Detection")
        losses = self.detector(list(view["image"]), targets(view))
        total = torch.stack(list(losses.values())).sum()
        return Objective(total, {name: value.detach() for name, value in losses.items()})


def targets(view: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What torchvision's detectors learn from, for each image of a batch of ``SceneLoader``."""
    found = []
    for number, classes in enumerate(view["classes"]):
        rows = classes > 0
        target = {"boxes": view["boxes"][number][rows], "labels": classes[rows]}
        if "masks" in view:
            target["masks"] = view["masks"][number][rows]
        found.append(target)
    return found


@dataclass(frozen=True)
class Found:
    """The objects that a detector found in a scene, best first.

    Attributes:
        boxes: (N, 4) in pixels of the scene's image: left, top, right, bottom.
        scores: (N,) in 0..1.
        classes: (N,) numbers from 1.
        masks: of each object, as COCO's compressed counts; empty where a detector tells none.
    """

    boxes: Float32[Tensor, "objects 4"]
    scores: Float32[Tensor, " objects"]
    classes: Int64[Tensor, " objects"]
    masks: tuple[Any, ...] = ()


@torch.no_grad()
def detect_objects(detector: nn.Module, data: DenseData, size: int, batch_size: int = 8) -> list[Found]:
    """What a detector finds in each scene; it is left in eval mode.

    Args:
        detector: of ``build_detector``.
        data: the scenes.
        size: side of its squares, in pixels.
        batch_size: scenes at once.
    """
    detector.eval()
    device = next(detector.parameters()).device
    loader = SceneLoader(data, size, "boxes")
    found = []
    starts = range(0, len(data), batch_size)
    for start in progress(starts, desc="detect", unit="batch"):
        scenes = data.scenes[start : start + batch_size]
        images = loader.images(scenes).to(device).float() / 255
        outputs = detector(list(images))
        found += [_found(output, scene, size) for output, scene in zip(outputs, scenes, strict=True)]
    return found


def _found(output: Mapping[str, Tensor], scene: Scene, size: int) -> Found:
    boxes = output["boxes"].float().cpu() / box_scale(scene, size)
    limits = torch.tensor([scene.width, scene.height, scene.width, scene.height], dtype=torch.float32)
    masks = tuple(_region(mask[0], scene, size) for mask in output["masks"].cpu()) if "masks" in output else ()
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    return Found(boxes, output["scores"].float().cpu(), output["labels"].cpu(), masks)


def _region(mask: Tensor, scene: Scene, size: int) -> Any:
    """A mask in a square as one in the scene's image, packed."""
    height, width = fitted_size(scene.height, scene.width, size)
    shown = Image.fromarray(mask[:height, :width].float().numpy())
    full = np.asarray(shown.resize((scene.width, scene.height), Image.Resampling.BILINEAR)) >= 0.5
    return pack_mask(full.astype(np.uint8))


def pack_mask(mask: UInt8[np.ndarray, "height width"]) -> Any:
    """A mask as COCO's compressed counts."""
    return mask_tools().encode(np.asfortranarray(mask))


def require_objects(data: DenseData) -> None:
    """Make sure that there is something to find.

    Raises:
        UserError: there is no object in any scene, or they are crowds.
    """
    if not any(bool((~scene.crowd).any()) for scene in data.scenes):
        raise UserError(f"{data.source}: its {len(data)} images to score on hold no object to find.")


def average_precision(data: DenseData, found: Sequence[Found], masks: bool = False) -> dict[str, Any]:
    """COCO's average precision, by pycocotools: 101 points of recall, at most 100 objects an image.

    Args:
        data: the truth.
        found: what was found in each of its scenes.
        masks: compare masks instead of boxes.

    Returns:
        ``AP`` (mean over the overlaps 0.5, 0.55, ..., 0.95), ``AP50``, ``AP75``, and ``AP_by_class``; means over the
        classes that the data have. A class that they don't have is None.

    Raises:
        UserError: pycocotools is missing, or there is no object to find.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(DETECTION_MISSING) from error
    require_objects(data)
    guesses = _guesses(data, found, masks)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each step
        truth = COCO()
        truth.dataset = _dataset(data, masks)
        truth.createIndex()
        guessed = COCO()
        guessed.dataset = {**truth.dataset, "annotations": guesses}
        guessed.createIndex()
        evaluation = COCOeval(truth, guessed, "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores: dict[str, Any] = {name: float(evaluation.stats[place]) for place, name in enumerate(SCORES)}
    # (overlaps, recalls, classes, areas, most objects); -1 stands for a class without objects.
    by_class = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    scores["AP_by_class"] = {
        name: float(value) if value >= 0 else None for name, value in zip(data.class_names, by_class, strict=True)
    }
    return scores


def _dataset(data: DenseData, masks: bool) -> dict[str, Any]:
    """The truth as a COCO file has it, numbered anew."""
    annotations: list[dict[str, Any]] = []
    for image, scene in enumerate(data.scenes, start=1):
        for row, box in enumerate(scene.boxes.tolist()):
            entry = _entry(len(annotations) + 1, image, int(scene.classes[row]), box)
            entry["iscrowd"] = int(scene.crowd[row])
            if masks:
                entry["segmentation"] = encode_region(scene.regions[row], scene.height, scene.width)
            annotations.append(entry)
    sizes = [(scene.height, scene.width) for scene in data.scenes]
    return {
        "info": {},
        "images": [{"id": n, "height": height, "width": width} for n, (height, width) in enumerate(sizes, start=1)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(data.class_names, start=1)],
        "annotations": annotations,
    }


def _guesses(data: DenseData, found: Sequence[Found], masks: bool) -> list[dict[str, Any]]:
    guesses: list[dict[str, Any]] = []
    for image, (_, objects) in enumerate(zip(data.scenes, found, strict=True), start=1):
        for row, box in enumerate(objects.boxes.tolist()):
            entry = _entry(len(guesses) + 1, image, int(objects.classes[row]), box)
            entry["score"] = float(objects.scores[row])
            if masks:
                entry["segmentation"] = objects.masks[row]
            guesses.append(entry)
    return guesses


def _entry(number: int, image: int, kind: int, box: Sequence[float]) -> dict[str, Any]:
    left, top, right, bottom = box
    sides = [left, top, right - left, bottom - top]
    return {
        **{"id": number, "image_id": image, "category_id": kind, "bbox": sides, "iscrowd": 0},
        "area": sides[2] * sides[3],
    }
