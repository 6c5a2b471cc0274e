"""COCO's annotations (Lin et al. 2014, arXiv 1405.0312): one JSON file and a folder of images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from contrastive_mm.errors import UserError
from contrastive_mm.vision.dense.data import BoxChecks, DenseData, Scene, Task, encode_region, mask_tools

PARTS = ("images", "annotations", "categories")
IDENTIFIER, NAME, PIXELS = "a number or a text", "a text", "a number of pixels"
KINDS = {
    **dict.fromkeys(("id", "image_id", "category_id", "name"), IDENTIFIER),
    **{"file_name": NAME, "height": PIXELS, "width": PIXELS},
}


def read_coco(
    file: Path, task: Task, images: Path | None = None, class_names: Sequence[str] | None = None
) -> DenseData:
    """Read a COCO file; see ``read_dense_data``.

    Categories are numbered from 1 in the order of their ids, which may have gaps.

    Raises:
        UserError: the file is none of COCO's, or an annotation is wrong.
    """
    content = _content(file)
    names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
    ordered = list(class_names) if class_names is not None else [names[key] for key in _in_order(names)]
    if len(set(ordered)) < len(ordered):
        raise UserError(f"{file} has two categories of one name: {sorted(ordered)}.")
    objects = _by_image(file, content, names, ordered)
    place = images or _image_folder(file, content)
    checks = BoxChecks(file)
    scenes = [_scene(file, entry, objects[entry["id"]], place, task, checks) for entry in content["images"]]
    checks.report()
    return DenseData(str(file), ordered, scenes)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read as JSON: {error}") from error
    missing = [part for part in PARTS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise UserError(f"{file} is no COCO file: it has no list {missing[0]!r}.")
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}
    needed["annotations"] = ("id", "image_id", "category_id", "bbox")
    for part, keys in needed.items():
        for number, entry in enumerate(content[part]):
            if lacking := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
                raise UserError(f"{file}: {part}[{number}] has no {lacking[0]!r}.")
            for key in keys:
                if key in KINDS and not _is_kind(entry[key], KINDS[key]):
                    raise UserError(f"{file}: {part}[{number}] has the {key} {entry[key]!r}; it must be {KINDS[key]}.")
    for part in PARTS:
        ids = [entry["id"] for entry in content[part]]
        if len(set(ids)) < len(ids):
            twice = next(key for key in ids if ids.count(key) > 1)
            raise UserError(f"{file}: the id {twice} stands twice in {part!r}.")
    return content


def _is_kind(value: Any, kind: str) -> bool:
    if kind == PIXELS:
        return isinstance(value, (int, float, str)) and re.fullmatch(r"[1-9]\d*(\.0*)?", str(value)) is not None
    return isinstance(value, str if kind == NAME else (str, int, float))


def _by_image(
    file: Path, content: dict[str, Any], names: dict[Any, str], ordered: list[str]
) -> dict[Any, list[dict[str, Any]]]:
    """The annotations of each image, with the class's number; whatever they refer to is there."""
    numbers = {name: number for number, name in enumerate(ordered, start=1)}
    objects: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    for annotation in content["annotations"]:
        place = f"{file}, annotation {annotation['id']}"
        category = annotation["category_id"]
        if annotation["image_id"] not in objects:
            raise UserError(f"{place}: there is no image {annotation['image_id']}.")
        if category not in names:
            raise UserError(f"{place}: there is no category {category}; known: {_some(_in_order(names))}.")
        if names[category] not in numbers:
            raise UserError(
                f"{place}: the class {names[category]!r} is not among the training data's: {_some(ordered)}."
            )
        objects[annotation["image_id"]].append({**annotation, "class": numbers[names[category]]})
    return objects


def _in_order(keys: Iterable[Any]) -> list[Any]:
    """Ids in ascending order, numbers before texts."""
    return sorted(keys, key=lambda key: (isinstance(key, str), key))


def _some(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values[:20]) + (", ..." if len(values) > 20 else "")


def _image_folder(file: Path, content: dict[str, Any]) -> Path:
    """Where the images of a COCO file lie: the first usual place that has the first one."""
    split = file.stem.rpartition("_")[2]  # instances_train2017
    usual = [file.parent, file.parent / "images", file.parent.parent / split, file.parent.parent / "images"]
    usual += [file.parent.parent / "images" / split, file.parent / split]
    first = content["images"][0]["file_name"] if content["images"] else ""
    return next((place for place in usual if (place / first).is_file()), file.parent)


def _scene(
    file: Path, entry: dict[str, Any], objects: list[dict[str, Any]], folder: Path, task: Task, checks: BoxChecks
) -> Scene:
    height, width = int(float(entry["height"])), int(float(entry["width"]))
    boxes, classes, crowd, regions = [], [], [], []
    for annotation in objects:
        place = f"{file}, annotation {annotation['id']}"
        given = annotation["bbox"]
        if not isinstance(given, list) or len(given) != 4 or not all(isinstance(x, (int, float)) for x in given):
            raise UserError(f"{place}: its bbox {given} is not of four numbers (left, top, width, height).")
        left, top, across, down = given
        box = checks.box((left, top, left + across, top + down), height, width, place)
        if box is None:
            continue
        if task != "boxes":
            regions.append(_region(annotation, height, width, place))
        boxes.append(box)
        classes.append(annotation["class"])
        crowd.append(bool(annotation.get("iscrowd", 0)))
    return Scene(
        path=folder / entry["file_name"],
        name=str(entry["file_name"]),
        height=height,
        width=width,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor(classes, dtype=torch.int64),
        crowd=torch.tensor(crowd, dtype=torch.bool),
        regions=tuple(regions),
    )


def _region(annotation: dict[str, Any], height: int, width: int, place: str) -> Any:
    region = annotation.get("segmentation")
    if not region:
        raise UserError(f"{place} has no 'segmentation'; masks and classes of pixels are learned from it.")
    try:
        encoded = encode_region(region, height, width)
        if isinstance(region, dict):
            _check_counts(region, height, width)
        return encoded
    except UserError:
        raise
    except Exception as error:  # pycocotools raises errors of many kinds
        raise UserError(f"{place}: its 'segmentation' is none of COCO's formats ({error}).") from error


def _check_counts(region: dict[str, Any], height: int, width: int) -> None:
    """Make sure that run lengths are of a mask of the image's size, all of it.

    Raises:
        ValueError: they aren't, or they are garbled.
    """
    if list(region["size"]) != [height, width]:
        raise ValueError(f"its size is {region['size']}, the image's [{height}, {width}]")
    counts = region["counts"]
    if isinstance(counts, list) and sum(counts) != height * width:
        raise ValueError(f"its counts are of {sum(counts)} pixels, the image has {height * width}")
    if not isinstance(counts, list):
        mask_tools().decode(region)
