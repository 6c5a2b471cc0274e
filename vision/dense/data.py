"""Annotated images for detection and segmentation: COCO's JSON and Pascal VOC's folders."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError
from contrastive_mm.progress import progress

Task = Literal["boxes", "masks", "classes"]
"""What is learned: objects' boxes, their boxes and masks, or each pixel's class."""

VOID = 255
"""Class of the pixels that neither count nor train."""
MOST_CLASSES = 254
SLACK = 1.0
"""Pixels by which a box may reach over the image's border, as tools that round do; it is cut off."""
DETECTION_MISSING = 'Detection and masks need one more package: pip install "contrastive_mm[detection]".'


@dataclass(frozen=True)
class Scene:
    """An image and what is in it; pixels are read when they are asked for.

    Attributes:
        path: of the image.
        name: in its data set.
        height: of the image in pixels.
        width: of the image in pixels.
        boxes: (N, 4) float32, left, top, right and bottom edge in pixels.
        classes: (N,) numbers from 1; 0 is the background.
        crowd: (N,) whether it is a group of objects (COCO's ``iscrowd``) or one hard to see (VOC's ``difficult``):
            nothing is trained on it, and finding it is neither asked for nor punished.
        regions: of each object its mask in one of COCO's formats; empty where there are none.
        class_map: image with each pixel's class; None where ``regions`` tell.
    """

    path: Path
    name: str
    height: int
    width: int
    boxes: Float32[Tensor, "objects 4"]
    classes: Int64[Tensor, " objects"]
    crowd: Bool[Tensor, " objects"]
    regions: tuple[Any, ...] = ()
    class_map: Path | None = None


@dataclass(frozen=True)
class DenseData:
    """Scenes and the classes of their objects.

    Attributes:
        source: as the user wrote it.
        class_names: K names; class k is ``class_names[k - 1]``.
        scenes: the images.
    """

    source: str
    class_names: list[str]
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def hold_back(self, share: float) -> tuple[DenseData, DenseData]:
        """A part to train on and a part to score: the same ones every time, whatever the seed of a training.

        Raises:
            UserError: one of the two would be empty.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise UserError(
                f"--validation-share {share} of {len(self)} images leaves {count} to score and {len(self) - count} to "
                "train on: give another share, or --test-data."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).tolist()
        kept, held = sorted(order[count:]), sorted(order[:count])
        return tuple(dataclasses.replace(self, scenes=[self.scenes[i] for i in rows]) for rows in (kept, held))  # type: ignore[return-value]


def read_dense_data(
    data: str,
    task: Task,
    images: Path | None = None,
    class_names: Sequence[str] | None = None,
    option: str = "--data",
) -> DenseData:
    """Annotated images, checked as a whole before anything is trained.

    Args:
        data: a COCO file (``instances_train2017.json``), a folder that holds one, or a folder in Pascal VOC's layout,
            with ``:trainval`` or another name from its ImageSets behind it, or without.
        task: what will be learned.
        images: folder of the images of a COCO file; by default beside it, or in ``images`` or the folder of its split.
        class_names: classes of the training data, which test data must share.
        option: what names the data, for messages.

    Raises:
        UserError: there are no such data, or what an annotation says can't be; the message names file and annotation.
    """
    from contrastive_mm.vision.dense.coco import read_coco  # they import this module
    from contrastive_mm.vision.dense.voc import read_voc

    folder, _, split = data.partition(":") if not Path(data).exists() else (data, "", "")
    place = Path(folder)
    if not place.exists():
        raise UserError(f"{option} {data}: there is no {place}.")
    if place.is_dir() and ((place / "JPEGImages").is_dir() or (place / "Annotations").is_dir()):
        found = read_voc(place, split, task, class_names)
    else:
        if split:
            raise UserError(f"{option} {data}: COCO data have no splits; each has a file of its own. Give {place}.")
        found = read_coco(_coco_file(place, option), task, images, class_names)
    if not found.scenes:
        raise UserError(f"{option} {data} holds no images.")
    if len(found.class_names) > MOST_CLASSES:
        raise UserError(f"{data} has {len(found.class_names)} classes; more than {MOST_CLASSES} don't fit a byte.")
    return dataclasses.replace(found, source=data, scenes=list(_checked(found)))


def _coco_file(place: Path, option: str) -> Path:
    if place.is_file():
        return place
    files = sorted(place.glob("*.json")) or sorted((place / "annotations").glob("*.json"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(
            f"{option} {place} is neither a folder in VOC's layout (JPEGImages, Annotations) nor one with a single "
            f"COCO file (found: {names}). Give the .json file itself."
        )
    return files[0]


def _checked(data: DenseData) -> Iterator[Scene]:
    """The scenes, whose images are there and of the size that was written down, and whose class maps can be read."""
    scenes = data.scenes
    missing = [scene for scene in scenes if not scene.path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(scenes)} images are missing, {missing[0].path} ({missing[0].name}) the first of "
            "them. Give the folder that they lie in with --images, or take them out of the annotations."
        )
    for scene in progress(scenes, desc="check images", unit="image"):
        try:
            with Image.open(scene.path) as image:
                width, height = image.size
        except Exception as error:  # Pillow raises errors of many kinds
            raise UserError(f"{scene.path} can't be opened as an image: {error}") from error
        if (height, width) != (scene.height, scene.width):
            raise UserError(
                f"{scene.path} has {width} x {height} pixels, but its annotation says {scene.width} x {scene.height}: "
                "the boxes are of another version of the image."
            )
        if scene.class_map is not None:
            read_class_map(scene, len(data.class_names))
        yield scene


class BoxChecks:
    """Makes boxes of what annotations say, and says in one line which had no area.

    Args:
        source: the annotations, for messages.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.without_area: list[str] = []

    def box(self, corners: Sequence[Any], height: int, width: int, place: str) -> list[float] | None:
        """A box inside its image; None where it has no area (COCO has a few).

        Args:
            corners: left, top, right, bottom.
            height: of the image.
            width: of the image.
            place: which annotation it is, for messages.

        Raises:
            UserError: a value is no finite number, edges are in the wrong order, or it reaches over the border.
        """
        try:
            left, top, right, bottom = (float(value) for value in corners)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: its box {list(corners)} is not of four numbers.") from error
        if not np.isfinite([left, top, right, bottom]).all() or right < left or bottom < top:
            raise UserError(
                f"{place}: its box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has a negative size, or isn't "
                "finite."
            )
        if left < -SLACK or top < -SLACK or right > width + SLACK or bottom > height + SLACK:
            raise UserError(
                f"{place}: its box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) lies outside the image of "
                f"{width} x {height} pixels."
            )
        box = [max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)]
        if box[2] <= box[0] or box[3] <= box[1]:
            self.without_area.append(place)
            return None
        return box

    def report(self) -> None:
        """Say how many objects were left out because their box has no area."""
        if self.without_area:
            count, first = len(self.without_area), self.without_area[0]
            tqdm.write(f"{self.source}: left out {count} boxes without area; the first: {first}", file=sys.stderr)


def read_pixels(scene: Scene) -> UInt8[np.ndarray, "height width 3"]:
    """An image's pixels, as they lie in the file: annotations are not turned upright.

    Raises:
        UserError: it is broken.
    """
    from contrastive_mm.vision.data.decoding import to_rgb

    try:
        with Image.open(scene.path) as image:
            return np.array(to_rgb(image))
    except Exception as error:  # Pillow raises errors of many kinds
        raise UserError(f"{scene.path} can't be read: {error}") from error


def mask_tools() -> Any:
    """``pycocotools.mask``.

    Raises:
        UserError: it isn't installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(DETECTION_MISSING) from error
    return mask


def encode_region(region: Any, height: int, width: int) -> Any:
    """A mask in any of COCO's formats (polygons, counts, compressed counts) as compressed counts."""
    tools = mask_tools()
    if isinstance(region, list):
        return tools.merge(tools.frPyObjects(region, height, width))
    return tools.frPyObjects(region, height, width) if isinstance(region["counts"], list) else region


def object_masks(scene: Scene) -> UInt8[np.ndarray, "objects height width"]:
    """The mask of each object, 1 inside."""
    masks = [mask_tools().decode(encode_region(region, scene.height, scene.width)) for region in scene.regions]
    return np.stack(masks) if masks else np.zeros((0, scene.height, scene.width), np.uint8)


def read_class_map(scene: Scene, num_classes: int) -> UInt8[np.ndarray, "height width"]:
    """Each pixel's class, 0 for the background and 255 for what doesn't count.

    Where objects' masks overlap, the pixels don't count, as in torchvision's reference training.

    Raises:
        UserError: the file of the classes is no image of class numbers, of another size, or has a number too large.
    """
    if scene.class_map is None:
        masks = object_masks(scene)
        numbered = masks * scene.classes.numpy().astype(np.uint8)[:, None, None]
        covered = masks.sum(axis=0)
        painted = numbered.max(axis=0) if len(masks) else np.zeros((scene.height, scene.width), np.uint8)
        return np.where(covered > 1, np.uint8(VOID), painted)
    with Image.open(scene.class_map) as image:
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{scene.class_map} is an image of mode {image.mode}; class numbers come from palette or grey PNGs."
            )
        classes = np.array(image)
    if classes.shape != (scene.height, scene.width):
        raise UserError(
            f"{scene.class_map} has {classes.shape[1]} x {classes.shape[0]} pixels, its image {scene.width} x "
            f"{scene.height}."
        )
    largest = int(classes[classes != VOID].max(initial=0))
    if largest > num_classes:
        raise UserError(
            f"{scene.class_map} has the class {largest}, but there are {num_classes} class names: list all, one a "
            "line and without the background, in classes.txt beside JPEGImages."
        )
    return classes
