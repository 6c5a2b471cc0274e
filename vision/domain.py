"""The vision domain: images in, image encoders out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from contrastive_mm.batches import Batches, ShuffledBatches
from contrastive_mm.domain import Embeddings
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import (
    default_neighbours,
    effective_rank,
    extract_features,
    few_label_accuracy,
    knn_accuracy,
    linear_probe_accuracy,
    split_rows,
    uniformity,
)
from contrastive_mm.progress import progress
from contrastive_mm.training.accelerator import current_device
from contrastive_mm.vision.data.digest import images_digest, names_digest
from contrastive_mm.vision.data.images import ImageSet, join_sources
from contrastive_mm.vision.data.loader import CropBatches, CropWorkers
from contrastive_mm.vision.data.sizes import SMALLEST_VIEW, memory_limit, native_size, stored_size
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.data.stream_batches import StreamBatches
from contrastive_mm.vision.data.streaming import STREAM, open_stream
from contrastive_mm.vision.encoders.backbones import run_on_meta
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.encoders.libraries import refuse_size
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews, plain_view

EVALUATION_BATCH = 256
PROBE_ROWS = 10_000
FEW_LABELS = (1, 5, 10)
RAW_SIDE = 32


@dataclass(frozen=True)
class VisionConfig:
    """Images."""

    data: str = ""
    """Folder of images (flat, or one folder a class), of Parquet, IDX or tar files; Parquet file with an image
    column; tar shards (train-{000..015}.tar); digits, cifar10, cifar100, fashion-mnist, mnist, stl10, svhn (name:test
    takes another split); or hf:owner/name. stream: before hf:owner/name or tar shards reads them from front to back,
    for so many --steps."""
    encoder: str = "small-conv"
    """small-conv (small-conv-16 has half its width); a torchvision or timm model such as resnet18, vit_b_16 or
    timm/resnet50; resnet50-2x-sk and the other ResNets of SimCLR v2; vit-small-moco-v3 and its kin. ResNets get a
    small stem up to 64 px."""
    pretrained: bool = False
    """Begin with torchvision's or timm's published weights, and the stem that they were trained with."""
    freeze_patch_projection: bool = False
    """Keep a vision transformer's patch projection as it begins (MoCo v3, section 4.2); vit-*-moco-v3 always do."""
    image_size: int | None = None
    """Side of the views in pixels; by default the first image's shorter side, or 224 where that is over 96."""
    batch_size: int = 256
    """Images a step; with SimCLR each has 2 (batch_size - 1) negatives."""
    validation_share: float = 0.1
    """Last part of each class, held back from training for `evaluate`; nothing where there are no labels."""
    max_broken: float = 0.01
    """Largest share of unreadable images that is left out instead of stopping the run."""
    storage: Literal["auto", "memory", "disk"] = "auto"
    """memory keeps all images decoded as squares, on the GPU where they fit; disk decodes each when it is its turn and
    crops it from the whole image. auto keeps up to 4 GiB of images whose views are at most 96 pixels a side."""
    workers: int | None = None
    """Threads that decode images; by default one a core."""
    prefetch: int = 4
    """Batches made ahead of the one in use, where images are decoded in turn."""
    views: ImageViewConfig = field(default_factory=ImageViewConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UserError(f"--validation-share = {self.validation_share}; it must lie in [0, 1).")
        if self.image_size is not None and self.image_size < SMALLEST_VIEW:
            raise UserError(f"--image-size = {self.image_size}; it must be at least {SMALLEST_VIEW}.")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"--max-broken = {self.max_broken}; a share lies between 0 and 1.")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers = {self.workers}; it must be at least 1.")
        if self.prefetch < 0:
            raise UserError(f"--prefetch = {self.prefetch}; it must be 0 or above.")


class ImageDomain:
    """Pretrains image encoders and scores them (kNN, linear probe, few labels).

    Args:
        config: the options.
        seed: of data order and views.
        saved: folder of the run, which holds nothing more that is needed.
        test_data: images to score on, as ``find_images`` takes them. They take the place of the held-back part, and
            all others are learnt from. No training should see them: it is for evaluation.
    """

    config_class: ClassVar[type[VisionConfig]] = VisionConfig
    default_method: ClassVar[str] = "simclr"
    commands: ClassVar[dict[str, str]] = {
        "detect": "contrastive_mm.vision.dense.transfer:detect",
        "evaluate": "contrastive_mm.vision.evaluation.evaluate:evaluate",
        "export": "contrastive_mm.vision.export.export:export",
        "fine-tune": "contrastive_mm.vision.few_labels.fine_tune:fine_tune",
        "segment": "contrastive_mm.vision.dense.transfer:segment",
        "simclr-v2": "contrastive_mm.vision.few_labels.simclr_v2:simclr_v2",
    }

    def __init__(
        self, config: VisionConfig, seed: int, saved: Path | None = None, test_data: str | None = None
    ) -> None:
        self.seed = seed
        self.test_data = test_data
        source = find_images(config.data)
        learnt = len(source)
        if test_data is not None:
            if test_data == config.data:
                raise UserError(
                    f"--test-data {test_data} is --data itself: its images would be learnt from and scored on."
                )
            source = join_sources(source, find_images(test_data), test_data)
        self.image_size = config.image_size or native_size(source, config.data)
        self.config = replace(config, image_size=self.image_size)
        limit = memory_limit(config.storage, self.image_size)
        self.images = ImageSet(source, stored_size(self.image_size), config.max_broken, limit, config.workers)
        self.labels, self.class_names = self.images.labels, source.class_names
        if test_data is None:
            self.train_rows, self.validation_rows = split_rows(len(self.images), self.labels, config.validation_share)
        else:
            first = self.images.rows < learnt
            self.train_rows, self.validation_rows = first.nonzero().flatten(), (~first).nonzero().flatten()
        self.make_views = ImageViews(self.image_size, config.views, seed)
        # What the encoder was trained to see is a part of what it is: also where a preset changes.
        views = replace(
            config.views,
            augmentation=config.views.named(self.image_size),
            normalisation=self.make_views.preset.normalisation,
        )
        self.config = replace(self.config, views=views)
        trained = None if self.labels is None else self.labels[self.train_rows]
        # Partly labelled data give no labels to train with: a method would take what has none for a class of its own.
        self._train_labels = None if trained is None or bool((trained < 0).any()) else trained
        self._resident: Tensor | None = None

    def build_encoder(self) -> nn.Module:
        """The encoder named in the options, with random or the library's pretrained weights.

        Raises:
            UserError: as ``build_image_encoder``, or it can't take small crops of their size.
        """
        config, views = self.config, self.make_views
        encoder = build_image_encoder(
            config.encoder, self.image_size, config.pretrained, config.freeze_patch_projection
        )
        if views.preset.small_crops:
            with refuse_size(config.encoder, views.small_size, "--small-size"):
                run_on_meta(encoder, views.small_size)
        return encoder

    def train_batches(self) -> Batches:
        """Batches of ``image`` (B, 3, S, S) uint8, ``index`` (B,) and, where all have a label, ``label`` (B,).

        ``index`` is the image's number among those trained on. Images on disk come as random crops instead, as
        ``view_0``, ``view_1``, ... (see ``CropBatches``). Where only some images have a label, none is given.
        """
        count, config = len(self.train_rows), self.config
        if config.data.startswith(STREAM):
            workers = CropWorkers(self.make_views.crops, config.workers)
            stream = open_stream(config.data)
            return StreamBatches(
                stream, config.batch_size, workers, self.seed, config.prefetch, max_broken=config.max_broken
            )
        if self.images.in_memory:
            return ShuffledBatches(
                count, config.batch_size, self._load, self.seed, prefetch=2, identity=self._identity()
            )
        rows = self.train_rows.tolist()
        return CropBatches(
            count,
            config.batch_size,
            CropWorkers(self.make_views.crops, config.workers),
            lambda index: self.images.open(rows[index]),
            self._describe,
            lambda index, error: self.images.note_broken(rows[index], error),
            self.seed,
            config.prefetch,
            self._identity(),
        )

    @cached_property
    def digest(self) -> str:
        """Equal where the images, their names and their labels are; see ``images_digest``."""
        return images_digest(self.images)

    def _identity(self) -> str:
        """What an exact resume needs to be the same of the training images."""
        rows, ids = self.train_rows.tolist(), self.images.ids
        labels = [] if self._train_labels is None else self._train_labels.tolist()
        return names_digest((ids[row] for row in rows), labels)

    def _load(self, indices: Tensor) -> dict[str, Tensor]:
        if self._resident is None:  # at the first batch, when the device is known
            self._resident = self.images.pixels_on(current_device())
        rows = self.train_rows[indices]
        return {"image": self._resident[rows.to(self._resident.device)], **self._describe(indices)}

    def _describe(self, indices: Tensor) -> dict[str, Tensor]:
        if self._train_labels is None:
            return {"index": indices}
        return {"index": indices, "label": self._train_labels[indices]}

    def evaluate(self, encoder: nn.Module | None) -> dict[str, float]:
        """Scores on the validation part, learned from the training part's labels; raw pixels for None.

        With labels: ``few_label_accuracy_n`` (logistic regression, n labels a class, mean of 20 draws),
        ``knn_accuracy`` (k = 200, or half of the smallest class), ``linear_probe_accuracy`` (on at most 10,000
        training images). Images without a label are left out there. Without labels: ``uniformity`` and
        ``effective_rank`` of up to 2,048 images.
        """
        labels = self.labels
        if labels is None or len(labels[labels >= 0].unique()) < 2 or len(self.validation_rows) == 0:
            rows = self.train_rows[:2048]
            features = self._features(encoder, rows)
            return {"uniformity": uniformity(features), "effective_rank": effective_rank(features)}
        train_rows = self.train_rows[labels[self.train_rows] >= 0]
        train = self._features(encoder, train_rows)
        test = self._features(encoder, self.validation_rows)
        train_y, test_y = labels[train_rows], labels[self.validation_rows]
        # Of the classes that are there: numbers may have gaps, where a class of the data set has no image.
        smallest = int(train_y.unique(return_counts=True)[1].min())
        scores = {
            f"few_label_accuracy_{n}": few_label_accuracy(train, train_y, test, test_y, n)
            for n in FEW_LABELS
            if n <= smallest
        }
        scores["knn_accuracy"] = knn_accuracy(train, train_y, test, test_y, default_neighbours(train_y))
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
            labels=None
            if labels is None or names is None
            else [names[i] if i >= 0 else "unlabelled" for i in labels[rows].tolist()],
            previews=_Thumbnails(self.images, rows),
        )

    def save(self, folder: Path) -> None:
        """Nothing beyond the options is needed."""

    def represent(self, encoder: nn.Module | None, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S) as ``images.read`` gives them; raw pixels for None.

        Raw pixels are those of the image at a side of at most 32.
        """
        if encoder is None:
            return plain_view(images, min(self.image_size, RAW_SIDE)).flatten(1)
        return extract_features(encoder, [self.make_views.plain(images)])

    def _features(self, encoder: nn.Module | None, rows: Tensor) -> Tensor:
        chunks = progress(rows.split(EVALUATION_BATCH), desc="encode", unit="batch")
        return torch.cat([self.represent(encoder, self.images.read(chunk)) for chunk in chunks])


class _Thumbnails(Sequence[Any]):
    """Images to look at, read when they are asked for."""

    def __init__(self, images: ImageSet, rows: Tensor) -> None:
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.images.read(self.rows[index].reshape(1))[0].permute(1, 2, 0).numpy()
