"""Where images come from: folders, Parquet, IDX files, torchvision and Hugging Face data sets."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.progress import progress

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}

# Name on the command line -> torchvision class, and the keyword that chooses a split.
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", "train"),
    "cifar100": ("CIFAR100", "train"),
    "fashion-mnist": ("FashionMNIST", "train"),
    "mnist": ("MNIST", "train"),
    "stl10": ("STL10", "split"),
    "svhn": ("SVHN", "split"),
}
NAMED_SETS = ["digits", *TORCHVISION_SETS]


@dataclass
class ImageSource:
    """Images that are still encoded.

    Attributes:
        ids: a name for each image: its path, or its row in the file.
        open_image: decodes image number i.
        labels: (N,) class numbers, or None.
        class_names: name of each class.
    """

    ids: list[str]
    open_image: Callable[[int], Image.Image]
    labels: Tensor | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def find_images(data: str) -> ImageSource:
    """Find a data set by path or name.

    Args:
        data: a folder of images (flat, or one folder a class), of Parquet or of IDX files; a Parquet file with
            an image column; ``digits``; a torchvision data set by name (cifar10, cifar100, fashion-mnist, mnist,
            stl10, svhn); or a Hugging Face data set, ``hf:owner/name``. ``:test`` behind a name chooses a split.

    Raises:
        UserError: nothing is there, or no image is in it.
    """
    if not data:
        raise UserError("--data is missing: give a folder of images, a Parquet file, or a data set's name.")
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix == ".parquet":
            return _parquet([path])
        raise UserError(f"{path} is a file but not Parquet; give the folder that the images are in.")
    name, _, split = data.partition(":")
    if name == "hf":
        hub_name, _, hub_split = split.partition(":")
        return _hugging_face(hub_name, hub_split or "train")
    if name == "digits":
        return _digits()
    if name in TORCHVISION_SETS:
        return _torchvision(name, split or "train")
    if os.sep in data or data.startswith("."):
        hint = "" if data.startswith((".", "/", "~")) else f" For a Hugging Face data set write hf:{data}."
        raise UserError(f"{data} does not exist.{hint}")
    raise unknown_name("data set (and there is no such folder or file)", name, NAMED_SETS)


def _folder(path: Path) -> ImageSource:
    entries = sorted(path.rglob("*"))
    if any(entry.name.endswith(("-ubyte", "-ubyte.gz")) for entry in entries):
        return _idx(entries, "train")
    tables = [entry for entry in entries if entry.suffix == ".parquet"]
    if tables:
        return _parquet(tables)
    files = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"No images in {path}: looked for {known} in it and its folders.")
    folders = sorted({file.parent for file in files})
    labels = None
    if len(folders) > 1:
        numbers = {folder: number for number, folder in enumerate(folders)}
        labels = torch.tensor([numbers[file.parent] for file in files])
    return ImageSource(
        [str(file.relative_to(path)) for file in files],
        lambda i: Image.open(files[i]),
        labels,
        [str(folder.relative_to(path)) for folder in folders] if labels is not None else None,
    )


def _parquet(paths: list[Path]) -> ImageSource:
    table = pyarrow.parquet.ParquetDataset([str(path) for path in paths]).read()
    columns = [name for name in ("image", "img", "picture") if name in table.column_names]
    if not columns:
        raise UserError(f"{paths[0]} has no column 'image'; its columns are {', '.join(table.column_names)}.")
    cells = table.column(columns[0])
    labels = None
    names = [name for name in ("label", "labels", "fine_label") if name in table.column_names]
    if names:
        labels = _as_labels(table.column(names[0]).to_pylist())
    return ImageSource(
        [f"row {i}" for i in range(len(table))],
        lambda i: _open_cell(cells[i].as_py()),
        labels[0] if labels else None,
        labels[1] if labels else None,
    )


def _open_cell(cell: Any) -> Image.Image:
    content = cell["bytes"] if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise OSError("the cell holds no encoded image")
    return Image.open(io.BytesIO(content))


def _as_labels(values: list[Any]) -> tuple[Tensor, list[str]]:
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[value] for value in values]), [str(name) for name in names]


def _idx(files: list[Path], split: str) -> ImageSource:
    prefix = "t10k" if split == "test" else "train"
    found = {kind: [f for f in files if f.name.startswith(f"{prefix}-{kind}")] for kind in ("images", "labels")}
    if not found["images"]:
        raise UserError(f"No {prefix}-images-idx3-ubyte in {files[0].parent}.")
    pixels = read_idx(found["images"][0])
    labels = _as_labels(read_idx(found["labels"][0]).tolist()) if found["labels"] else None
    return _from_arrays(list(pixels), labels)


def read_idx(path: Path) -> NDArray[Any]:
    """Read an IDX file of unsigned bytes, gzipped or not (the format of MNIST).

    Raises:
        UserError: it is not such a file, or shorter than its header says.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an IDX file of unsigned bytes.")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = tuple(int(value) for value in np.frombuffer(content[4:start], ">u4"))
    values = np.frombuffer(content[start:], np.uint8)
    if len(values) != int(np.prod(shape)):
        raise UserError(f"{path} should hold {int(np.prod(shape))} values and holds {len(values)}: is it cut off?")
    return values.reshape(shape)


def _from_arrays(arrays: list[NDArray[Any]], labels: tuple[Tensor, list[str]] | None) -> ImageSource:
    return ImageSource(
        [f"row {i}" for i in range(len(arrays))],
        lambda i: Image.fromarray(arrays[i]),
        labels[0] if labels else None,
        labels[1] if labels else None,
    )


def _digits() -> ImageSource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)
    return _from_arrays(list(pixels), _as_labels(digits.target.tolist()))


def data_home() -> Path:
    """Where named data sets are kept: ``$CONTRASTIVE_MM_DATA``, or ``~/.cache/contrastive_mm``."""
    return Path(os.environ.get("CONTRASTIVE_MM_DATA", "~/.cache/contrastive_mm")).expanduser()


def _torchvision(name: str, split: str) -> ImageSource:
    from torchvision import datasets as torchvision_sets

    class_name, keyword = TORCHVISION_SETS[name]
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
    names = [str(n) for n in getattr(dataset, "classes", range(int(numbers.max()) + 1))]
    unlabelled = bool((numbers < 0).any())  # STL-10's unlabelled split carries -1
    return ImageSource(
        [f"row {i}" for i in range(len(dataset))],
        lambda i: dataset[i][0],
        None if unlabelled else numbers,
        None if unlabelled else names,
    )


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
    column = images[0]
    labels = torch.tensor(dataset[classes[0]][:]) if classes else None
    return ImageSource(
        [f"row {i}" for i in range(len(dataset))],
        lambda i: dataset[i][column],
        labels,
        list(kinds[classes[0]].names) if classes else None,
    )


def decode(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An image as a square of RGB bytes: turned upright, its shorter side resized to ``size``, its middle cut out."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    if upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(upright)


class ImageSet:
    """Images of one size as bytes: all in memory where they fit, else decoded each time they are read.

    A broken image is named and left out, as long as their share stays within ``max_broken``.

    Args:
        source: where the images come from.
        size: side in pixels to which each is brought.
        max_broken: largest share of broken images that is put up with.
        memory_limit: bytes up to which all images are kept decoded.

    Raises:
        UserError: more broken images than that.
    """

    def __init__(self, source: ImageSource, size: int, max_broken: float = 0.01, memory_limit: int = 4 << 30) -> None:
        self.source = source
        self.size = size
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}
        self._threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self._pixels: Tensor | None = None
        self.rows = torch.arange(len(source))
        if len(source) * 3 * size * size <= memory_limit:
            self._load_all()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Int[Tensor, " images"] | None:
        """(N,) class numbers, or None."""
        return None if self.source.labels is None else self.source.labels[self.rows]

    @property
    def ids(self) -> list[str]:
        """N names."""
        return [self.source.ids[row] for row in self.rows.tolist()]

    def read(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch 3 size size"]:
        """The images of these numbers.

        Where images are decoded as they are read, a broken one is replaced by the next whole one.

        Raises:
            UserError: more broken images than allowed so far.
        """
        if self._pixels is not None:
            return self._pixels[indices]
        decoded = list(self._threads.map(self._decode_or_next, self.rows[indices].tolist()))
        self._check_broken()
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, row: int) -> NDArray[Any] | None:
        if row in self.broken:
            return None
        try:
            with self.source.open_image(row) as image:
                return decode(image, self.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            self.broken[row] = f"{self.source.ids[row]} ({error})"
            return None

    def _decode_or_next(self, row: int) -> NDArray[Any]:
        for ahead in range(len(self.source)):
            pixels = self._decode((row + ahead) % len(self.source))
            if pixels is not None:
                return pixels
            self._check_broken()
        raise UserError("Not one image could be read.")

    def _load_all(self) -> None:
        count = len(self.source)
        pixels = torch.empty(count, 3, self.size, self.size, dtype=torch.uint8)
        decoded = self._threads.map(self._decode, range(count))
        for row, array in enumerate(progress(decoded, desc="decode", total=count, unit="image")):
            if array is not None:
                pixels[row] = torch.from_numpy(array.copy()).permute(2, 0, 1)
        self._check_broken()
        if self.broken:
            self.rows = torch.tensor([row for row in range(count) if row not in self.broken])
            pixels = pixels[self.rows]
            tqdm.write(f"Left out {len(self.broken)} broken of {count} images: {self._broken_names()}")
        self._pixels = pixels

    def _check_broken(self) -> None:
        if len(self.broken) > self.max_broken * len(self.source):
            raise UserError(
                f"{len(self.broken)} of {len(self.source)} images are broken, more than --max-broken "
                f"{self.max_broken} allows: {self._broken_names()}. Repair them, or raise --max-broken."
            )

    def _broken_names(self) -> str:
        names = [self.broken[row] for row in sorted(self.broken)]
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more
