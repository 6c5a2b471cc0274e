import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import coco_scenes, write_json

from contrastive_mm.checkpoint import load_encoder, save_encoder
from contrastive_mm.cli import main
from contrastive_mm.errors import UserError
from contrastive_mm.metrics import read_metrics
from contrastive_mm.training import Trainer, TrainerConfig
from contrastive_mm.vision.dense import data as dense_data
from contrastive_mm.vision.dense.batches import SceneLoader, SceneViews, scene_batches
from contrastive_mm.vision.dense.data import DenseData, Scene, read_dense_data
from contrastive_mm.vision.dense.detection import (
    Detection,
    DetectionConfig,
    Found,
    average_precision,
    build_detector,
    detect_objects,
    pack_mask,
)
from contrastive_mm.vision.dense.pictures import detection_picture
from contrastive_mm.vision.dense.pyramid import PyramidBackbone
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.export.export import read_run
from contrastive_mm.vision.few_labels.classifiers import Classifier

# pycocotools 2.0.11 and NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL = {"width": 16, "proposals": 60, "regions": 32, "batch_size": 4}


def scene(boxes, classes, crowd=None, size=100):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    groups = torch.tensor(crowd if crowd is not None else [False] * len(boxes), dtype=torch.bool)
    return Scene(Path("none"), "none", size, size, boxes, torch.tensor(classes, dtype=torch.int64), groups)


def found(boxes, classes, scores):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Found(boxes, torch.tensor(scores, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64))


def overlap(a, b):
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, across) * max(0.0, down)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def loop_precision(truth, guesses, threshold):
    """AP of one class: (image, box) each of the truth, (image, box, score) each of the guesses."""
    taken = set()
    hits = []
    for image, box, _ in sorted(guesses, key=lambda guess: -guess[2]):
        best, place = threshold, None
        for number, (other, wanted) in enumerate(truth):
            if other == image and number not in taken and overlap(box, wanted) >= best:
                best, place = overlap(box, wanted), number
        taken.add(place)
        hits.append(place is not None)
    precisions = []
    for point in range(101):
        reached = [
            sum(hits[: n + 1]) / (n + 1) for n in range(len(hits)) if sum(hits[: n + 1]) / len(truth) >= point / 100
        ]
        precisions.append(max(reached, default=0.0))
    return sum(precisions) / 101


def test_average_precision_is_that_of_a_loop():
    generator = np.random.default_rng(0)
    scenes, guesses = [], []
    for _ in range(12):
        corners = generator.integers(0, 60, (int(generator.integers(1, 6)), 2))
        boxes = np.concatenate([corners, corners + generator.integers(10, 40, corners.shape)], axis=1)
        classes = generator.integers(1, 3, len(boxes))
        scenes.append(scene(boxes.tolist(), classes.tolist()))
        moved = np.concatenate([boxes + generator.integers(-4, 5, boxes.shape), boxes[:1], boxes[::2] + 30])
        kinds = np.concatenate([classes, classes[:1], classes[::2]])
        guesses.append(found(moved.tolist(), kinds.tolist(), generator.permutation(100)[: len(moved)] / 100))
    scores = average_precision(DenseData("planted", ["a", "b"], scenes), guesses)
    expected = np.zeros((2, 10))
    for kind in (1, 2):
        truth = [
            (i, b) for i, s in enumerate(scenes) for b, k in zip(s.boxes.tolist(), s.classes, strict=True) if k == kind
        ]
        offered = [
            (i, box, float(score))
            for i, g in enumerate(guesses)
            for box, score, k in zip(g.boxes.tolist(), g.scores, g.classes, strict=True)
            if k == kind
        ]
        # Scores tie between images: both keep the order in which the images came.
        expected[kind - 1] = [loop_precision(truth, offered, 0.5 + 0.05 * step) for step in range(10)]
    assert 0.1 < expected.mean() < 0.9, "a planted set that tells something"
    assert scores["AP"] == pytest.approx(expected.mean(), abs=1e-6)
    assert scores["AP50"] == pytest.approx(expected[:, 0].mean(), abs=1e-6)
    assert scores["AP75"] == pytest.approx(expected[:, 5].mean(), abs=1e-6)
    assert list(scores["AP_by_class"].values()) == pytest.approx(expected.mean(axis=1).tolist(), abs=1e-6)


BOXES = [[10, 10, 30, 30], [50, 50, 90, 90]]


def precision(guess, truth=None, names=("a",)):
    return average_precision(DenseData("planted", list(names), [truth or scene(BOXES, [1, 1])]), [guess])


def test_a_perfect_detector_scores_one_and_a_silent_one_nothing():
    assert precision(found(BOXES, [1, 1], [0.9, 0.2]))["AP"] == pytest.approx(1.0)
    assert precision(found([], [], []))["AP"] == 0.0


def test_boxes_that_are_off_count_at_the_overlaps_that_they_reach():
    shifted = [[14, 10, 34, 30], [58, 50, 98, 90]]  # both overlap by 2/3
    scores = precision(found(shifted, [1, 1], [0.9, 0.8]))
    assert (scores["AP50"], scores["AP75"], scores["AP"]) == pytest.approx((1.0, 0.0, 0.4))


def test_a_second_box_on_the_same_object_is_punished_and_the_order_of_scores_counts():
    doubled = [BOXES[0], BOXES[0], BOXES[1]]
    # Hits at ranks 1 and 3: precision 1 up to recall 1/2 (51 points), then 2/3.
    assert precision(found(doubled, [1, 1, 1], [0.9, 0.8, 0.7]))["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert precision(found(doubled, [1, 1, 1], [0.9, 0.1, 0.7]))["AP"] == pytest.approx(1.0)


def test_crowds_are_neither_asked_for_nor_punished_and_wrong_classes_are():
    truth = scene(BOXES, [1, 1], [False, True])
    assert precision(found(BOXES[:1], [1], [0.5]), truth)["AP"] == pytest.approx(1.0)
    assert precision(found(BOXES, [1, 1], [0.5, 0.9]), truth)["AP"] == pytest.approx(1.0)
    scores = precision(found(BOXES, [2, 1], [0.5, 0.9]), names=("a", "b", "c"))
    assert scores["AP_by_class"]["a"] == pytest.approx(51 / 101)
    assert scores["AP_by_class"]["c"] is None, "a class without objects has no precision"
    with pytest.raises(UserError, match="no object to find"):
        precision(found(BOXES, [1, 1], [0.5, 0.9]), scene(BOXES, [1, 1], [True, True]))


def test_masks_are_compared_as_masks(tmp_path):
    data = read_dense_data(str(coco_scenes(tmp_path, 3)), "masks")
    truth = [Found(s.boxes, s.classes / 10, s.classes, s.regions) for s in data.scenes]
    assert average_precision(data, truth, masks=True)["AP"] == pytest.approx(1.0)
    nothing = pack_mask(np.zeros((48, 48), np.uint8))
    empty = [Found(f.boxes, f.scores, f.classes, (nothing,) * len(f.boxes)) for f in truth]
    assert average_precision(data, empty, masks=True)["AP"] == 0.0
    assert average_precision(data, empty)["AP"] == pytest.approx(1.0), "the boxes are right"


@pytest.mark.parametrize(
    ("name", "small_stem", "size", "strides"),
    [
        ("small-conv-8", True, 64, [2, 4]),
        ("small-conv-8", True, 96, [2, 4, 8]),
        ("resnet18", True, 64, [2, 4, 8]),
        ("resnet18", True, 700, [4, 8, 16, 32, 64]),
        ("resnet18", False, 224, [4, 8, 16, 32]),
        ("resnet18", False, 800, [4, 8, 16, 32, 64]),
        ("vit_b_16", True, 64, [16]),
    ],
)
def test_levels_and_anchors_fit_the_encoder_and_the_images(name, small_stem, size, strides):
    encoder = build_image_encoder(name, size if name.startswith("vit") else 64, small_stem=small_stem)
    backbone = PyramidBackbone(encoder, size, width=8)
    assert backbone.strides == strides
    anchors = backbone.anchors()
    largest = max(max(sizes) for sizes in anchors.sizes)
    assert size / 4 <= largest <= 2 * size, "objects as large as the image can be matched"
    if size > 300:
        return
    levels = backbone(torch.rand(2, 3, size, size))
    assert [tuple(level.shape) for level in levels.values()] == [(2, 8, size // s, size // s) for s in strides]
    detector = build_detector(backbone, 2, config=DetectionConfig(**SMALL)).eval()
    assert len(detector(list(torch.rand(2, 3, size, size)))) == 2


def test_an_encoder_that_refuses_the_size_is_named():
    with pytest.raises(UserError, match="can't take images of 70 px"):
        PyramidBackbone(build_image_encoder("timm/vit_tiny_patch16_224", 64), 70)


def test_the_encoder_sees_whole_squares_normalised_as_in_its_pretraining():
    encoder = build_image_encoder("small-conv-4", 32)
    detector = build_detector(PyramidBackbone(encoder, 50, 8), 1, normalisation="imagenet").eval()
    seen = []
    encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(3, 50, 50)
    detector([image])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0][0], (image - mean[:, None, None]) / deviation[:, None, None], atol=1e-6)


def test_boxes_and_masks_come_back_in_pixels_of_the_image(tmp_path):
    """A stand-in for a detector, which sees the bright square in its own square of pixels."""
    Image.fromarray(np.zeros((30, 60, 3), np.uint8)).save(tmp_path / "one.png")
    wide = Scene(tmp_path / "one.png", "one", 30, 60, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())

    class Square(torch.nn.Linear):
        def forward(self, images):
            assert images[0].shape == (3, 40, 40)
            mask = torch.zeros(1, 1, 40, 40)
            mask[..., 4:12, 8:20] = 1
            box, one = torch.tensor([[8.0, 4, 20, 12]]), torch.ones(1)
            return [{"boxes": box, "labels": one.long(), "scores": one, "masks": mask}]

    (objects,) = detect_objects(Square(1, 1), DenseData("one", ["a"], [wide]), 40)
    assert objects.boxes.tolist() == [[12, 6, 30, 18]]
    rows, columns = np.nonzero(dense_data.mask_tools().decode(objects.masks[0]))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 17, 12, 29)


@pytest.mark.parametrize(("batch_norm", "freeze"), [("trained", False), ("frozen", False), ("trained", True)])
def test_the_encoder_learns_as_far_as_it_is_let(tmp_path, batch_norm, freeze):
    data = read_dense_data(str(coco_scenes(tmp_path / "data", 4)), "boxes")
    encoder = build_image_encoder("small-conv-2", 32)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    config = DetectionConfig(steps=2, **{**SMALL, "batch_size": 2}, batch_norm=batch_norm, freeze=freeze)
    backbone = PyramidBackbone(encoder, 48, config.width, config.batch_norm, config.freeze)
    method = Detection(build_detector(backbone, 2, config=config), config)
    trainer = config.trainer(TrainerConfig())
    Trainer(method, SceneViews(), scene_batches(SceneLoader(data, 48, "boxes"), 2, 0), trainer, tmp_path).train()
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value.cpu(), before[name])}
    assert ("layers.0.0.weight" in moved) == (not freeze), "convolution"
    for part in ("weight", "running_mean"):
        assert (f"layers.0.1.{part}" in moved) == (batch_norm == "trained" and not freeze), "BatchNorm"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short SimCLR run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--data=digits", "--image-size=16", "--encoder=small-conv-4", "--steps=2", "--batch-size=16"]
    assert main(["vision", f"--output={folder}", *flags]) == 0
    return folder


def options(data, **changed):
    flags = {"image-size": 48, "steps": 4, "checkpoint-every": 2, "device": "cpu", **changed}
    flags |= {name.replace("_", "-"): value for name, value in SMALL.items()}
    return [f"--data={data}", *(f"--{name}={value}" for name, value in flags.items())]


def test_the_command_trains_from_the_run_and_from_random_weights_and_draws_both(run, tmp_path, capsys):
    data = coco_scenes(tmp_path / "data", 10)
    folder = tmp_path / "out"
    assert main(["vision", "detect", str(run), f"--output={folder}", "--masks", *options(data)]) == 0
    assert "from random weights" in capsys.readouterr().out
    result = json.loads((folder / "detection.json").read_text())
    assert list(result["scores"]) == ["run", "random"]
    assert {"AP", "AP50", "AP75", "mask_AP50", "AP_by_class"} <= set(result["scores"]["run"])
    assert (result["training_images"], result["test_images"]) == (8, 2)
    assert result["began"]["run"] == "simclr for 2 steps on digits, which began from random weights"
    page = (folder / "report.html").read_text()
    assert "from the run" in page
    with Image.open(folder / "detection.png") as picture:
        assert picture.width > 600
    for start in ("run", "random"):
        assert [line["step"] for line in read_metrics(folder / start / "metrics.jsonl")] == [1, 4]
        assert "loss_mask" in read_metrics(folder / start / "metrics.jsonl")[0]
    # Done already: read, not trained again, and other settings are refused.
    assert main(["vision", "detect", str(run), f"--output={folder}", "--masks", *options(data)]) == 0
    assert main(["vision", "detect", str(run), f"--output={folder}", "--masks", *options(data, seed=1)]) == 2
    assert "begun with other settings" in capsys.readouterr().err


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    data = coco_scenes(tmp_path / "data", 10)
    flags = ["--initialise", "run", *options(data)]
    assert main(["vision", "detect", str(run), f"--output={tmp_path / 'whole'}", *flags]) == 0
    save = Trainer._save

    def killed(trainer, metrics):
        save(trainer, metrics)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", killed)
        assert main(["vision", "detect", str(run), f"--output={tmp_path / 'cut'}", *flags]) == 130
    assert main(["vision", "detect", str(run), f"--output={tmp_path / 'cut'}", *flags]) == 0
    whole, cut = ((tmp_path / name / "run" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_the_runs_weights_are_in_the_detector_before_its_first_step(run, tmp_path, monkeypatch):
    data = coco_scenes(tmp_path / "data", 10)
    saved = read_run(run).encoder.state_dict()
    same, heads = {}, []

    def look(trainer, resume):
        weights = trainer.method.detector.backbone.encoder.state_dict()
        same[trainer.output.name] = all(torch.equal(value.cpu(), saved[name]) for name, value in weights.items())
        heads.append(trainer.method.detector.roi_heads.box_head.fc6.weight.clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", look)
    for start in ("run", "random"):
        flags = ["--initialise", start, *options(data)]
        assert main(["vision", "detect", str(run), f"--output={tmp_path / start}", *flags]) == 130
    assert same == {"run": True, "random": False}
    assert torch.equal(*heads), "what is new is the same for both"


def test_other_runs_encoders_and_classifiers_are_begun_from(run, tmp_path, capsys, monkeypatch):
    """Weights that are known before: a run's folder, its encoder's file, and a classifier around the same encoder."""
    data = coco_scenes(tmp_path / "data", 10)
    other = tmp_path / "other"
    flags = ["--data=digits", "--image-size=16", "--encoder=small-conv-4", "--steps=1", "--batch-size=16"]
    assert main(["vision", f"--output={other}", "--seed=5", *flags]) == 0
    wanted = read_run(other).encoder.state_dict()
    save_encoder(Classifier(read_run(other).encoder, 3), tmp_path / "classifier.safetensors")
    starts = [other, other / "encoder.safetensors", tmp_path / "classifier.safetensors"]
    began = {}

    def look(trainer, resume):
        weights = trainer.method.detector.backbone.encoder.state_dict()
        began[trainer.output.name] = all(torch.equal(value.cpu(), wanted[name]) for name, value in weights.items())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", look)
        for start in ["run", *starts]:
            command = ["vision", "detect", str(run), f"--output={tmp_path / 'seen'}", f"--initialise={start}"]
            assert main([*command, *options(data)]) == 130
    assert began.pop("run") is False
    assert len(began) == 3
    assert all(began.values())
    # Two of them in one command: each has its own folder, rows and picture.
    folder = tmp_path / "out"
    command = ["vision", "detect", str(run), f"--output={folder}", "--initialise", "run", str(other)]
    assert main([*command, *options(data)]) == 0
    assert f"from {other}" in capsys.readouterr().out
    result = json.loads((folder / "detection.json").read_text())
    assert list(result["scores"]) == ["run", str(other)]
    assert result["began"][str(other)] == "simclr for 1 steps on digits, which began from random weights"
    (made,) = folder.glob("from-*")
    (made / "stale").touch()
    assert main([*command, *options(data), "--overwrite"]) == 0
    assert not (made / "stale").exists()


def test_weights_that_do_not_fit_are_refused_and_nothing_is_deleted(run, tmp_path, capsys):
    data = coco_scenes(tmp_path / "data", 10)
    other, folder = tmp_path / "other", tmp_path / "out"
    flags = ["--data=digits", "--image-size=16", "--encoder=small-conv-2", "--steps=1", "--batch-size=16"]
    assert main(["vision", f"--output={other}", *flags]) == 0
    (tmp_path / "text.safetensors").write_text("no weights")
    (folder / "random").mkdir(parents=True)
    messages = {
        other: "its encoder is small-conv-2 with the small-image stem, the run's is small-conv-4 with",
        other / "encoder.safetensors": "encoder.safetensors belongs to another architecture: layers.0.0.weight has",
        tmp_path / "text.safetensors": "text.safetensors can't be read as safetensors",
        tmp_path / "supervised": "supervised is none of run, random, pretrained, and there is no such file",
        tmp_path: f"{tmp_path} holds no run",
    }
    for start, message in messages.items():
        command = ["vision", "detect", str(run), f"--output={folder}", f"--initialise={start}", "--overwrite"]
        assert main([*command, *options(data)]) == 2
        assert message in capsys.readouterr().err
    assert (folder / "random").is_dir()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch-size=1", "--batch-size 1; it must be at least 2"),
        ("--flip=2", "--flip 2.0"),
        ("--validation-share=0", "--validation-share 0.0"),
        ("--image-size=4", "--image-size 4"),
        ("--width=2", "--width 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, tmp_path, capsys, flag, message):
    assert main(["vision", "detect", str(run), f"--data={tmp_path}", flag]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_scored_or_begun_is_refused_before_anything_is_trained(run, tmp_path, capsys):
    data = coco_scenes(tmp_path / "data", 10)
    empty = json.loads(data.read_text())
    empty["annotations"] = []
    without = write_json(tmp_path / "data" / "without.json", empty)
    command = ["vision", "detect", str(run), *options(data), f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--test-data={without}"]) == 2
    assert "without.json: its 10 images to score on hold no object" in capsys.readouterr().err
    assert main([*command, "--initialise", "pretrained"]) == 2
    assert "no pretrained weights of 'small-conv-4'" in capsys.readouterr().err
    assert main([*command, "--initialise", "run", "run"]) == 2
    assert "each once" in capsys.readouterr().err
    assert main([*command, "--batch-size=9"]) == 2
    assert "--batch-size" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run" / "metrics.jsonl").exists()


def test_half_precision_trains(run, tmp_path):
    data = coco_scenes(tmp_path / "data", 10)
    flags = ["--initialise", "run", f"--output={tmp_path / 'out'}", "--precision=bf16", "--masks", *options(data)]
    assert main(["vision", "detect", str(run), *flags]) == 0


def test_without_pycocotools_the_package_to_install_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    assert main(["vision", "detect", str(run), f"--data={tmp_path}"]) == 2
    assert dense_data.DETECTION_MISSING in capsys.readouterr().err


def test_a_short_training_on_shapes_learns_to_find_them(tmp_path):
    data = read_dense_data(str(coco_scenes(tmp_path / "data", 96)), "boxes")
    train, test = data.hold_back(0.25)
    config = DetectionConfig(steps=120, learning_rate=3e-3, **{**SMALL, "batch_size": 8})
    backbone = PyramidBackbone(build_image_encoder("small-conv-8", 48), 48, config.width)
    detector = build_detector(backbone, 2, config=config)
    untrained = average_precision(test, detect_objects(detector, test, 48))["AP50"]
    batches = scene_batches(SceneLoader(train, 48, "boxes"), 8, 0)
    Trainer(Detection(detector, config), SceneViews(), batches, config.trainer(TrainerConfig()), tmp_path).train()
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2
    guesses = detect_objects(detector, test, 48)
    assert untrained < 0.1
    assert average_precision(test, guesses)["AP50"] > 0.6
    assert detection_picture(test, {"detector": guesses}).startswith(b"\x89PNG")
    saved = build_image_encoder("small-conv-8", 48)
    load_encoder(saved, tmp_path / "encoder.safetensors")
    assert torch.equal(saved.layers[0][0].weight, backbone.encoder.layers[0][0].weight.cpu()), "what is kept"
