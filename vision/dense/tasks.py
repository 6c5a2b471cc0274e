"""What is learned on annotated images: to detect objects, or to tell each pixel's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from contrastive_mm.methods.base import Method
from contrastive_mm.vision.dense.data import DenseData, Task, mask_tools, read_class_map
from contrastive_mm.vision.dense.detection import (
    SCORES,
    Detection,
    DetectionConfig,
    average_precision,
    build_detector,
    detect_objects,
    require_objects,
)
from contrastive_mm.vision.dense.options import DenseConfig
from contrastive_mm.vision.dense.pictures import SHOWN_SCORE, detection_picture, segmentation_picture
from contrastive_mm.vision.dense.pyramid import PyramidBackbone
from contrastive_mm.vision.dense.segmentation import (
    HEAD_STRIDE,
    Segmentation,
    SegmentationConfig,
    Segmenter,
    mean_overlap,
    segment_scenes,
)
from contrastive_mm.vision.views.presets import Normalisation


@runtime_checkable
class DenseTask(Protocol):
    """What a transfer needs to know of a task.

    Attributes:
        name: of its folder and files.
        title: of its page.
        caption: of its picture.
        by_class: the score that is given for each class.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    caption: ClassVar[str]
    by_class: ClassVar[str]

    @property
    def kind(self) -> Task:
        """What the data must tell."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """The scores of its table."""
        ...

    @property
    def config(self) -> DenseConfig:
        """The options."""
        ...

    @property
    def finest(self) -> int | None:
        """Stride of the finest level of the pyramid that it uses; None for all of them."""
        ...

    def check_packages(self) -> None:
        """Refuse to begin where a package is missing."""
        ...

    def check_test_data(self, data: DenseData) -> None:
        """Refuse to begin where there would be nothing to score on."""
        ...

    def build(self, backbone: PyramidBackbone, num_classes: int, normalisation: Normalisation) -> nn.Module:
        """A new network."""
        ...

    def method(self, model: Any) -> Method:
        """What trains a network."""
        ...

    def find(self, model: Any, data: DenseData, size: int) -> Sequence[Any]:
        """What a network finds in each scene."""
        ...

    def score(self, data: DenseData, found: Sequence[Any]) -> dict[str, Any]:
        """Scores of what was found."""
        ...

    def picture(self, data: DenseData, found: Mapping[str, Sequence[Any]]) -> bytes:
        """What was found, beside the truth."""
        ...


@dataclass(frozen=True)
class DetectionTask:
    """Boxes, and masks where they are asked for."""

    config: DetectionConfig
    masks: bool = False
    name: ClassVar[str] = "detection"
    title: ClassVar[str] = "Object detection"
    caption: ClassVar[str] = f"Held-back images: objects found with a score of at least {100 * SHOWN_SCORE:.0f} of 100"
    by_class: ClassVar[str] = "AP_by_class"
    finest: ClassVar[int | None] = None

    @property
    def kind(self) -> Task:
        """What the data must tell."""
        return "masks" if self.masks else "boxes"

    @property
    def columns(self) -> Sequence[str]:
        """Average precisions of boxes, then of masks."""
        return (*SCORES, *(f"mask_{name}" for name in SCORES)) if self.masks else SCORES

    def check_packages(self) -> None:
        """Detection is scored by pycocotools."""
        mask_tools()

    def check_test_data(self, data: DenseData) -> None:
        """There must be objects to find."""
        require_objects(data)

    def build(self, backbone: PyramidBackbone, num_classes: int, normalisation: Normalisation) -> nn.Module:
        """A new Faster or Mask R-CNN."""
        return build_detector(backbone, num_classes, self.masks, normalisation, self.config)

    def method(self, model: Any) -> Method:
        """The sum of its losses."""
        return Detection(model, self.config)

    def find(self, model: Any, data: DenseData, size: int) -> Sequence[Any]:
        """The objects in each scene."""
        return detect_objects(model, data, size, self.config.batch_size)

    def score(self, data: DenseData, found: Sequence[Any]) -> dict[str, Any]:
        """COCO's average precision of the boxes, and of the masks under ``mask_`` names."""
        scores = average_precision(data, found)
        if self.masks:
            scores |= {f"mask_{name}": value for name, value in average_precision(data, found, masks=True).items()}
        return scores

    def picture(self, data: DenseData, found: Mapping[str, Sequence[Any]]) -> bytes:
        """Boxes and masks beside the truth."""
        return detection_picture(data, found)


@dataclass(frozen=True)
class SegmentationTask:
    """Each pixel's class."""

    config: SegmentationConfig
    name: ClassVar[str] = "segmentation"
    title: ClassVar[str] = "Semantic segmentation"
    caption: ClassVar[str] = "Held-back images: each pixel's class (black: background, white: doesn't count)"
    by_class: ClassVar[str] = "IoU_by_class"
    kind: ClassVar[Task] = "classes"
    columns: ClassVar[Sequence[str]] = ("mIoU", "pixel_accuracy")

    @property
    def finest(self) -> int:
        """The head's own level: a finer one would be computed in vain."""
        return HEAD_STRIDE[self.config.head]

    def check_packages(self) -> None:
        """VOC's data need none; COCO's are decoded when they are read, and name what is missing."""

    def check_test_data(self, data: DenseData) -> None:
        """Any image has pixels to tell, unless all of them are void."""

    def build(self, backbone: PyramidBackbone, num_classes: int, normalisation: Normalisation) -> nn.Module:
        """A new segmenter."""
        return Segmenter(backbone, num_classes, self.config.head, normalisation)

    def method(self, model: Any) -> Method:
        """Cross-entropy of each pixel."""
        return Segmentation(model, self.config)

    def find(self, model: Any, data: DenseData, size: int) -> Sequence[Any]:
        """Each pixel's class in each scene."""
        return segment_scenes(model, data, self.config.batch_size)

    def score(self, data: DenseData, found: Sequence[Any]) -> dict[str, Any]:
        """The mean overlap."""
        return mean_overlap(data, found)

    def picture(self, data: DenseData, found: Mapping[str, Sequence[Any]]) -> bytes:
        """Each pixel's class beside the truth."""
        truth = [read_class_map(scene, len(data.class_names)) for scene in data.scenes]
        return segmentation_picture(data, truth, found)
