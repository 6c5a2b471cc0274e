"""``contrastive-mm vision detect RUN`` and ``segment RUN``: what an encoder is worth where things have places."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn
from tyro.conf import Positional, arg

from contrastive_mm.checkpoint import load_encoder, save_encoder, write_atomically
from contrastive_mm.errors import UserError
from contrastive_mm.report import text_table
from contrastive_mm.training import Precision, Trainer, TrainerConfig
from contrastive_mm.vision.dense.batches import SceneLoader, SceneViews, scene_batches
from contrastive_mm.vision.dense.data import DenseData, read_dense_data
from contrastive_mm.vision.dense.detection import DetectionConfig
from contrastive_mm.vision.dense.pyramid import PyramidBackbone
from contrastive_mm.vision.dense.report import score_rows, transfer_page
from contrastive_mm.vision.dense.segmentation import SegmentationConfig
from contrastive_mm.vision.dense.starts import LABELS, describe_start, folder_name, label, start_encoder
from contrastive_mm.vision.dense.tasks import DenseTask, DetectionTask, SegmentationTask
from contrastive_mm.vision.export.export import SavedEncoder, read_run
from contrastive_mm.vision.few_labels.fine_tune import clear_stages
from contrastive_mm.vision.few_labels.stages import fingerprint, run_stage

MODEL_FILE = "model.safetensors"
SMALLEST_SIDE, LARGEST_SIDE = 16, 512
PICTURES = 6


@dataclass(frozen=True)
class AnnotatedImages:
    """Which annotated images to train and to score on."""

    data: str
    """COCO file (instances_train2017.json) or a folder with one, or a folder in Pascal VOC's layout
    (VOC2012:trainval)."""
    images: Path | None = None
    """Folder of a COCO file's images; by default beside it, in images, or in the folder of its split."""
    test_data: str | None = None
    """What to score on, in the same formats."""
    test_images: Path | None = None
    """As --images, of --test-data."""
    validation_share: float = 0.2
    """Without --test-data: share of the images that is held back to score on, the same ones whatever the seed."""
    image_size: int | None = None
    """Longer side of the images in pixels; by default the largest one's, at least 16 and at most 512."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UserError(f"--validation-share {self.validation_share}; it must lie between 0 and 1.")
        if self.image_size is not None and self.image_size < SMALLEST_SIDE:
            raise UserError(f"--image-size {self.image_size}; it must be at least {SMALLEST_SIDE}.")


@dataclass(frozen=True)
class Training:
    """How often, where and from what it is trained."""

    initialise: tuple[str, ...] = ("run", "random")
    """What the encoder begins with, each a training of its own: the run's weights (run), random ones (random), the
    library's published ones (pretrained), or others of the same architecture: another run's folder, an
    encoder.safetensors, or a classifier.safetensors of fine-tune."""
    seed: int = 0
    """Decides new weights, the order and the mirroring; the same for every initialisation."""
    precision: Precision = "no"
    """As in pretraining."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    output: Path | None = None
    """Folder of the trainings and the report; by default detection or segmentation in the run."""
    overwrite: bool = False
    """Delete what that folder holds and begin anew."""

    def __post_init__(self) -> None:
        if not self.initialise or len({folder_name(start) for start in self.initialise}) < len(self.initialise):
            raise UserError("--initialise needs run, random, pretrained or paths, one or several, each once.")

    def base(self) -> TrainerConfig:
        """As a trainer's options."""
        return TrainerConfig(
            seed=self.seed, precision=self.precision, device=self.device, checkpoint_every=self.checkpoint_every
        )


def detect(
    run: Positional[Path],
    annotated: Annotated[AnnotatedImages, arg(name="")],
    masks: bool = False,
    training: Annotated[Training, arg(name="")] = Training(),
    options: Annotated[DetectionConfig, arg(name="")] = DetectionConfig(),  # noqa: B008 - frozen
) -> None:
    """Train torchvision's Faster R-CNN on a run's encoder, beside the same from random weights; COCO's AP.

    The encoder gets a feature pyramid. Every initialisation has the same settings, order and new layers, and is scored
    after its last step on the images that are held back. A command that was killed goes on where it was when it is
    repeated.

    Args:
        run: folder of the pretrained run.
        annotated: the images.
        masks: train Mask R-CNN and score masks too; needs COCO data.
        training: how.
        options: of the detector.
    """
    print(transfer(run, annotated, DetectionTask(options, masks), training))


def segment(
    run: Positional[Path],
    annotated: Annotated[AnnotatedImages, arg(name="")],
    training: Annotated[Training, arg(name="")] = Training(),
    options: Annotated[SegmentationConfig, arg(name="")] = SegmentationConfig(),  # noqa: B008 - frozen
) -> None:
    """Train a DeepLab or FCN head of torchvision's on a run's encoder, beside the same from random weights; mean IoU.

    The encoder gets a feature pyramid. Every initialisation has the same settings, order and new layers, and is scored
    after its last step on the images that are held back. A command that was killed goes on where it was when it is
    repeated.

    Args:
        run: folder of the pretrained run.
        annotated: the images.
        training: how.
        options: of the segmenter.
    """
    print(transfer(run, annotated, SegmentationTask(options), training))


def transfer(run: Path, annotated: AnnotatedImages, task: DenseTask, training: Training) -> str:
    """Train and score each initialisation, and write the JSON file, the page and the picture.

    Args:
        run: folder of the pretrained run.
        annotated: the images.
        task: what is learned.
        training: how.

    Returns:
        The table of scores, and where the report is.

    Raises:
        UserError: there is no run, the data or options don't fit, or the folder holds other trainings.
    """
    saved = read_run(run)
    task.check_packages()
    train_data, test_data = _read(annotated, task)
    task.check_test_data(test_data)
    size = annotated.image_size or _side(train_data)
    folder = training.output or run / task.name
    trainings = {
        start: DenseTraining(task, _model(saved, start, task, size, train_data, training.seed), size, training.base())
        for start in training.initialise
    }
    earlier = [*LABELS, *(path.name for path in folder.glob("from-*"))]
    clear_stages(folder, earlier, f"{task.name}.json", training.overwrite)
    scores = {start: one.stage(folder / folder_name(start), train_data, test_data) for start, one in trainings.items()}
    result = {
        **{"run": str(run), "encoder": saved.name, "image_size": size, "seed": training.seed},
        "began": {start: describe_start(saved, start) for start in training.initialise},
        **{"data": annotated.data, "test_data": annotated.test_data},
        **{"training_images": len(train_data), "test_images": len(test_data), "classes": train_data.class_names},
        **{"options": dataclasses.asdict(task.config), "scores": scores},
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / f"{task.name}.json", lambda temporary: _write(temporary, text))
    shown = dataclasses.replace(test_data, scenes=test_data.scenes[:PICTURES])
    found = {label(start): one.task.find(one.model, shown, size) for start, one in trainings.items()}
    picture = task.picture(shown, found)
    write_atomically(folder / f"{task.name}.png", lambda temporary: _write_bytes(temporary, picture))
    transfer_page(folder, task, result, picture).save(folder / "report.html")
    return f"{text_table(*score_rows(task, result))}\n\nPictures: {folder / 'report.html'}"


def _side(data: DenseData) -> int:
    largest = max(max(scene.height, scene.width) for scene in data.scenes)
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, largest))


def _read(annotated: AnnotatedImages, task: DenseTask) -> tuple[DenseData, DenseData]:
    data = read_dense_data(annotated.data, task.kind, annotated.images)
    if annotated.test_data is None:
        return data.hold_back(annotated.validation_share)
    return data, read_dense_data(
        annotated.test_data, task.kind, annotated.test_images, data.class_names, "--test-data"
    )


def _model(saved: SavedEncoder, start: str, task: DenseTask, size: int, data: DenseData, seed: int) -> nn.Module:
    """The network with the encoder of one initialisation; its other layers are the same for all."""
    torch.manual_seed(seed)
    encoder, normalisation = start_encoder(saved, start)
    torch.manual_seed(seed)
    config = task.config
    backbone = PyramidBackbone(encoder, size, config.width, config.batch_norm, config.freeze, task.finest)
    return task.build(backbone, len(data.class_names), normalisation)


@dataclass(frozen=True)
class DenseTraining:
    """One network's training, as a stage in a folder of its own.

    Attributes:
        task: what is learned.
        model: trained in place, or loaded where the stage is done.
        size: side of the squares, in pixels.
        base: seed, device, precision, log and checkpoints.
    """

    task: DenseTask
    model: nn.Module
    size: int
    base: TrainerConfig

    def stage(self, folder: Path, train_data: DenseData, test_data: DenseData) -> dict[str, Any]:
        """Train and score, or read the scores where that is done.

        Raises:
            UserError: as ``run_stage``, or there are fewer images than a batch has.
        """
        config = self.task.config
        loader = SceneLoader(train_data, self.size, self.task.kind)
        batches = scene_batches(loader, config.batch_size, self.base.seed)
        settings = {
            "weights": fingerprint(self.model),
            **{"data": data_digest(train_data), "test_data": data_digest(test_data), "image_size": self.size},
            **dataclasses.asdict(config),
            **{"seed": self.base.seed, "precision": self.base.precision},
        }

        def train() -> dict[str, Any]:
            # Sampling of regions and dropout draw from the global stream.
            torch.manual_seed(self.base.seed)
            method, views = self.task.method(self.model), SceneViews(config.flip, self.base.seed)
            trained = Trainer(method, views, batches, config.trainer(self.base), folder).train(resume=True)
            save_encoder(self.model, folder / MODEL_FILE)
            scores = self.task.score(test_data, self.task.find(self.model, test_data, self.size))
            return {**scores, "steps": trained["steps"], "seconds": round(trained["seconds"], 1)}

        scores: dict[str, Any] = run_stage(folder, settings, train)
        load_encoder(self.model, folder / MODEL_FILE)
        return scores


def data_digest(data: DenseData) -> str:
    """A short digest of names, sizes and annotations."""
    digest = hashlib.sha256(repr(data.class_names).encode())
    for scene in data.scenes:
        digest.update(f"{scene.name} {scene.height} {scene.width} {scene.regions!r}".encode())
        digest.update(scene.boxes.numpy().tobytes() + scene.classes.numpy().tobytes() + scene.crowd.numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
