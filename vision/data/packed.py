"""Images packed into one file: Parquet tables and IDX files."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import Classes, ImageSource, to_classes
from contrastive_mm.vision.data.integrity import ends_of

IMAGE_COLUMNS = ("image", "img", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def open_parquet(paths: list[Path]) -> ImageSource:
    """Images of the column ``image``, ``img`` or ``picture``, labelled by ``label``, ``labels`` or ``fine_label``.

    Cells hold encoded images, or mappings with them under ``bytes``, as Hugging Face writes them. A label column
    of nothing but null or -1 is none; among other labels these say that a row has none.

    Raises:
        UserError: a file is broken or has no such column.
    """
    name = str(paths[0]) if len(paths) == 1 else f"the {len(paths)} Parquet files, {paths[0]} the first"
    tables = [_read_table(path) for path in paths]
    try:
        table = pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise UserError(f"The columns differ among {name}: {error}") from error
    cells = table.column("image")
    classes: Classes = (None, None)
    if "label" in table.column_names:
        classes = to_classes(table.column("label").to_pylist(), f"the label column of {name}")
    ids = [f"row {i}" for i in range(len(table))]
    return ImageSource(
        ids, lambda i: open_cell(cells[i].as_py()), *classes, ends=lambda i: ends_of(cell_bytes(cells[i].as_py()))
    )


def _read_table(path: Path) -> pyarrow.Table:
    """The columns ``image`` and, where there is one, ``label``, under these names."""
    try:
        dataset = pyarrow.parquet.ParquetDataset(str(path))
        known = dataset.schema.names
        images = [name for name in IMAGE_COLUMNS if name in known]
        labels = [name for name in LABEL_COLUMNS if name in known]
        if not images:
            raise UserError(f"{path} has no column 'image'; its columns are {', '.join(known)}.")
        table = dataset.read(columns=[*images[:1], *labels[:1]]).select([*images[:1], *labels[:1]])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} can't be read as Parquet: {error}") from error
    return table.rename_columns(["image", "label"][: table.num_columns])


def cell_bytes(cell: Any) -> bytes:
    """The encoded image in a cell: bytes, or a mapping with them, or with the path of a file, as Hugging Face writes.

    Raises:
        ValueError: there is none.
        OSError: the file can't be read.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None and isinstance(cell, dict) and cell.get("path") and os.path.exists(cell["path"]):
        return Path(cell["path"]).read_bytes()
    if not isinstance(content, bytes):
        raise ValueError("the cell holds no encoded image")
    return content


def open_cell(cell: Any) -> Image.Image:
    """The image in a cell, opened; see ``cell_bytes``."""
    return Image.open(io.BytesIO(cell_bytes(cell)))


def open_idx(files: list[Path], split: str = "train") -> ImageSource:
    """The grey images of ``train-images-idx3-ubyte``, labelled by the file ``train-labels`` beside it.

    Args:
        files: the files of a folder, among them these, gzipped or not.
        split: what the files' names begin with; ``t10k`` in the test split of MNIST and its kin.

    Raises:
        UserError: the images are not there, a file is broken, or there is not one label an image.
    """
    images = [file for file in files if file.name.startswith(f"{split}-images")]
    if not images:
        raise UserError(f"No {split}-images-idx3-ubyte in {files[0].parent}.")
    path = images[0]
    pixels = read_idx(path)
    if pixels.ndim != 3:
        raise UserError(f"{path} holds an array of {pixels.ndim} dimensions; grey images have 3.")
    labels: Classes = (None, None)
    found = [file for file in files if file.name.startswith(f"{split}-labels") and file.parent == path.parent]
    if found:
        values = read_idx(found[0])
        if values.shape != pixels.shape[:1]:
            raise UserError(f"{found[0]} holds labels of shape {values.shape} for {len(pixels)} images in {path}.")
        labels = to_classes(values.tolist(), str(found[0]))
    return from_arrays(list(pixels), labels)


def read_idx(path: Path) -> NDArray[Any]:
    """Read an IDX file of unsigned bytes, gzipped or not (the format of MNIST).

    Raises:
        UserError: it is not such a file, or it is cut off.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(f"{path} is not an IDX file of unsigned bytes.")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    values = np.frombuffer(content[start:], np.uint8)
    if len(values) != math.prod(shape):
        raise UserError(f"{path} should hold {math.prod(shape)} values and holds {len(values)}: is it cut off?")
    return values.reshape(shape)


def from_arrays(arrays: list[NDArray[Any]], labels: Classes) -> ImageSource:
    """A source of images that lie in memory as arrays of bytes."""
    return ImageSource([f"row {i}" for i in range(len(arrays))], lambda i: Image.fromarray(arrays[i]), *labels)
