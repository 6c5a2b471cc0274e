"""Images in folders: found without opening one, classes by folder, nothing passed over in silence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import Classes, ImageSource, printable, to_classes
from contrastive_mm.vision.data.integrity import ends_of_file, require_file
from contrastive_mm.vision.data.packed import open_idx, open_parquet
from contrastive_mm.vision.data.shards import open_tars

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
IDX_ENDINGS = ("-ubyte", "-ubyte.gz")
TRAIN_FOLDERS = {"train", "training"}
HELD_BACK_FOLDERS = {"val", "valid", "validation", "dev", "test", "testing"}
UNLABELLED_FOLDERS = {"unlabelled", "unlabeled"}


def open_folder(path: Path) -> ImageSource:
    """Images in a folder and its folders; where there are none, its IDX files, Parquet files or tar shards.

    The class of an image is the first folder on its way from ``path``, so ``ape/young/1.png`` is an ape. Where
    everything lies in one folder, that folder stands in for ``path``. Images beside the class folders, and those in
    a folder called ``unlabelled`` or ``unlabeled``, have no label, and a note says how many. Links are followed.
    Names that start with a dot, and ``__MACOSX``, are skipped.

    Raises:
        UserError: nothing is found, a folder can't be read, or the folders are splits (train beside val or test) and
            not classes.
    """
    files = _walk(path)
    images = [name for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    packed = [name for name in files if name.endswith(IDX_ENDINGS)]
    tables = [name for name in files if name.lower().endswith(".parquet")]
    tars = [name for name in files if name.lower().endswith(".tar")]
    if images:
        if others := packed + tables + tars:
            other = os.path.basename(others[0])
            tqdm.write(f"Using the {len(images)} images in {path}, not {other}: to use that, give its path.")
        return _open_files(path, images)
    if packed:
        return open_idx([path / name for name in packed])
    if tables:
        return open_parquet(_refuse_split_files(path, tables))
    if tars:
        return open_tars([str(file) for file in _refuse_split_files(path, tars)])
    known = " ".join(sorted(IMAGE_SUFFIXES))
    raise UserError(f"No images in {path}: looked for {known} in it and its folders.")


def open_split(path: Path, split: str) -> ImageSource:
    """One split of a folder: its folder of that name, or the IDX files, Parquet files or tar shards so called.

    Files are of the split ``test`` where their names begin with ``test`` (or with ``t10k``, as MNIST's do).

    Raises:
        UserError: there is none; or as ``open_folder``.
    """
    if (path / split).is_dir():
        return open_folder(path / split)
    names = [name for name in _walk(path) if _split_of(name) == split]
    if packed := [name for name in names if name.endswith(IDX_ENDINGS)]:
        return open_idx([path / name for name in packed], "t10k" if split == "test" else split)
    if tables := [name for name in names if name.lower().endswith(".parquet")]:
        return open_parquet([path / name for name in tables])
    if tars := [name for name in names if name.lower().endswith(".tar")]:
        return open_tars([str(path / name) for name in tars])
    raise UserError(f"{path} has no split '{split}': no folder of that name, and no file whose name begins with it.")


def _split_of(name: str) -> str:
    """What a file's name begins with, up to a sign: the split, where a data set is written in splits."""
    first = re.split(r"[^A-Za-z0-9]", os.path.basename(name))[0].lower()
    return "test" if first == "t10k" else first


def _refuse_split_files(path: Path, names: list[str]) -> list[Path]:
    """The files of one data set; refuses those of several splits, which nobody wants to train on at once."""
    splits = {_split_of(name) for name in names}
    if splits & TRAIN_FOLDERS and splits & HELD_BACK_FOLDERS:
        train = next(iter(splits & TRAIN_FOLDERS))
        raise UserError(
            f"The files of {path} are of several splits ({', '.join(sorted(splits))}): choose one, such as "
            f"{path}:{train}."
        )
    return [path / name for name in names]


def _open_files(path: Path, names: list[str]) -> ImageSource:
    root = str(path)

    def full(number: int) -> str:
        return os.path.join(root, names[number])

    return ImageSource(
        [printable(name) for name in names],
        lambda number: Image.open(require_file(full(number))),
        *_classes_by_folder(path, names),
        ends=lambda number: ends_of_file(full(number)),
    )


def _walk(path: Path) -> list[str]:
    """The files in a folder and its folders, relative to it, sorted."""
    root, seen, found = str(path), set(), []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that has been or is being walked
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        relative = "" if folder == root else os.path.relpath(folder, root) + os.sep
        found += [relative + name for name in names if not name.startswith(".")]
    return sorted(found)


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(
        f"The folder {error.filename} can't be read ({error.strerror}). Allow yourself to read it, or take it out "
        "of the data."
    ) from error


def _classes_by_folder(path: Path, names: list[str]) -> Classes:
    ways = [name.split(os.sep)[:-1] for name in names]
    while all(ways) and len({way[0] for way in ways}) == 1:
        path, ways = path / ways[0][0], [way[1:] for way in ways]
    folders = sorted({way[0] for way in ways if way})
    _refuse_splits(path, folders)
    values = [way[0] if way and way[0].lower() not in UNLABELLED_FOLDERS else None for way in ways]
    missing = [number for number, value in enumerate(values) if value is None]
    if missing and len(missing) < len(names):
        tqdm.write(
            f"{len(missing)} of {len(names)} images in {path} lie in no folder of a class, {names[missing[0]]} for "
            "one: they have no label."
        )
    return to_classes(values, str(path))


def _refuse_splits(path: Path, folders: list[str]) -> None:
    train = [name for name in folders if name.lower() in TRAIN_FOLDERS]
    held_back = [name for name in folders if name.lower() in HELD_BACK_FOLDERS]
    if train and held_back:
        raise UserError(
            f"The folders of {path} look like splits ({', '.join(train + held_back)}), not like classes: give one "
            f"of them, such as --data {path / train[0]}."
        )
