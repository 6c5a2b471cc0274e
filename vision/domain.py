"""The vision domain: images in, image encoders out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.domain import Embeddings
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import (
    effective_rank,
    extract_features,
    few_label_accuracy,
    knn_accuracy,
    linear_probe_accuracy,
    split_rows,
    uniformity,
)
from contrastive_mm.vision.augment import ImageViewConfig, ImageViews, plain_view
from contrastive_mm.vision.encoders import build_image_encoder
from contrastive_mm.vision.images import ImageSet, ImageSource
from contrastive_mm.vision.sources import find_images

EVALUATION_BATCH = 256
PROBE_ROWS = 10_000
FEW_LABELS = (1, 5, 10)
MOST_NEIGHBOURS = 200
RAW_SIDE = 32
LARGEST_NATIVE = 96


@dataclass(frozen=True)
class VisionConfig:
    """Images."""

    data: str = ""
    """Folder of images (flat, or one folder a class), of Parquet or of IDX files; Parquet file with an image
    column; digits, cifar10, cifar100, fashion-mnist, mnist, stl10, svhn (name:test takes another split); or
    hf:owner/name."""
    encoder: str = "small-conv"
    """small-conv (small-conv-16 has half its width), or a torchvision model such as resnet18."""
    image_size: int | None = None
    """Side of the views in pixels; by default the first image's shorter side, or 224 where that is over 96."""
    batch_size: int = 256
    """Images a step; with SimCLR each has 2 (batch_size - 1) negatives."""
    validation_share: float = 0.1
    """Last part of each class, held back from training for `evaluate`; nothing where there are no labels."""
    max_broken: float = 0.01
    """Largest share of unreadable images that is left out instead of stopping the run."""
    views: ImageViewConfig = field(default_factory=ImageViewConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UserError(f"--validation-share = {self.validation_share}; it must lie in [0, 1).")
        if self.image_size is not None and self.image_size < 4:
            raise UserError(f"--image-size = {self.image_size}; it must be at least 4.")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"--max-broken = {self.max_broken}; a share lies between 0 and 1.")


class ImageDomain:
    """Pretrains image encoders and scores them (kNN, linear probe, few labels)."""

    config_class: ClassVar[type[VisionConfig]] = VisionConfig
    default_method: ClassVar[str] = "simclr"
    commands: ClassVar[dict[str, str]] = {
        "fine-tune": "contrastive_mm.vision.fine_tune:fine_tune",
        "simclr-v2": "contrastive_mm.vision.simclr_v2:simclr_v2",
    }

    def __init__(self, config: VisionConfig, seed: int, saved: Path | None = None) -> None:
        self.seed = seed
        source = find_images(config.data)
        self.image_size = config.image_size or native_size(source)
        self.config = replace(config, image_size=self.image_size)
        # Views are cropped from somewhat more than their own size, where images are large enough to have it.
        stored_size = self.image_size if self.image_size <= LARGEST_NATIVE else self.image_size * 8 // 7
        self.images = ImageSet(source, stored_size, config.max_broken)
        self.labels, self.class_names = self.images.labels, source.class_names
        self.train_rows, self.validation_rows = split_rows(len(self.images), self.labels, config.validation_share)
        self.make_views = ImageViews(self.image_size, config.views, seed)

    def build_encoder(self) -> nn.Module:
        """The encoder named in the options, with random weights."""
        return build_image_encoder(self.config.encoder, self.image_size)

    def train_batches(self) -> ShuffledBatches:
        """Batches of ``image`` (B, 3, S, S) uint8, ``index`` (B,) and, where there are labels, ``label`` (B,).

        ``index`` is the image's number among those trained on.
        """
        return ShuffledBatches(len(self.train_rows), self.config.batch_size, self._load, self.seed, prefetch=2)

    def _load(self, indices: Tensor) -> dict[str, Tensor]:
        rows = self.train_rows[indices]
        batch = {"image": self.images.read(rows), "index": indices}
        return batch if self.labels is None else {**batch, "label": self.labels[rows]}

    def evaluate(self, encoder: nn.Module | None) -> dict[str, float]:
        """Scores on the validation part, learned from the training part's labels; raw pixels for None.

        With labels: ``few_label_accuracy_n`` (logistic regression, n labels a class, mean of 20 draws),
        ``knn_accuracy`` (k = 200, or half of the smallest class), ``linear_probe_accuracy`` (on at most 10,000
        training images). Without: ``uniformity`` and ``effective_rank`` of up to 2,048 images.
        """
        labels = self.labels
        if labels is None or len(labels.unique()) < 2 or len(self.validation_rows) == 0:
            rows = self.train_rows[:2048]
            features = self._features(encoder, rows)
            return {"uniformity": uniformity(features), "effective_rank": effective_rank(features)}
        train = self._features(encoder, self.train_rows)
        test = self._features(encoder, self.validation_rows)
        train_y, test_y = labels[self.train_rows], labels[self.validation_rows]
        # Of the classes that are there: numbers may have gaps, where a class of the data set has no image.
        smallest = int(train_y.unique(return_counts=True)[1].min())
        scores = {
            f"few_label_accuracy_{n}": few_label_accuracy(train, train_y, test, test_y, n)
            for n in FEW_LABELS
            if n <= smallest
        }
        neighbours = min(MOST_NEIGHBOURS, max(1, smallest // 2))
        scores["knn_accuracy"] = knn_accuracy(train, train_y, test, test_y, neighbours)
        few = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:PROBE_ROWS]
        scores["linear_probe_accuracy"] = linear_probe_accuracy(train[few], train_y[few], test, test_y)
        return scores

    def embed(self, encoder: nn.Module | None, everything: bool = False) -> Embeddings:
        """Embed the validation part (all images where nothing is held back), or everything; raw pixels for None."""
        held_back = len(self.validation_rows) > 0 and not everything
        rows = self.validation_rows if held_back else torch.arange(len(self.images))
        names, labels = self.class_names, self.labels
        ids = self.images.ids
        return Embeddings(
            features=self._features(encoder, rows),
            ids=[ids[row] for row in rows.tolist()],
            labels=None if labels is None or names is None else [names[i] for i in labels[rows].tolist()],
            previews=_Thumbnails(self.images, rows),
        )

    def save(self, folder: Path) -> None:
        """Nothing beyond the options is needed."""

    def _features(self, encoder: nn.Module | None, rows: Tensor) -> Tensor:
        chunks = rows.split(EVALUATION_BATCH)
        if encoder is None:
            side = min(self.image_size, RAW_SIDE)
            return torch.cat([plain_view(self.images.read(chunk), side).flatten(1) for chunk in chunks])
        plain = (self.make_views.plain(self.images.read(chunk)) for chunk in chunks)
        return extract_features(encoder, plain)


class _Thumbnails(Sequence[Any]):
    """Images to look at, read when they are asked for."""

    def __init__(self, images: ImageSet, rows: Tensor) -> None:
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.images.read(self.rows[index].reshape(1))[0].permute(1, 2, 0).numpy()


def native_size(source: ImageSource) -> int:
    """Side of the views for a data set: the first readable image's shorter side, or 224 where it is over 96."""
    for number in range(len(source)):
        try:
            with source.open_image(number) as image:
                side = min(image.size)
        except Exception:  # broken; the image set names it
            continue
        return side if side <= LARGEST_NATIVE else 224
    raise UserError(f"Not one of the {len(source)} images could be opened, {source.ids[0]} the first of them.")
