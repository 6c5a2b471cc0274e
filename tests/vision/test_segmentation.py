import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import coco_scenes, voc_scene

from contrastive_mm.cli import main
from contrastive_mm.errors import UserError
from contrastive_mm.metrics import read_metrics
from contrastive_mm.training import Trainer, TrainerConfig
from contrastive_mm.views import Views
from contrastive_mm.vision.dense.batches import SceneLoader, SceneViews, scene_batches
from contrastive_mm.vision.dense.data import VOID, DenseData, Scene, read_class_map, read_dense_data
from contrastive_mm.vision.dense.pyramid import PyramidBackbone
from contrastive_mm.vision.dense.segmentation import (
    Segmentation,
    SegmentationConfig,
    Segmenter,
    mean_overlap,
    segment_scenes,
)
from contrastive_mm.vision.dense.tasks import SegmentationTask
from contrastive_mm.vision.encoders.build import build_image_encoder

# pycocotools 2.0.11 and NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def planted(folder, maps, names):
    scenes = []
    for number, classes in enumerate(maps):
        file = folder / f"{number}.png"
        Image.fromarray(classes).save(file)
        nothing = torch.zeros(0, dtype=torch.int64)
        scenes.append(
            Scene(Path("none"), str(number), *classes.shape, torch.zeros(0, 4), nothing, nothing.bool(), (), file)
        )
    return DenseData("planted", names, scenes)


def test_the_mean_overlap_is_that_of_a_loop_and_void_pixels_do_not_count(tmp_path):
    generator = np.random.default_rng(0)
    maps = [generator.choice([0, 1, 2, VOID], (5, 7)).astype(np.uint8) for _ in range(3)]
    guesses = [np.where(generator.random((5, 7)) < 0.6, truth % 3, 1).astype(np.uint8) for truth in maps]
    pairs = [
        (int(t), int(g))
        for truth, guess in zip(maps, guesses, strict=True)
        for t, g in zip(truth.flatten(), guess.flatten(), strict=True)
        if t != VOID
    ]
    overlaps = []
    for kind in range(3):
        both = sum(t == kind and g == kind for t, g in pairs)
        either = sum(t == kind or g == kind for t, g in pairs)
        overlaps.append(both / either)
    scores = mean_overlap(planted(tmp_path, maps, ["a", "b", "c"]), guesses)
    assert scores["mIoU"] == pytest.approx(sum(overlaps) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
    assert list(scores["IoU_by_class"].values()) == [*map(pytest.approx, overlaps), None], "no pixel of c, nor a guess"


def test_a_perfect_guess_scores_one_and_no_pixel_is_an_error(tmp_path):
    classes = np.array([[0, 1], [2, VOID]], np.uint8)
    data = planted(tmp_path, [classes], ["a", "b"])
    assert mean_overlap(data, [np.where(classes == VOID, 0, classes)])["mIoU"] == 1.0
    with pytest.raises(UserError, match="no pixel"):
        mean_overlap(planted(tmp_path, [classes * 0 + VOID], ["a"]), [classes * 0])


@pytest.mark.parametrize("head", ["fcn", "deeplab"])
@pytest.mark.parametrize(
    ("name", "small_stem", "level"),
    [("small-conv-4", True, {"fcn": 4, "deeplab": 4}), ("resnet18", False, {"fcn": 4, "deeplab": 8})],
)
def test_logits_are_of_every_pixel_and_heads_sit_at_their_stride(head, name, small_stem, level):
    encoder = build_image_encoder(name, 64, small_stem=small_stem)
    finest = SegmentationTask(SegmentationConfig(head=head)).finest
    whole, own = (Segmenter(PyramidBackbone(encoder, 64, 8, finest=stride), 3, head) for stride in (None, finest))
    for segmenter in (whole, own):
        assert segmenter.backbone.strides[int(segmenter.level)] == level[head]
        assert segmenter(torch.rand(2, 3, 64, 64)).shape == (2, 4, 64, 64)
    assert own.level == "0", "no level finer than the head's is computed"
    own.load_state_dict({name: (whole.state_dict() | _moved(whole, own))[name] for name in own.state_dict()})
    image = torch.rand(2, 3, 64, 64)
    assert torch.allclose(own.eval()(image), whole.eval()(image), atol=1e-6)


def _moved(whole, own):
    """The pyramid's layers of ``whole``, under the names that they have in ``own``, which has fewer."""
    gone, weights = int(whole.level), whole.backbone.pyramid.state_dict()
    renamed = {}
    for name in own.backbone.pyramid.state_dict():
        blocks, number, rest = name.split(".", 2)
        renamed[f"backbone.pyramid.{name}"] = weights[f"{blocks}.{int(number) + gone}.{rest}"]
    return renamed


def test_images_are_brought_to_what_the_encoder_was_trained_to_see():
    encoder = build_image_encoder("small-conv-4", 32)
    segmenter = Segmenter(PyramidBackbone(encoder, 32, width=8), 1, "fcn", "imagenet").eval()
    seen = []
    encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 32, 32)
    segmenter(image)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[0], (image - mean[:, None, None]) / deviation[:, None, None])


def test_void_pixels_give_no_gradient_and_a_batch_of_nothing_else_no_nan():
    encoder = build_image_encoder("small-conv-4", 32)
    method = Segmentation(Segmenter(PyramidBackbone(encoder, 32, width=8), 2, "fcn")).eval()
    image, classes = torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32)).byte()

    def loss(classes):
        return method(Views(({"image": image, "class_map": classes},), num_global=1)).loss

    half = classes.clone()
    half[:, :16] = VOID
    logits = torch.log_softmax(method.segmenter(image), dim=1)[:, :, 16:]
    chosen = logits.gather(1, classes[:, None, 16:].long())
    assert torch.allclose(loss(half), -chosen.mean(), atol=1e-6)
    assert loss(torch.full_like(classes, VOID)).item() == 0.0


def test_guesses_come_back_at_each_images_own_size(tmp_path):
    file = coco_scenes(tmp_path, 2, height=30, width=60)
    data = read_dense_data(str(file), "classes")
    segmenter = Segmenter(PyramidBackbone(build_image_encoder("small-conv-4", 32), 32, width=8), 2, "fcn")
    assert [guess.shape for guess in segment_scenes(segmenter, data)] == [(30, 60)] * 2


def test_a_short_training_on_shapes_learns_to_tell_them_apart(tmp_path):
    data = read_dense_data(str(coco_scenes(tmp_path / "data", 48)), "classes")
    train, test = data.hold_back(0.25)
    config = SegmentationConfig(steps=50, learning_rate=3e-3, width=16)
    segmenter = Segmenter(PyramidBackbone(build_image_encoder("small-conv-8", 48), 48, config.width), 2, "deeplab")
    untrained = mean_overlap(test, segment_scenes(segmenter, test))["mIoU"]
    batches = scene_batches(SceneLoader(train, 48, "classes"), 8, 0)
    method = Segmentation(segmenter, config)
    Trainer(method, SceneViews(), batches, config.trainer(TrainerConfig()), tmp_path / "run").train()
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 3
    assert untrained < 0.4
    assert mean_overlap(test, segment_scenes(segmenter, test))["mIoU"] > 0.6


def test_the_command_works_on_vocs_layout(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--data=digits", "--image-size=16", "--encoder=small-conv-4", "--steps=2", "--batch-size=16"]
    assert main(["vision", f"--output={run}", *flags]) == 0
    for number in range(6):
        classes = np.zeros((16, 20), np.uint8)
        classes[:, number : number + 8] = 1 + number % 2
        voc_scene(tmp_path / "voc", str(number), class_map=classes)
    (tmp_path / "voc" / "classes.txt").write_text("cat\ndog\n")
    small = ["--image-size=32", "--steps=2", "--width=8", "--batch-size=2", "--device=cpu", "--validation-share=0.5"]
    assert main(["vision", "segment", str(run), f"--data={tmp_path / 'voc'}", *small]) == 0
    assert "mIoU" in capsys.readouterr().out
    result = json.loads((run / "segmentation" / "segmentation.json").read_text())
    assert set(result["scores"]["random"]["IoU_by_class"]) == {"background", "cat", "dog"}
    assert (run / "segmentation" / "report.html").is_file()


def test_class_maps_are_painted_from_masks_at_their_own_size(tmp_path):
    data = read_dense_data(str(coco_scenes(tmp_path, 3)), "classes")
    for scene in data.scenes:
        classes = read_class_map(scene, 2)
        for box, kind in zip(scene.boxes.int().tolist(), scene.classes.tolist(), strict=True):
            assert classes[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2] == kind
