"""A test split in place of a held-back part, splits of folders, and partly labelled data."""

import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encoded, idx, picture

from contrastive_mm.cli import main
from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.images import join_sources
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.evaluation.evaluate import evaluate_images
from contrastive_mm.vision.image_runs import open_image_run

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 60), "red": (220, 30, 30)}


def plant(folder, names, count, painted_as=None):
    """Images of one colour a class, each a little different; ``painted_as`` gives some classes another's colour."""
    for name in names:
        (folder / name).mkdir(parents=True)
        colour = COLOURS[(painted_as or {}).get(name, name)]
        for i in range(count):
            picture(tuple(channel + i % 7 for channel in colour), (8, 8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    data = plant(folder / "data", COLOURS, 12)
    arguments = [f"--data={data}", f"--output={folder / 'run'}", "--steps=2", "--batch-size=16"]
    assert main(["vision", *arguments, "--validation-share=0.25"]) == 0
    return folder / "run"


def test_the_test_split_scores_and_all_of_the_data_is_learnt_from(run, tmp_path):
    test = plant(tmp_path / "test", ["green", "red"], 5, painted_as={"red": "blue"})
    config, domain = open_image_run(run, test_data=str(test))
    assert config.domain_options.validation_share == 0.25
    assert len(domain.train_rows) == 36
    assert domain.labels[domain.validation_rows].tolist() == [1] * 5 + [2] * 5, "by name, where blue is missing"
    found = evaluate_images(run, test_data=str(test), only=("knn",))
    assert found.rows[0].values["raw input"] == pytest.approx(0.5)
    assert found.results_file == run / "evaluation-test.json"
    written = json.loads(found.results_file.read_text())
    assert written["test_data"] == str(test)
    assert written["protocols"]["knn"]["result"]["neighbours"] == 6, "half of a class of 12: nothing is held back"


def test_data_of_one_name_do_not_replace_each_others_scores(run, tmp_path):
    files = []
    for parent in ("first", "second", "first"):
        test = tmp_path / parent / "test"
        if not test.exists():
            plant(test, COLOURS, 4)
        found = evaluate_images(run, test_data=str(test), only=("geometry",), output=tmp_path / "out")
        files.append((found.results_file, found.report))
    assert files[0] == files[2]
    assert files[0] != files[1]
    assert json.loads(files[1][0].read_text())["test_data"] == str(tmp_path / "second" / "test")
    assert all(path.exists() for pair in files for path in pair)


def test_fine_tuning_on_a_test_split_draws_labels_from_all_of_the_data(run, tmp_path, capsys):
    test = plant(tmp_path / "test", COLOURS, 4)
    arguments = ["vision", "fine-tune", str(run), f"--test-data={test}", "--labels=0.5", "--epochs=1"]
    assert main([*arguments, f"--output={tmp_path / 'out'}"]) == 0
    assert "18 labelled of 36 training images" in capsys.readouterr().out


def test_fine_tuning_on_other_data_has_a_folder_of_its_own(run, tmp_path):
    other = plant(tmp_path / "other", COLOURS, 6)
    arguments = ["vision", "fine-tune", str(run), "--labels=0.5", "--epochs=1"]
    assert main([*arguments, f"--data={other}"]) == 0
    assert main(arguments) == 0
    assert {path.name for path in (run / "fine-tuning").iterdir()} == {"other-labels-0.5-seed-0", "labels-0.5-seed-0"}


def test_simclr_v2_trains_on_all_of_the_data_where_a_test_split_is_given(tmp_path):
    data, test = plant(tmp_path / "data", COLOURS, 8), plant(tmp_path / "test", COLOURS, 4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 8\nencoder: small-conv-8\n")
    arguments = [f"--config={recipe}", f"--data={data}", f"--test-data={test}", "--epochs=1", "--labels", "0.5"]
    arguments += ["--fine-tuning.epochs=1", "--distillation.epochs=1", f"--output={tmp_path / 'out'}"]
    assert main(["vision", "simclr-v2", *arguments]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["config"]["validation_share"] == 0
    assert result["seeds"][0]["labels"]["0.5"]["labelled_images"] == 12
    fine_tuned = json.loads((tmp_path / "out" / "seed-0" / "labels-0.5" / "fine-tuned" / "settings.json").read_text())
    assert (fine_tuned["images"], fine_tuned["test_data"]) == (24, str(test))


def test_a_test_split_of_other_or_no_classes_is_refused(run, tmp_path):
    strange = tmp_path / "strange"
    (strange / "ochre").mkdir(parents=True)
    (strange / "red").mkdir()
    for name in ("ochre", "red"):
        picture((1, 2, 3), (8, 8)).save(strange / name / "1.png")
    with pytest.raises(UserError, match=r"has the class ochre, which --data has not \(it has blue, green, red\)"):
        evaluate_images(run, test_data=str(strange))
    with pytest.raises(UserError, match=r"--test-data .*red has no labels to score by"):
        evaluate_images(run, test_data=str(strange / "red"))
    with pytest.raises(UserError, match="--data has no labels to learn from"):
        evaluate_images(run, data=str(strange / "red"), test_data=str(strange))


def test_joined_sources_keep_pixels_names_and_missing_labels(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    plant(first, ["blue", "red"], 2)
    plant(second, ["red"], 2)
    (second / "unlabelled").mkdir()
    picture((9, 9, 9), (8, 8)).save(second / "unlabelled" / "x.png")
    joined = join_sources(find_images(str(first)), find_images(str(second)), "second")
    assert joined.labels.tolist() == [0, 0, 1, 1, 1, 1, -1]
    colours = [joined.open_image(row).getpixel((0, 0)) for row in range(7)]
    assert colours[2] == colours[4] == COLOURS["red"]
    assert colours[6] == (9, 9, 9)
    assert joined.ends(6) == find_images(str(second)).ends(2)


def test_a_test_split_whose_files_have_no_ends_to_look_at_is_scored_from_the_disk(tmp_path):
    data = tmp_path / "digits"  # a class a digit, as the test split has
    for number in range(10):
        (data / str(number)).mkdir(parents=True)
        for i in range(3):
            picture(20 * number + i, (8, 8)).save(data / str(number) / f"{i}.png")
    run = tmp_path / "run"
    arguments = [f"--data={data}", f"--output={run}", "--steps=1", "--batch-size=8", "--storage=disk"]
    assert main(["vision", *arguments]) == 0
    found = evaluate_images(run, test_data="digits", only=("geometry",))
    assert json.loads(found.results_file.read_text())["subject"]["held_back"] == 1797


def test_unlabelled_images_among_labelled_ones_change_no_score(tmp_path):
    """They lie far from all classes: had they a part in learning or scoring, accuracies would not be 1."""
    data = plant(tmp_path / "data", COLOURS, 12)
    (data / "unlabelled").mkdir()
    for i in range(30):
        picture((i, i, i), (8, 8)).save(data / "unlabelled" / f"{i}.png")
    run = tmp_path / "run"
    arguments = [f"--data={data}", f"--output={run}", "--steps=2", "--batch-size=16", "--validation-share=0.25"]
    assert main(["vision", *arguments]) == 0
    found = evaluate_images(run, only=("knn", "linear", "few-labels", "retrieval", "clustering"))
    assert not found.left_out
    values = {row.metric: row.values["raw input"] for row in found.rows}
    assert {name for name, value in values.items() if value != pytest.approx(1)} == set()
    _, domain = open_image_run(run)
    assert len(domain.train_rows) + len(domain.validation_rows) == 66
    assert int((domain.labels[domain.train_rows] < 0).sum()) > 0


@pytest.fixture
def splits(tmp_path):
    """A folder of each kind, with 2 training and 3 test images."""
    for kind in ("images", "idx", "tables", "tars"):
        (tmp_path / kind).mkdir()
    for split, count in (("train", 2), ("test", 3)):
        (tmp_path / "images" / split / "red").mkdir(parents=True)
        table = pa.table({"image": [encoded(i) for i in range(count)], "label": [0] * count})
        pq.write_table(table, tmp_path / "tables" / f"{split}-00000-of-00001.parquet")
        name = "t10k" if split == "test" else split
        (tmp_path / "idx" / f"{name}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 4, 4), np.uint8)))
        (tmp_path / "idx" / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
        with tarfile.open(tmp_path / "tars" / f"{split}-000.tar", "w") as tar:
            for i in range(count):
                path = tmp_path / "images" / split / "red" / f"{i}.png"
                picture(i).save(path)
                tar.add(path, f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["images", "idx", "tables", "tars"])
def test_a_split_behind_a_folder_is_found(splits, kind):
    assert len(find_images(f"{splits / kind}:train")) == 2
    assert len(find_images(f"{splits / kind}:test")) == 3
    with pytest.raises(UserError, match="has no split 'dev'"):
        find_images(f"{splits / kind}:dev")


def test_the_labels_of_the_idx_test_split_are_its_own(splits):
    assert torch.equal(find_images(f"{splits / 'idx'}:test").labels, torch.arange(3))


@pytest.mark.parametrize("kind", ["tables", "tars"])
def test_files_of_several_splits_are_not_trained_on_at_once(splits, kind):
    with pytest.raises(UserError, match=rf"several splits \(test, train\): choose one, such as .*{kind}:train"):
        find_images(str(splits / kind))


def test_a_test_split_that_changed_is_not_answered_with_its_earlier_score(run, tmp_path, capsys):
    test = plant(tmp_path / "test", COLOURS, 4)
    arguments = ["vision", "fine-tune", str(run), f"--test-data={test}", "--epochs=1", f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 0
    (test / "red" / "00.png").rename(test / "blue" / "99.png")
    assert main(arguments) == 2
    assert "was begun with other settings: content was" in capsys.readouterr().err


def test_data_are_not_scored_on_themselves(run):
    config, _ = open_image_run(run)
    with pytest.raises(UserError, match=r"is --data itself"):
        open_image_run(run, test_data=config.domain_options.data)


def test_a_batch_larger_than_the_data_is_refused_before_simclr_v2_leaves_a_trace(tmp_path, capsys):
    data = plant(tmp_path / "data", COLOURS, 6)
    arguments = [f"--data={data}", "--encoder=small-conv-8", "--epochs=1", "--labels", "0.5"]
    assert main(["vision", "simclr-v2", *arguments, f"--output={tmp_path / 'out'}"]) == 2
    assert "batch_size from 2 to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
