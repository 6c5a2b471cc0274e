"""Pascal VOC's annotations (Everingham et al. 2010): an XML file an image, and PNGs of class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.vision.dense.data import BoxChecks, DenseData, Scene, Task

VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
CORNERS = ("xmin", "ymin", "xmax", "ymax")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".PNG")


def read_voc(folder: Path, split: str, task: Task, class_names: Sequence[str] | None = None) -> DenseData:
    """Read a folder in Pascal VOC's layout; see ``read_dense_data``.

    Boxes come from Annotations, each pixel's class from SegmentationClass. Class names stand in ``classes.txt``, one a
    line; without that file they are VOC's own 20 for pixels, and the names found in Annotations for boxes.

    Args:
        folder: with JPEGImages and Annotations or SegmentationClass.
        split: a file of ImageSets/Main (boxes) or ImageSets/Segmentation (classes) without its ending; all for ''.
        task: what will be learned.
        class_names: classes of the training data.

    Raises:
        UserError: a file is missing or can't be read, or an annotation is wrong.
    """
    if task == "masks":
        raise UserError(f"{folder} is in VOC's layout, which has no objects' masks here: give COCO data for --masks.")
    listed = folder / "classes.txt"
    known = list(class_names) if class_names is not None else None
    if known is None and listed.is_file():
        known = [line.strip() for line in _lines(listed) if line.strip()]
    if task == "classes":
        names = _names(folder, split, "Segmentation", "SegmentationClass", ".png")
        scenes = [_pixel_scene(folder, name) for name in names]
        return DenseData(str(folder), known or list(VOC_CLASSES), scenes)
    checks = BoxChecks(folder)
    names = _names(folder, split, "Main", "Annotations", ".xml")
    found = [_Annotation(folder / "Annotations" / f"{name}.xml") for name in names]
    ordered = known or sorted({kind for annotation in found for kind in annotation.classes})
    scenes = [annotation.scene(_image(folder, annotation.file.stem), ordered, checks) for annotation in found]
    checks.report()
    return DenseData(str(folder), ordered, scenes)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}): save it as such.") from error


def _names(folder: Path, split: str, kind: str, annotations: str, ending: str) -> list[str]:
    """Names of the images of a split, or of all that are annotated."""
    if not split:
        names = sorted(file.stem for file in (folder / annotations).glob(f"*{ending}"))
        if not names:
            raise UserError(f"{folder / annotations} holds no {ending} files.")
        return names
    place = folder / "ImageSets" / kind
    file = place / f"{split}.txt"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in place.glob("*.txt"))) or "none"
        raise UserError(f"There is no {file}; splits there: {known}.")
    return [line.split()[0] for line in _lines(file) if line.strip()]


def _image(folder: Path, name: str) -> Path:
    places = [folder / "JPEGImages" / f"{name}{ending}" for ending in IMAGE_ENDINGS]
    return next((place for place in places if place.is_file()), places[0])


def _pixel_scene(folder: Path, name: str) -> Scene:
    class_map, path = folder / "SegmentationClass" / f"{name}.png", _image(folder, name)
    for file in (class_map, path):
        if not file.is_file():
            raise UserError(f"{file} is missing, which {name} of {folder} needs.")
    try:
        with Image.open(class_map) as image:
            width, height = image.size
    except Exception as error:  # Pillow raises errors of many kinds
        raise UserError(f"{class_map} can't be opened as an image: {error}") from error
    nothing = torch.zeros(0, dtype=torch.int64)
    return Scene(path, name, height, width, torch.zeros(0, 4), nothing, nothing.bool(), class_map=class_map)


class _Annotation:
    """One XML file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.root = ElementTree.parse(file).getroot()
        except FileNotFoundError as error:
            raise UserError(f"{file} is missing.") from error
        except ElementTree.ParseError as error:
            raise UserError(f"{file} can't be read as XML: {error}") from error
        self.objects = self.root.findall("object")
        self.classes = [(item.findtext("name") or "").strip() for item in self.objects]

    def scene(self, path: Path, ordered: Sequence[str], checks: BoxChecks) -> Scene:
        height, width = (self._number(f"size/{side}") for side in ("height", "width"))
        boxes, classes, crowd = [], [], []
        for number, (item, name) in enumerate(zip(self.objects, self.classes, strict=True), start=1):
            place = f"{self.file}, object {number} ({name})"
            if name not in ordered:
                raise UserError(f"{place}: its class {name!r} is not among {', '.join(ordered[:20])}.")
            corners = [item.findtext(f"bndbox/{corner}") for corner in CORNERS]
            try:
                left, top, right, bottom = (float(str(corner)) for corner in corners)
            except ValueError as error:
                raise UserError(f"{place}: its bndbox {corners} is not of four numbers.") from error
            # VOC's pixels are counted from 1, and the last one belongs to the box.
            box = checks.box((left - 1, top - 1, right, bottom), height, width, place)
            if box is not None:
                boxes.append(box)
                classes.append(ordered.index(name) + 1)
                crowd.append((item.findtext("difficult") or "0").strip() == "1")
        return Scene(
            path=path,
            name=self.file.stem,
            height=height,
            width=width,
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            classes=torch.tensor(classes, dtype=torch.int64),
            crowd=torch.tensor(crowd, dtype=torch.bool),
        )

    def _number(self, path: str) -> int:
        text = self.root.findtext(path)
        try:
            return int(str(text))
        except ValueError as error:
            raise UserError(f"{self.file}: <{path}> is {text!r}, not a number of pixels.") from error
