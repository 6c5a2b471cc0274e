"""Detection and segmentation from a SimCLR encoder, a supervised one and random weights, on Fashion-MNIST scenes.

    python benchmarks/dense_transfer.py

Clothes of Fashion-MNIST, 18 to 36 pixels large, lie on coloured noise, 1 to 4 in a scene of 64 x 64 pixels, with boxes
and masks of what is seen of them. An encoder is pretrained by SimCLR on crops of unlabelled scenes, and another as a
classifier of as many single garments, with their labels, on the same ground. Then detectors and segmenters are trained
from the two and from random weights on ``--labelled`` scenes, with the same settings, order and new layers, and scored
on others after the last step. Unlabelled and labelled scenes are made of the two halves of Fashion-MNIST's training
split, test scenes of its test split. Each seed draws scenes, pretrains and trains anew.

The settings were chosen with a seed that is not used here (100), on scenes of the training split's last 10,000 images:
100 labelled scenes and not 50, as a segmenter then finds nearly all classes (IoU above 0.1); its rate as the one of
1e-3 and 2e-3 that is better for random weights; and 24 epochs of SimCLR and not 8: segmenters gained more by them,
detectors less. The FCN head, faster than DeepLab's, and the detector's other settings are older: those were looked at
once on 60 scenes of the test split, too.

``--data`` is a folder with Fashion-MNIST's four IDX files, gzipped or not. The result goes to
``benchmarks/results/dense_transfer.json``, pictures of the first seed beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_simclr import processor
from PIL import Image

from contrastive_mm.checkpoint import save_encoder
from contrastive_mm.cli import main as command
from contrastive_mm.training import TrainerConfig
from contrastive_mm.vision.data.packed import read_idx
from contrastive_mm.vision.dense.detection import DetectionConfig, pack_mask
from contrastive_mm.vision.dense.segmentation import SegmentationConfig
from contrastive_mm.vision.dense.tasks import DetectionTask, SegmentationTask
from contrastive_mm.vision.dense.transfer import AnnotatedImages, Training, transfer
from contrastive_mm.vision.domain import ImageDomain, VisionConfig
from contrastive_mm.vision.few_labels.fine_tuning import FineTuningConfig
from contrastive_mm.vision.few_labels.labelled import draw_labelled
from contrastive_mm.vision.few_labels.stages import load_classifier
from contrastive_mm.vision.few_labels.training import FewLabels

RESULT = Path(__file__).resolve().parent / "results" / "dense_transfer.json"
SUPERVISED = "supervised.safetensors"
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "trainer", "bag", "boot"]
SIDE, CROP = 64, 32
SIZES = (18, 37)
MOST_OBJECTS = 4
LEAST_SEEN = 0.5
"""Share of an object that others leave to be seen, or it isn't put there."""


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    names = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    files = [folder / name if (folder / name).exists() else folder / f"{name}.gz" for name in names]
    return read_idx(files[0]), read_idx(files[1])


def background(generator: np.random.Generator) -> np.ndarray:
    """Coloured noise, coarse and fine."""
    coarse = generator.integers(0, 160, (8, 8, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255)


def lay(image: np.ndarray, size: int, side: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Grey values and mask of a garment of ``size`` pixels, somewhere in a square of ``side``."""
    cloth = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    top, left = (int(value) for value in generator.integers(0, side - size + 1, 2))
    shade = np.zeros((side, side), np.float32)
    shade[top : top + size, left : left + size] = cloth
    return shade, shade > 24


def paint(pixels: np.ndarray, shade: np.ndarray, mask: np.ndarray, generator: np.random.Generator) -> None:
    """A garment in a colour of its own."""
    tint = generator.uniform(0.4, 1.0, 3)
    pixels[mask] = (shade[:, :, None] * tint)[mask]


def draw_scene(
    images: np.ndarray, labels: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Pixels, and the class and mask of each object, cut where another lies over it."""
    pixels, objects = background(generator), []
    for _ in range(int(generator.integers(1, MOST_OBJECTS + 1))):
        row, size = int(generator.integers(len(images))), int(generator.integers(*SIZES))
        shade, mask = lay(images[row], size, SIDE, generator)
        before = [(kind, seen, seen & ~mask) for kind, seen in objects]
        if not mask.any() or any(left_over.sum() < LEAST_SEEN * seen.sum() for _, seen, left_over in before):
            continue
        objects = [(kind, left_over) for kind, _, left_over in before]
        paint(pixels, shade, mask, generator)
        objects.append((int(labels[row]), mask))
    return pixels.astype(np.uint8), objects


def box_of(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]


def write_coco(folder: Path, count: int, images: np.ndarray, labels: np.ndarray, seed: int) -> Path:
    """Scenes as PNGs, and a COCO file."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": categories}
    for image in range(count):
        pixels, objects = draw_scene(images, labels, generator)
        name = f"{image:05d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        content["images"].append({"id": image, "file_name": name, "height": SIDE, "width": SIDE})
        for kind, mask in objects:
            region = pack_mask(mask.astype(np.uint8))
            entry = {"id": len(content["annotations"]) + 1, "image_id": image, "category_id": kind + 1, "iscrowd": 0}
            entry |= {"bbox": box_of(mask), "area": int(mask.sum())}
            entry["segmentation"] = {"size": region["size"], "counts": region["counts"].decode()}
            content["annotations"].append(entry)
    file = folder / "annotations.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def write_crops(folder: Path, count: int, images: np.ndarray, labels: np.ndarray, seed: int) -> Path:
    """Random squares of unlabelled scenes, four of each."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        if number % 4 == 0:
            pixels, _ = draw_scene(images, labels, generator)
        top, left = generator.integers(0, SIDE - CROP + 1, 2)
        Image.fromarray(pixels[top : top + CROP, left : left + CROP]).save(folder / f"{number:05d}.png")
    return folder


def write_objects(folder: Path, count: int, images: np.ndarray, labels: np.ndarray, seed: int) -> Path:
    """Single garments on the same ground, as large as the crops, in a folder for each class."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        row, size = int(generator.integers(len(images))), int(generator.integers(SIZES[0], CROP + 1))
        pixels = background(generator)[:CROP, :CROP].copy()
        paint(pixels, *lay(images[row], size, CROP, generator), generator)
        file = folder / CLASSES[labels[row]] / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


def pretrain_by_labels(options: argparse.Namespace, objects: Path, seed: int) -> dict[str, float]:
    """Train a classifier of single garments, keep its encoder, and tell its held-back accuracy."""
    config = VisionConfig(data=str(objects), encoder=options.encoder, image_size=CROP)
    domain = ImageDomain(config, seed)
    labelled = draw_labelled(domain.labels, domain.train_rows, 1.0, seed)
    settings = FineTuningConfig(epochs=options.supervised_epochs, crop_scale=0.3)
    few = FewLabels(domain, labelled, TrainerConfig(seed=seed, device="cpu"), settings)
    scores = few.from_scratch(options.encoder, Path("classifier"))
    classifier = few.new_classifier(options.encoder)
    load_classifier(classifier, Path("classifier"))
    save_encoder(classifier.encoder, Path(SUPERVISED))
    return scores


def one_seed(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Draw, pretrain, train and score, in a process of its own."""
    torch.set_num_threads(1)
    images, labels = read_split(options.data, "train")
    test_images, test_labels = read_split(options.data, "t10k")
    half = len(images) // 2
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that paths, which are shown, are short
    crops = write_crops(Path("crops"), options.crops, images[:half], labels[:half], 3 * seed)
    objects = write_objects(Path("objects"), options.crops, images[:half], labels[:half], 3 * seed)
    file = write_coco(Path("labelled"), options.labelled, images[half:], labels[half:], 3 * seed + 1)
    test = write_coco(Path("test"), options.test, test_images, test_labels, 3 * seed + 2)
    run = Path("run")
    flags = [f"--encoder={options.encoder}", f"--epochs={options.epochs}", f"--seed={seed}", f"--image-size={CROP}"]
    began = time.perf_counter()
    if command(["vision", f"--data={crops}", f"--output={run}", "--temperature=0.2", "--device=cpu", *flags]) != 0:
        raise SystemExit(1)
    result: dict[str, Any] = {"pretraining_seconds": round(time.perf_counter() - began)}
    result["classifier"] = pretrain_by_labels(options, objects, seed)
    annotated = AnnotatedImages(str(file), test_data=str(test))
    training = Training(("run", "random", SUPERVISED), seed=seed, device="cpu")
    for task in (DetectionTask(detection_config(options)), SegmentationTask(segmentation_config(options))):
        print(transfer(run, annotated, task, training), flush=True)
        scores = json.loads((run / task.name / f"{task.name}.json").read_text(encoding="utf-8"))["scores"]
        result[task.name] = {Path(start).stem: found for start, found in scores.items()}
        if seed == 0:
            shutil.copy(run / task.name / f"{task.name}.png", RESULT.with_name(f"dense_transfer_{task.name}.png"))
    return result


def detection_config(options: argparse.Namespace) -> DetectionConfig:
    return DetectionConfig(
        steps=options.detection_steps,
        width=options.detection_width,
        learning_rate=options.detection_learning_rate,
        proposals=200,
        regions=64,
    )


def segmentation_config(options: argparse.Namespace) -> SegmentationConfig:
    return SegmentationConfig(
        steps=options.segmentation_steps,
        width=options.segmentation_width,
        learning_rate=options.segmentation_learning_rate,
        head="fcn",
    )


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and each seed's score, by score and initialisation; and the gains over random weights."""
    found: dict[str, Any] = {}
    for task, names in (("detection", ("AP50", "AP", "AP75")), ("segmentation", ("mIoU",))):
        for name in names:
            values = {start: [seed[task][start][name] for seed in seeds] for start in seeds[0][task]}
            for start in ("run", "supervised"):
                pairs = zip(values[start], values["random"], strict=True)
                values[f"gain of {start}"] = [score - random for score, random in pairs]
            found[name] = {
                start: {
                    "mean": round(statistics.mean(scores), 4),
                    "deviation": round(statistics.stdev(scores), 4),
                    "seeds": [round(score, 4) for score in scores],
                }
                for start, scores in values.items()
            }
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--encoder", default="small-conv-16")
    parser.add_argument("--crops", type=int, default=8000, help="to pretrain on")
    parser.add_argument("--epochs", type=int, default=24, help="of the pretraining")
    parser.add_argument("--supervised-epochs", type=int, default=16, help="of the classifier's training")
    parser.add_argument("--labelled", type=int, default=100, help="scenes to train detectors and segmenters on")
    parser.add_argument("--test", type=int, default=200, help="scenes to score on")
    parser.add_argument("--detection-width", type=int, default=32)
    parser.add_argument("--detection-learning-rate", type=float, default=2e-3)
    parser.add_argument("--detection-steps", type=int, default=300)
    parser.add_argument("--segmentation-width", type=int, default=128)
    parser.add_argument("--segmentation-learning-rate", type=float, default=2e-3)
    parser.add_argument("--segmentation-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, each on one thread")
    parser.add_argument("--output", type=Path, help="folder of the runs; by default one that is thrown away")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("a deviation needs at least 2 --seeds")
    return options


def main() -> None:
    options = parse()
    options.data = options.data.resolve()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as throwaway:
        output = (options.output or Path(throwaway)).resolve()
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            numbers = range(options.seeds)
            waiting = [pool.submit(one_seed, options, output / f"seed-{seed}", seed) for seed in numbers]
            seeds = [one.result() for one in waiting]
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
    result = {
        "command": "python benchmarks/dense_transfer.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "threads": 1, "torch": torch.__version__},
        "settings": settings,
        "summary": summary(seeds),
        "seeds": seeds,
        "seconds": round(time.perf_counter() - began),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
