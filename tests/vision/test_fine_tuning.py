import json
import math

import pytest
import torch
from torch import nn

from contrastive_mm.checkpoint import CheckpointFolder
from contrastive_mm.cli import main
from contrastive_mm.errors import UserError
from contrastive_mm.runs import open_run
from contrastive_mm.training import TrainerConfig
from contrastive_mm.vision.domain import ImageDomain, VisionConfig
from contrastive_mm.vision.few_labels import training as few_labels
from contrastive_mm.vision.few_labels.distillation import DistillationConfig
from contrastive_mm.vision.few_labels.fine_tune import pretrained_classifier
from contrastive_mm.vision.few_labels.fine_tuning import FineTuningConfig, LightViews
from contrastive_mm.vision.few_labels.labelled import (
    UNLABELLED,
    draw_labelled,
    labelled_batches,
    partly_labelled_batches,
)
from contrastive_mm.vision.few_labels.stages import run_stage
from contrastive_mm.vision.few_labels.training import FewLabels

SHORT = FineTuningConfig(epochs=6, batch_size=8)


@pytest.fixture(scope="module")
def domain():
    return digits()


def digits():
    return ImageDomain(VisionConfig(data="digits", image_size=8, validation_share=0.5), 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short SimCLR v2 run, whose three-layer head has a first layer to keep."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--data=digits", "--image-size=8", "--encoder=small-conv-2", "--steps=3", "--batch-size=32"]
    assert main(["vision", "--method=simclr-v2", "--hidden-dim=12", f"--output={folder}", *flags]) == 0
    return folder


def few(domain, labelled=None, options=SHORT, **base):
    labelled = labelled or draw_labelled(domain.labels, domain.train_rows, 0.02, 0, 10)
    return FewLabels(domain, labelled, TrainerConfig(checkpoint_every=4, **base), options)


def test_without_images_to_score_on_nothing_is_trained(tmp_path, capsys):
    flags = ["--data=digits", "--image-size=8", "--encoder=small-conv-2", "--steps=1", "--validation-share=0"]
    assert main(["vision", f"--output={tmp_path / 'run'}", *flags]) == 0
    assert main(["vision", "fine-tune", str(tmp_path / "run"), "--epochs=1"]) == 2
    assert "No labelled image is held back" in capsys.readouterr().err
    assert not (tmp_path / "run" / "fine-tuning").exists()


def test_drawn_labels_are_a_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3)[torch.randperm(143)]
    rows = torch.arange(143)
    drawn = draw_labelled(labels, rows, 0.1, seed=0)
    assert drawn.labels.bincount().tolist() == [10, 4, 1], "every class keeps one"
    assert torch.equal(drawn.labels, labels[drawn.rows])
    assert len(drawn.rows.unique()) == len(drawn.rows)


def test_draws_are_paired_by_seed_and_the_smaller_share_is_part_of_the_larger(domain):
    shares = [draw_labelled(domain.labels, domain.train_rows, share, 3).rows.tolist() for share in (0.05, 0.05, 0.2)]
    assert shares[0] == shares[1]
    assert set(shares[0]) < set(shares[2]) < set(domain.train_rows.tolist())
    assert draw_labelled(domain.labels, domain.train_rows, 0.05, 4).rows.tolist() != shares[0]
    everything = draw_labelled(domain.labels, domain.train_rows, 1.0, 3)
    assert torch.equal(everything.rows, domain.train_rows)


def test_images_without_a_label_are_not_drawn():
    labels = torch.tensor([0, -1, 1, -1, 0, 1])
    assert draw_labelled(labels, torch.arange(6), 1.0, 0).rows.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan])
def test_a_share_outside_0_to_1_is_refused(domain, share):
    with pytest.raises(UserError, match="--labels"):
        draw_labelled(domain.labels, domain.train_rows, share, 0)


@pytest.mark.parametrize("labels", [None, torch.zeros(6, dtype=torch.long), torch.full((6,), -1)])
def test_data_without_two_classes_is_refused(labels):
    with pytest.raises(UserError, match="at least 2 classes"):
        draw_labelled(labels, torch.arange(6), 0.5, 0)


def test_batches_hold_the_labels_that_may_be_used_and_no_others(domain):
    labelled = draw_labelled(domain.labels, domain.train_rows, 0.05, 0)
    known = dict(zip(labelled.rows.tolist(), labelled.labels.tolist(), strict=True))

    def numbered(rows):
        return rows.clone()

    seen = [b for batch in labelled_batches(labelled, numbered, 7, 0) for b in zip(*_columns(batch), strict=True)]
    assert seen
    assert all(known[row] == label for row, label in seen)
    batches = partly_labelled_batches(labelled, domain.train_rows, numbered, 50, 0)
    seen = dict(pair for _ in range(20) for batch in batches for pair in zip(*_columns(batch), strict=True))
    assert set(seen) == set(domain.train_rows.tolist())
    assert seen == {row: known.get(row, UNLABELLED) for row in seen}


def _columns(batch):
    return batch["image"].tolist(), batch["label"].tolist()


def test_light_views_are_random_for_each_image_and_resume(domain):
    images = domain.images.read(torch.zeros(16, dtype=torch.long))
    views = LightViews(8, crop_scale=0.3, seed=1)
    first = views({"image": images, "label": torch.arange(16)})
    assert len(first.inputs) == 1
    assert first.inputs[0].shape == (16, 3, 8, 8)
    assert len(first.inputs[0].unique(dim=0)) > 12
    assert first.inputs[0].min() >= -1.001
    state = views.state_dict()
    second = views({"image": images}).inputs[0]
    other = LightViews(8, crop_scale=0.3, seed=5)
    other.load_state_dict(state)
    assert torch.equal(other({"image": images}).inputs[0], second)
    whole = LightViews(8, crop_scale=1.0, flip=0.0)({"image": images}).inputs[0]
    assert len(whole.unique(dim=0)) <= 4, "a crop of all of the image can only differ in its shape"


def outcome(domain, labelled, folder):
    """Scores and weights of every training that labels could get into."""
    part = few(domain, labelled)
    options = DistillationConfig(epochs=1, batch_size=128, teacher_share=0.5)
    teacher, student = part.new_classifier("small-conv-2"), part.new_classifier("small-conv-1")
    scores = [
        part.probe(teacher, folder / "probe"),
        part.fine_tune(teacher, folder / "teacher"),
        part.distil(student, teacher, options, 1.0, folder / "student"),
    ]
    weights = [*teacher.state_dict().values(), *student.state_dict().values()]
    return [score["accuracy"] for score in scores], weights


def test_labels_of_unlabelled_images_are_never_read(tmp_path):
    clean, spoilt = digits(), digits()
    labelled = draw_labelled(clean.labels, clean.train_rows, 0.05, 0, 10)
    spoilt.labels = clean.labels.clone()
    unlabelled = clean.train_rows[~torch.isin(clean.train_rows, labelled.rows)]
    spoilt.labels[unlabelled] = 10**9
    scores, weights = outcome(clean, labelled, tmp_path / "clean")
    same_scores, same_weights = outcome(spoilt, labelled, tmp_path / "spoilt")
    assert same_scores == scores
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))


class Killed(Exception):
    pass


def killed_after(domain, monkeypatch, batches):
    """Let reading fail after some batches, as a kill at that moment would end the training."""
    read, left = domain.images.read, [batches]

    def failing(rows):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return read(rows)

    monkeypatch.setattr(domain.images, "read", failing)


@pytest.mark.parametrize("stage", ["fine-tuned", "distilled"])
def test_a_killed_stage_goes_on_to_the_same_weights(domain, tmp_path, monkeypatch, stage):
    def trained(folder):
        part = few(domain)
        student = part.new_classifier("small-conv-2")
        if stage == "fine-tuned":
            part.fine_tune(student, folder)
        else:
            teacher = part.new_classifier("small-conv-3")
            part.distil(student, teacher, DistillationConfig(epochs=2, batch_size=64), 1.0, folder)
        return (folder / "classifier.safetensors").read_bytes()

    whole = trained(tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(domain, patch, 9)
        with pytest.raises(Killed):
            trained(tmp_path / "killed")
    assert CheckpointFolder(tmp_path / "killed" / "checkpoints").paths(), "nothing to go on from"
    assert not (tmp_path / "killed" / "scores.json").exists()
    assert trained(tmp_path / "killed") == whole


def test_a_finished_stage_is_read_and_not_trained_again(domain, tmp_path, monkeypatch):
    part = few(domain)
    first = part.new_classifier("small-conv-2")
    scores = part.fine_tune(first, tmp_path / "stage")
    monkeypatch.setattr(few_labels, "Trainer", None)
    again = part.new_classifier("small-conv-2")
    assert part.fine_tune(again, tmp_path / "stage") == scores
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())


def test_a_stage_of_other_settings_is_refused_by_name(domain, tmp_path):
    stage = tmp_path / "stage"
    part = few(domain)
    part.fine_tune(part.new_classifier("small-conv-2"), stage)
    with pytest.raises(UserError, match=r"epochs was 6, now 7.*--overwrite"):
        few(domain, options=FineTuningConfig(epochs=7, batch_size=8)).fine_tune(
            part.new_classifier("small-conv-2"), stage
        )
    with pytest.raises(UserError, match="weights was"):
        part.fine_tune(few(domain, seed=1).new_classifier("small-conv-2"), stage)
    other = draw_labelled(domain.labels, domain.train_rows, 0.02, 1, 10)
    with pytest.raises(UserError, match="labelled was"):
        few(domain, other).fine_tune(part.new_classifier("small-conv-2"), stage)


def test_a_broken_note_of_a_stage_is_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json can't be read"):
        run_stage(tmp_path, {}, dict)


def test_fine_tuning_starts_from_the_heads_first_layer(run):
    config, domain = open_run(run)
    classifier = pretrained_classifier(run, config, domain, 10, None, 0)
    saved = CheckpointFolder(run / "checkpoints").load_newest()["method"]
    head = {name: value for name, value in saved.items() if name.startswith("projector.0.")}
    for name, value in classifier.head.state_dict().items():
        assert torch.equal(value, head[f"projector.0.{name}"])
    assert [type(layer) for layer in classifier.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert classifier.linear.in_features == 12
    for name, value in classifier.encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"])


@pytest.mark.parametrize(("kept", "layers", "width"), [(0, 0, 16), (1, 3, 12), (2, 6, 12)])
def test_kept_layers_may_be_chosen(run, kept, layers, width):
    config, domain = open_run(run)
    classifier = pretrained_classifier(run, config, domain, 10, kept, 0)
    assert (
        len([m for m in classifier.head.modules() if not list(m.children()) and not isinstance(m, nn.Identity)])
        == layers
    )
    assert classifier.linear.in_features == width
    assert classifier(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_what_the_head_lacks_is_refused(run, tmp_path):
    config, domain = open_run(run)
    with pytest.raises(UserError, match="the head has 3 layers"):
        pretrained_classifier(run, config, domain, 10, 3, 0)
    with pytest.raises(UserError, match=r"no checkpoint.*--kept-layers 0"):
        pretrained_classifier(tmp_path, config, domain, 10, 1, 0)


def test_the_command_trains_a_run_of_another_method_and_goes_on_where_it_was(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--data=digits", "--image-size=8", "--encoder=small-conv-1", "--steps=1", "--batch-size=16"]
    assert main(["vision", "--method=simclr", f"--output={run}", *flags]) == 0
    command = ["vision", "fine-tune", str(run), "--labels=0.05", "--epochs=2"]
    assert main([*command, "--kept-layers=1"]) == 2
    assert "simclr-v2" in capsys.readouterr().err
    assert main(command) == 0
    table = capsys.readouterr().out
    folder = run / "fine-tuning" / "labels-0.05-seed-0"
    result = json.loads((folder / "fine_tuning.json").read_text())
    assert list(result["scores"]) == ["from scratch", "linear probe", "fine-tuned"]
    assert result["labelled_images"] == 80
    for name, score in result["scores"].items():
        assert 0 <= score["accuracy"] <= 1
        assert any(name in line and f"{score['accuracy']:.3f}" in line for line in table.splitlines())
    assert (folder / "fine-tuned" / "metrics.jsonl").exists()
    assert main(command) == 0
    assert capsys.readouterr().out == table
    assert main([*command, "--learning-rate=0.01"]) == 2
    assert "learning_rate was 0.001, now 0.01" in capsys.readouterr().err
    assert main([*command, "--learning-rate=0.01", "--overwrite"]) == 0


def test_a_run_without_labels_or_held_back_images_says_what_is_missing(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--data=digits", "--image-size=8", "--encoder=small-conv-1", "--steps=1", "--batch-size=16"]
    assert main(["vision", f"--output={run}", "--validation-share=0", *flags]) == 0
    assert main(["vision", "fine-tune", str(run), "--labels=0.05", "--epochs=1"]) == 2
    assert "--validation-share" in capsys.readouterr().err
    assert main(["vision", "fine-tune", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
