"""Where images come from: folders, Parquet, IDX files, tar shards, torchvision and Hugging Face data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.vision.data.folders import open_folder, open_split
from contrastive_mm.vision.data.hub import open_hub
from contrastive_mm.vision.data.images import ImageSource, to_classes
from contrastive_mm.vision.data.packed import from_arrays, open_parquet
from contrastive_mm.vision.data.shards import expand_shards, open_tars
from contrastive_mm.vision.data.streaming import STREAM, open_stream, stream_sample

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
        data: a folder of images (see ``open_folder``), of Parquet, IDX or tar files; a Parquet file with an image
            column; tar shards by a pattern (``shards/train-{000..015}.tar``, see ``expand_shards``); ``digits``; a
            torchvision data set by name (cifar10, cifar100, fashion-mnist, mnist, stl10, svhn); or a Hugging Face data
            set, ``hf:owner/name``. ``:test`` behind a name or a folder (see ``open_split``) chooses a split. Of a
            stream (``stream:``, see ``open_stream``) it is the first thousand images, without labels.

    Raises:
        UserError: nothing is there, no image is in it, or there is no such split.
    """
    if not data:
        raise UserError("--data is missing: give a folder of images, a Parquet file, or a data set's name.")
    if data.startswith(STREAM):
        return stream_sample(open_stream(data))
    path = Path(data).expanduser()
    place, _, split = data.rpartition(":")
    folder = Path(place).expanduser() if place else None
    if path.exists():
        source = _open_path(path)
    elif folder is not None and folder.is_dir():
        source = open_split(folder, split)
    else:
        source = _open_name(data)
    if not len(source):
        raise UserError(f"{data} holds no images.")
    return source


def _open_path(path: Path) -> ImageSource:
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() == ".parquet":
        return open_parquet([path])
    if path.suffix.lower() == ".tar":
        return open_tars([str(path)])
    raise UserError(f"{path} is a file but neither Parquet nor tar; give the folder that the images are in.")


def _open_shards(pattern: str) -> ImageSource:
    paths = [os.path.expanduser(shard) for shard in expand_shards(pattern)]
    if missing := [path for path in paths if not os.path.exists(path)]:
        remote = "" if "://" not in pattern else f" To read shards from elsewhere in a stream, write stream:{pattern}."
        raise UserError(f"{len(missing)} of {len(paths)} shards are not there, {missing[0]} the first.{remote}")
    return open_tars(paths)


def _open_name(data: str) -> ImageSource:
    if data.endswith(".tar"):
        return _open_shards(data)
    name, _, split = data.partition(":")
    if name == "hf":
        hub_name, _, hub_split = split.partition(":")
        return open_hub(hub_name, hub_split or "train")
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
    names = [str(name) for name in getattr(dataset, "classes", range(int(numbers.max()) + 1))]
    # STL-10 has -1 throughout `unlabeled` and in part of `train+unlabeled`.
    labels = to_classes(numbers.tolist(), f"{name} ({split})", names)
    return ImageSource([f"row {i}" for i in range(len(dataset))], lambda i: dataset[i][0], *labels)
