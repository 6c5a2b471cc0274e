import json
import statistics

import pytest

from contrastive_mm.cli import main
from contrastive_mm.training import Trainer
from contrastive_mm.vision.few_labels import simclr_v2
from contrastive_mm.vision.few_labels import training as few_labels

STAGES = [
    "from scratch",
    "linear probe",
    "fine-tuned",
    "distilled into itself",
    "student from scratch",
    "distilled into the student",
]
DIGITS = {
    "data": "digits",
    "image_size": 12,
    "validation_share": 0.3,
    "crop_scale": 0.3,
    "flip": 0.0,
    "greyscale": 0.0,
    "jitter_strength": 1.0,
    "temperature": 0.5,
    "learning_rate": 0.002,
    "hidden_dim": 128,
    "projection_dim": 64,
}


def recipe(folder, **options):
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (DIGITS | options).items()))
    return f"--config={path}"


def short(folder, output, *more):
    """The whole command in a few steps a stage; it learns nothing."""
    options = {"image_size": 8, "encoder": "small-conv-2", "steps": 3, "batch_size": 16, "validation_share": 0.7}
    flags = ["--student=small-conv-1", "--fine-tuning.epochs=3", "--distillation.epochs=1", f"--output={output}"]
    checkpoints = {"checkpoint_every": 2, "log_every": 1}
    return main(["vision", "simclr-v2", recipe(folder, **options, **checkpoints), *flags, *more])


def results(output):
    return json.loads((output / "results.json").read_text())["seeds"]


def accuracies(output, share, stage):
    return [seed["labels"][share]["scores"][stage]["accuracy"] for seed in results(output)]


@pytest.mark.slow
def test_ten_labels_teach_a_pretrained_encoder_and_its_student_more_than_one_from_scratch(tmp_path):
    output = tmp_path / "stages"
    flags = ["--student=small-conv-4", "--labels=0.01", "--seeds=3", "--fine-tuning.crop-scale=0.7"]
    distillation = ["--distillation.epochs=10", "--distillation.batch-size=64"]
    pretraining = recipe(tmp_path, encoder="small-conv-8", steps=150, batch_size=256)
    assert main(["vision", "simclr-v2", pretraining, *flags, *distillation, f"--output={output}"]) == 0
    accuracy = {stage: accuracies(output, "0.01", stage) for stage in STAGES}
    for better, worse, margin in (
        ("fine-tuned", "from scratch", 0.05),
        ("distilled into itself", "from scratch", 0.05),
        ("distilled into the student", "student from scratch", 0.1),
    ):
        gains = [a - b for a, b in zip(accuracy[better], accuracy[worse], strict=True)]
        assert min(gains) > 0, f"{better} against {worse}: {gains}"
        assert statistics.mean(gains) > margin, f"{better} against {worse}: {gains}"


def test_the_table_the_file_and_the_picture_tell_of_every_stage(tmp_path, capsys):
    output = tmp_path / "stages"
    assert short(tmp_path, output, "--labels", "0.05", "0.1", "--seeds=2") == 0
    printed = capsys.readouterr().out
    found = results(output)
    assert [list(seed["labels"]) for seed in found] == [["0.05", "0.1"]] * 2
    for stage in STAGES:
        row = next(line for line in printed.splitlines() if line.startswith(f"{stage} "))
        for share in ("0.05", "0.1"):
            values = accuracies(output, share, stage)
            assert f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" in row
        parameters = found[0]["labels"]["0.1"]["scores"][stage]["parameters"]
        assert f"{parameters:,}" in row
    scores = found[0]["labels"]["0.1"]["scores"]
    assert scores["distilled into the student"]["parameters"] < scores["distilled into itself"]["parameters"]
    assert scores["linear probe"]["parameters"] == scores["distilled into itself"]["parameters"]
    assert scores["fine-tuned"]["parameters"] > scores["from scratch"]["parameters"], "a layer of the head is kept"
    assert (output / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert "distilled into the student" in (output / "report.html").read_text()
    assert {path.parent.name for path in (output / "seed-1" / "labels-0.1").glob("*/settings.json")} == {
        "from-scratch",
        "linear-probe",
        "fine-tuned",
        "self-distilled",
        "student-from-scratch",
        "student-distilled",
    }


class Killed(Exception):
    pass


def test_a_killed_command_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert short(tmp_path, whole, "--labels", "0.1") == 0
    step, left = Trainer._one_step, [0]

    def failing(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_one_step", failing)
    kills = 0
    while kills < 30:
        left[0] = 5  # fewer steps than all stages have together, and enough to come to the next checkpoint
        try:
            assert short(tmp_path, killed, "--labels", "0.1") == 0
            break
        except Killed:
            kills += 1
    assert 3 <= kills < 30, "it was never killed, or never came to its end"
    stages = list(whole.glob("seed-0/labels-0.1/*/classifier.safetensors"))
    assert len(stages) == 5
    for path in [*stages, whole / "seed-0" / "pretraining" / "encoder.safetensors"]:
        assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    for stage in STAGES:
        assert accuracies(killed, "0.1", stage) == accuracies(whole, "0.1", stage)


def test_a_finished_command_trains_nothing_when_it_is_repeated(tmp_path, capsys, monkeypatch):
    output = tmp_path / "stages"
    assert short(tmp_path, output, "--labels", "0.1") == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(few_labels, "Trainer", None)
    monkeypatch.setattr(simclr_v2, "pretrain", None)
    assert short(tmp_path, output, "--labels", "0.1") == 0
    assert capsys.readouterr().out == first


def test_another_share_is_added_and_other_options_are_refused(tmp_path, capsys, monkeypatch):
    output = tmp_path / "stages"
    assert short(tmp_path, output, "--labels", "0.05") == 0
    with monkeypatch.context() as patch:
        patch.setattr(simclr_v2, "pretrain", None)
        assert short(tmp_path, output, "--labels", "0.05", "0.1") == 0
    capsys.readouterr()
    assert short(tmp_path, output, "--labels", "0.05", "--distillation.temperature=0.5") == 2
    assert "temperature was" in capsys.readouterr().err
    assert short(tmp_path, output, "--labels", "0.05", "--epochs=1") == 2
    assert "--overwrite" in capsys.readouterr().err
    other = output / "of mine.txt"
    other.write_text("kept")
    assert short(tmp_path, output, "--labels", "0.1", "--epochs=1", "--overwrite") == 0
    assert other.read_text() == "kept"
    assert [list(seed["labels"]) for seed in results(output)] == [["0.1"]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--student=small-conf"], "Did you mean 'small-conv'"),
        (["--labels", "0.1", "2"], "--labels 2"),
        (["--seeds=0"], "--seeds 0"),
        (["--distillation.teacher-share=1.5"], "--teacher-share 1.5"),
        (["--fine-tuning.flip=2"], "--flip 2"),
        (["--config=cartpole-curl"], "recipe"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(tmp_path, capsys, flags, said):
    output = tmp_path / "stages"
    assert short(tmp_path, output, *flags) == 2
    assert said in capsys.readouterr().err
    assert not output.exists()


def test_images_without_labels_are_refused(tmp_path, capsys):
    from pictures import picture

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        picture(i, (8, 8)).save(folder / f"{i}.png")
    assert short(tmp_path, tmp_path / "stages", f"--data={folder}") == 2
    assert "labels" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert short(tmp_path, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
