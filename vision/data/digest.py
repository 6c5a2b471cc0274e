"""Whether images are the ones that a result was computed on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from contrastive_mm.vision.data.images import ROWS_AHEAD, ImageSet


def names_digest(names: Iterable[str], labels: Iterable[Any]) -> str:
    """A short digest of images' names and labels, in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0")
    for label in labels:
        digest.update(f"{label} ".encode())
    return digest.hexdigest()[:16]


def images_digest(images: ImageSet) -> str:
    """A short digest of images' names, labels and contents.

    Contents are the pixels where they are in memory; on disk, each file's length and ends (``Ends``), which tell
    nearly every other file and are read without decoding.
    """
    digest = hashlib.sha256(names_digest(images.ids, [] if images.labels is None else images.labels.tolist()).encode())
    ends = images.source.ends
    if images.in_memory or ends is None:
        for rows in torch.arange(len(images)).split(ROWS_AHEAD):
            digest.update(images.read(rows).numpy().tobytes())
        return digest.hexdigest()[:16]
    for row in images.rows.tolist():
        head, tail, size = ends(row)
        digest.update(b"%d %b %b" % (size, head, tail))
    return digest.hexdigest()[:16]
