"""Hugging Face data sets of images."""

from __future__ import annotations

from typing import Any

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import ImageSource, to_classes
from contrastive_mm.vision.data.integrity import ends_of
from contrastive_mm.vision.data.packed import cell_bytes, open_cell


def import_datasets() -> Any:
    """The library of Hugging Face data sets.

    Raises:
        UserError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError('Hugging Face data sets need one more package: pip install "contrastive_mm[hub]".') from error
    return datasets


def hub_columns(name: str, kinds: Any) -> tuple[str, str | None, list[str] | None]:
    """A data set's image column, its label column and the classes' names, from its features.

    Raises:
        UserError: no column holds images.
    """
    images = [column for column, kind in kinds.items() if type(kind).__name__ == "Image"]
    if not images:
        raise UserError(f"Hugging Face data set {name!r} has no image column; its columns are {', '.join(kinds)}.")
    classes = [column for column, kind in kinds.items() if type(kind).__name__ == "ClassLabel"]
    return (images[0], classes[0], list(kinds[classes[0]].names)) if classes else (images[0], None, None)


def load_hub(name: str, split: str, **options: Any) -> Any:
    """Load a data set.

    Raises:
        UserError: the library is not installed, or there is no such data set or split.
    """
    datasets = import_datasets()
    try:
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # the library raises many kinds, for a missing name, split, file and network
        raise UserError(f"Hugging Face data set {name!r} ({split}) could not be loaded: {error}") from error


def open_hub(name: str, split: str) -> ImageSource:
    """A split of a data set, with its first image column and its first column of classes.

    Raises:
        UserError: as ``load_hub`` and ``hub_columns``.
    """
    dataset = load_hub(name, split)
    image, label, names = hub_columns(name, dataset.features)
    values = [None] * len(dataset) if label is None else dataset[label][:]
    classes = to_classes(values, f"the column {label!r} of {name}", names)
    # Encoded, so that the image is opened and decoded where every other is.
    cells = dataset.select_columns([image]).cast_column(image, import_datasets().Image(decode=False))
    ids = [f"row {i}" for i in range(len(dataset))]
    return ImageSource(
        ids, lambda i: open_cell(cells[i][image]), *classes, ends=lambda i: ends_of(cell_bytes(cells[i][image]))
    )
