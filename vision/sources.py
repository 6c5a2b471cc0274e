"""Where images come from: folders, Parquet, IDX files, torchvision and Hugging Face data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.vision.images import Classes, ImageSource, to_classes
from contrastive_mm.vision.packed import from_arrays, open_idx, open_parquet

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
IDX_ENDINGS = ("-ubyte", "-ubyte.gz")
TRAIN_FOLDERS = {"train", "training"}
HELD_BACK_FOLDERS = {"val", "valid", "validation", "dev", "test", "testing"}

# Name on the command line -> torchvision class, the keyword that chooses a split, and the splits.
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", "train", ("train", "test")),
    "cifar100": ("CIFAR100", "train", ("train", "test")),
    "fashion-mnist": ("FashionMNIST", "train", ("train", "test")),
    "mnist": ("MNIST", "train", ("train", "test")),
    "stl10": ("STL10", "split", ("train", "test", "unlabeled", "train+unlabeled")),
    "svhn": ("SVHN", "split", ("train", "test", "extra")),
}
NAMED_SETS = ["digits", *TORCHVISION_SETS]


def find_images(data: str) -> ImageSource:
    """Find a data set by path or name.

    Args:
        data: a folder of images (see ``open_folder``), of Parquet or of IDX files; a Parquet file with an image
            column; ``digits``; a torchvision data set by name (cifar10, cifar100, fashion-mnist, mnist, stl10,
            svhn); or a Hugging Face data set, ``hf:owner/name``. ``:test`` behind a name chooses a split.

    Raises:
        UserError: nothing is there, no image is in it, or there is no such split.
    """
    if not data:
        raise UserError("--data is missing: give a folder of images, a Parquet file, or a data set's name.")
    path = Path(data).expanduser()
    source = _open_path(path) if path.exists() else _open_name(data)
    if not len(source):
        raise UserError(f"{data} holds no images.")
    return source


def _open_path(path: Path) -> ImageSource:
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() == ".parquet":
        return open_parquet([path])
    raise UserError(f"{path} is a file but not Parquet; give the folder that the images are in.")


def _open_name(data: str) -> ImageSource:
    name, _, split = data.partition(":")
    if name == "hf":
        hub_name, _, hub_split = split.partition(":")
        return _hugging_face(hub_name, hub_split or "train")
    if name == "digits":
        _check_split(name, split or "train", ("train",))
        return _digits()
    if name in TORCHVISION_SETS:
        return _torchvision(name, split or "train")
    if os.sep in data or data.startswith("."):
        hint = "" if data.startswith((".", "/", "~")) else f" For a Hugging Face data set write hf:{data}."
        raise UserError(f"{data} does not exist.{hint}")
    raise unknown_name("data set (and there is no such folder or file)", name, NAMED_SETS)


def _check_split(name: str, split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise unknown_name("split", split, known, f"the data set {name}")


def open_folder(path: Path) -> ImageSource:
    """Images in a folder and its folders; where there are none, its IDX files, or else its Parquet files.

    The class of an image is the first folder on its way from ``path``, so ``ape/young/1.png`` is an ape. Where
    everything lies in one folder, that folder stands in for ``path``. Images beside the class folders make it a
    set without labels, and a note says so. Names that start with a dot, and ``__MACOSX``, are skipped.

    Raises:
        UserError: nothing is found, or the folders are splits (train beside val or test) and not classes.
    """
    files = _walk(path)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    packed = [file for file in files if file.name.endswith(IDX_ENDINGS)]
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if images:
        if others := packed + tables:
            tqdm.write(f"Using the {len(images)} images in {path}, not {others[0].name}: to use that, give its path.")
        ids = [str(file.relative_to(path)) for file in images]
        return ImageSource(ids, lambda i: Image.open(images[i]), *_classes_by_folder(path, images))
    if packed:
        return open_idx(packed)
    if tables:
        return open_parquet(tables)
    known = " ".join(sorted(IMAGE_SUFFIXES))
    raise UserError(f"No images in {path}: looked for {known} in it and its folders.")


def _walk(path: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__MACOSX"]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _classes_by_folder(path: Path, files: list[Path]) -> Classes:
    ways = [file.relative_to(path).parts[:-1] for file in files]
    while all(ways) and len({way[0] for way in ways}) == 1:
        path, ways = path / ways[0][0], [way[1:] for way in ways]
    loose = [file for file, way in zip(files, ways, strict=True) if not way]
    if len(loose) == len(files):
        return None, None
    _refuse_splits(path, sorted({way[0] for way in ways if way}))
    if loose:
        tqdm.write(
            f"{len(loose)} of {len(files)} images lie in {path} beside its folders, {loose[0].name} for one: used "
            "without labels. To have labels, put every image into the folder of its class."
        )
        return None, None
    return to_classes([way[0] for way in ways], str(path))


def _refuse_splits(path: Path, folders: list[str]) -> None:
    train = [name for name in folders if name.lower() in TRAIN_FOLDERS]
    held_back = [name for name in folders if name.lower() in HELD_BACK_FOLDERS]
    if train and held_back:
        raise UserError(
            f"The folders of {path} look like splits ({', '.join(train + held_back)}), not like classes: give one "
            f"of them, such as --data {path / train[0]}."
        )


def _digits() -> ImageSource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    return from_arrays(list(pixels), to_classes(digits.target.tolist(), "digits"))


def data_home() -> Path:
    """Where named data sets are kept: ``$CONTRASTIVE_MM_DATA``, or ``~/.cache/contrastive_mm``."""
    return Path(os.environ.get("CONTRASTIVE_MM_DATA", "~/.cache/contrastive_mm")).expanduser()


def _torchvision(name: str, split: str) -> ImageSource:
    from torchvision import datasets as torchvision_sets

    class_name, keyword, splits = TORCHVISION_SETS[name]
    _check_split(name, split, splits)
    choice: dict[str, Any] = {keyword: split == "train" if keyword == "train" else split}
    try:
        dataset = getattr(torchvision_sets, class_name)(str(data_home()), download=True, **choice)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{name} ({split}) could not be had through torchvision: {error}. Put its files into {data_home()}, "
            "or give --data the path of a folder or Parquet file."
        ) from error
    values = getattr(dataset, "targets", None)
    values = dataset.labels if values is None else values
    numbers = torch.as_tensor(np.asarray(values)).long()
    labels: Classes = (None, None)
    if bool((numbers >= 0).all()):  # STL-10 has -1 throughout `unlabeled` and in part of `train+unlabeled`
        names = getattr(dataset, "classes", range(int(numbers.max()) + 1))
        labels = numbers, [str(name) for name in names]
    return ImageSource([f"row {i}" for i in range(len(dataset))], lambda i: dataset[i][0], *labels)


def _hugging_face(name: str, split: str) -> ImageSource:
    try:
        import datasets
    except ImportError as error:
        raise UserError('Hugging Face data sets need one more package: pip install "contrastive_mm[hub]".') from error
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds, for a missing name, split, file and network
        raise UserError(f"Hugging Face data set {name!r} ({split}) could not be loaded: {error}") from error
    kinds = dataset.features
    images = [column for column, kind in kinds.items() if type(kind).__name__ == "Image"]
    if not images:
        raise UserError(f"Hugging Face data set {name!r} has no image column; its columns are {', '.join(kinds)}.")
    classes = [column for column, kind in kinds.items() if type(kind).__name__ == "ClassLabel"]
    labels: Classes = (None, None)
    if classes:
        where = f"the column {classes[0]!r} of {name}"
        labels = to_classes(dataset[classes[0]][:], where, list(kinds[classes[0]].names))
    cells = dataset.select_columns(images[:1])
    return ImageSource([f"row {i}" for i in range(len(dataset))], lambda i: _cell_image(cells[i][images[0]]), *labels)


def _cell_image(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("the cell holds no image")
    return image
