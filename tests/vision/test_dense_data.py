import json

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import coco_scenes, voc_scene, write_json

from contrastive_mm.errors import UserError
from contrastive_mm.vision.dense.batches import SceneLoader, SceneViews, fit_image, scene_batches
from contrastive_mm.vision.dense.data import VOID, object_masks, read_class_map, read_dense_data
from contrastive_mm.vision.dense.detection import targets

# pycocotools 2.0.11 and NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def coco(tmp_path):
    """One image of 20 x 10 pixels with two objects, of the categories 7 (cat) and 3 (dog)."""
    Image.fromarray(np.full((10, 20, 3), 200, np.uint8)).save(tmp_path / "one.png")
    square = [[2, 3, 8, 3, 8, 9, 2, 9]]
    return {
        "images": [{"id": 42, "file_name": "one.png", "height": 10, "width": 20}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 7, "bbox": [2, 3, 6, 6], "segmentation": square},
            {"id": 2, "image_id": 42, "category_id": 3, "bbox": [10, 0, 10, 5], "iscrowd": 1, "segmentation": square},
        ],
    }


def read(folder, content, task="boxes", **options):
    return read_dense_data(str(write_json(folder / "all.json", content)), task, **options)


def test_coco_boxes_become_corners_and_ids_with_gaps_become_classes_in_their_order(tmp_path, coco):
    data = read(tmp_path, coco)
    assert data.class_names == ["dog", "cat"], "by id: 3, then 7"
    (scene,) = data.scenes
    assert scene.boxes.tolist() == [[2, 3, 8, 9], [10, 0, 20, 5]]
    assert scene.classes.tolist() == [2, 1]
    assert scene.crowd.tolist() == [False, True]
    assert (scene.height, scene.width) == (10, 20)


@pytest.mark.parametrize("place", ["images", "val2017", "."])
def test_images_are_found_in_the_usual_places_or_where_they_are_said_to_be(tmp_path, coco, place):
    (tmp_path / "annotations").mkdir()
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "one.png").rename(tmp_path / place / "one.png")
    file = write_json(tmp_path / "annotations" / "instances_val2017.json", coco)
    said = tmp_path if place == "." else None
    assert read_dense_data(str(file), "boxes", said).scenes[0].path.is_file()
    assert len(read_dense_data(str(tmp_path), "boxes", said)) == 1, "the folder has one file of annotations"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [15, 3, 8, 6]}, r"annotation 1: its box .* outside the image of 20 x 10"),
        ({"bbox": [5, 3, -2, 6]}, "annotation 1: its box .* negative size"),
        ({"bbox": [5, 3, float("nan"), 6]}, "annotation 1: its box .* negative size, or isn't finite"),
        ({"bbox": [5, 3, 6]}, "annotation 1: its bbox .* four numbers"),
        ({"category_id": 8}, "annotation 1: there is no category 8; known: 3, 7"),
        ({"image_id": 1}, "annotation 1: there is no image 1"),
        ({"id": 2}, "the id 2 stands twice in 'annotations'"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path, coco, changes, message):
    coco["annotations"][0].update(changes)
    with pytest.raises(UserError, match=f"all.json.*{message}"):
        read(tmp_path, coco)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("images", 0, "id"), [1], r"images\[0\] has the id \[1\]; it must be a number or a text"),
        (("images", 0, "height"), None, r"images\[0\] has the height None; it must be a number of pixels"),
        (("images", 0, "width"), "wide", "has the width 'wide'"),
        (("images", 0, "file_name"), None, r"images\[0\] has the file_name None; it must be a text"),
        (("annotations", 1, "image_id"), [42], r"annotations\[1\] has the image_id \[42\]"),
        (("annotations", 1, "category_id"), {}, r"annotations\[1\] has the category_id \{\}"),
        (("categories", 0, "id"), "7", "annotation 1: there is no category 7; known: 3, 7"),
    ],
)
def test_values_of_the_wrong_type_are_named(tmp_path, coco, place, value, message):
    part, number, key = place
    coco[part][number][key] = value
    with pytest.raises(UserError, match=message):
        read(tmp_path, coco)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"size": [5, 5], "counts": [5, 20]}, r"its size is \[5, 5\], the image's \[10, 20\]"),
        ({"size": [10, 20], "counts": [5, 20]}, "its counts are of 25 pixels, the image has 200"),
        ({"size": [10, 20], "counts": "garbage"}, "none of COCO's formats"),
        ({"counts": "garbage"}, "none of COCO's formats"),
    ],
)
def test_run_lengths_that_are_not_of_the_whole_image_are_refused(tmp_path, coco, region, message):
    coco["annotations"][0]["segmentation"] = region
    with pytest.raises(UserError, match=f"annotation 1.*{message}"):
        read(tmp_path, coco, "classes")


def test_a_split_of_coco_data_is_refused_and_messages_name_the_option(tmp_path, coco):
    file = write_json(tmp_path / "all.json", coco)
    with pytest.raises(UserError, match=r"--test-data .*all.json:val: COCO data have no splits"):
        read_dense_data(f"{file}:val", "boxes", option="--test-data")


def test_boxes_a_pixel_over_the_border_are_cut_and_those_without_area_left_out(tmp_path, coco, capsys):
    coco["annotations"][0]["bbox"] = [-0.5, 3, 21, 7.2]
    coco["annotations"][1]["bbox"] = [3, 3, 0, 5]
    (scene,) = read(tmp_path, coco).scenes
    assert scene.boxes.tolist() == [[0, 3, 20, 10]]
    assert "left out 1 boxes without area" in capsys.readouterr().err


def test_what_is_missing_or_of_another_size_is_named(tmp_path, coco):
    coco["images"].append({"id": 43, "file_name": "gone.png", "height": 10, "width": 20})
    with pytest.raises(UserError, match=r"1 of 2 images are missing, .*gone.png.*--images"):
        read(tmp_path, coco)
    coco["images"] = [{**coco["images"][0], "height": 11}]
    with pytest.raises(UserError, match=r"one.png has 20 x 10 pixels, but its annotation says 20 x 11"):
        read(tmp_path, coco)
    del coco["categories"]
    with pytest.raises(UserError, match="no list 'categories'"):
        read(tmp_path, coco)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken.json can't be read as JSON"):
        read_dense_data(str(tmp_path / "broken.json"), "boxes")
    with pytest.raises(UserError, match="there is no"):
        read_dense_data(str(tmp_path / "nowhere"), "boxes")


def test_test_data_take_the_classes_of_the_training_data_by_name(tmp_path, coco):
    data = read(tmp_path, coco, class_names=["cat", "bird", "dog"])
    assert data.scenes[0].classes.tolist() == [1, 3]
    with pytest.raises(UserError, match="annotation 2: the class 'dog' is not among the training data's: cat"):
        read(tmp_path, coco, class_names=["cat"])


def test_masks_of_every_format_agree(tmp_path, coco):
    runs = {"size": [10, 20], "counts": [23, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 121]}  # columns 2 to 7, rows 3 to 8
    coco["annotations"][1]["segmentation"] = runs
    (scene,) = read(tmp_path, coco, "masks").scenes
    first, second = object_masks(scene)
    assert np.array_equal(first, second)
    rows, columns = np.nonzero(first)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 8, 2, 7)
    del coco["annotations"][0]["segmentation"]
    with pytest.raises(UserError, match="annotation 1 has no 'segmentation'"):
        read(tmp_path, coco, "masks")


def test_pixels_of_two_objects_do_not_count(tmp_path, coco):
    coco["annotations"][1]["segmentation"] = [[6, 3, 12, 3, 12, 9, 6, 9]]
    data = read(tmp_path, coco, "classes")
    row = read_class_map(data.scenes[0], 2)[5].tolist()
    assert row == [0, 0, 2, 2, 2, 2, VOID, VOID, 1, 1, 1, 1, *[0] * 8]


def test_voc_boxes_are_counted_from_one_and_hold_their_last_pixel(tmp_path):
    voc_scene(tmp_path, "a", objects=[("dog", (1, 1, 20, 16), 0), ("cat", (3, 4, 5, 6), 1)])
    voc_scene(tmp_path, "b", objects=[])
    data = read_dense_data(str(tmp_path), "boxes")
    first, second = data.scenes
    assert data.class_names == ["cat", "dog"]
    assert first.boxes.tolist() == [[0, 0, 20, 16], [2, 3, 5, 6]]
    assert first.classes.tolist() == [2, 1]
    assert first.crowd.tolist() == [False, True], "difficult"
    assert second.boxes.shape == (0, 4)


def test_a_split_of_voc_is_chosen_by_name(tmp_path):
    for name in "abc":
        voc_scene(tmp_path, name)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("c\na\n")
    assert [scene.name for scene in read_dense_data(f"{tmp_path}:val", "boxes").scenes] == ["c", "a"]
    with pytest.raises(UserError, match=r"train.txt; splits there: val"):
        read_dense_data(f"{tmp_path}:train", "boxes")


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([("cat", (1, 1, 30, 8), 0)], r"one.xml, object 1 \(cat\): its box .* outside the image of 20 x 16"),
        ([("cat", (9, 1, 3, 8), 0)], r"one.xml, object 1 \(cat\): its box .* negative size"),
        ([("cat", (9, 1, "x", 8), 0)], r"one.xml, object 1 \(cat\): its bndbox .* four numbers"),
    ],
)
def test_a_wrong_object_of_voc_is_named(tmp_path, objects, message):
    voc_scene(tmp_path, objects=objects)
    with pytest.raises(UserError, match=message):
        read_dense_data(str(tmp_path), "boxes")


def test_unknown_classes_missing_images_and_masks_of_voc_are_refused(tmp_path):
    voc_scene(tmp_path)
    with pytest.raises(UserError, match=r"one.xml, object 1 .* 'cat' is not among dog"):
        read_dense_data(str(tmp_path), "boxes", class_names=["dog"])
    with pytest.raises(UserError, match="--masks"):
        read_dense_data(str(tmp_path), "masks")
    (tmp_path / "JPEGImages" / "one.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 1 images are missing, .*one.jpg"):
        read_dense_data(str(tmp_path), "boxes")


def test_voc_class_maps_are_read_as_numbers_with_the_border_as_void(tmp_path):
    numbers = np.zeros((16, 20), np.uint8)
    numbers[2:5], numbers[5] = 20, VOID
    voc_scene(tmp_path, class_map=numbers)
    data = read_dense_data(str(tmp_path), "classes")
    assert data.class_names[19] == "tvmonitor"
    assert np.array_equal(read_class_map(data.scenes[0], 20), numbers)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"one.png has the class 20, but there are 2 class names"):
        read_dense_data(str(tmp_path), "classes")
    voc_scene(tmp_path, class_map=numbers % 3)
    assert read_dense_data(str(tmp_path), "classes").class_names == ["cat", "dog"]
    Image.new("RGB", (20, 16)).save(tmp_path / "SegmentationClass" / "one.png")
    with pytest.raises(UserError, match="mode RGB"):
        read_dense_data(str(tmp_path), "classes")


def test_an_image_is_fitted_into_the_upper_left_of_its_square():
    pixels = np.full((10, 20, 3), 250, np.uint8)
    square = fit_image(pixels, 40)
    assert (square[:, :20] == 250).all()
    assert (square[:, 20:] == 127).all()


def test_batches_scale_boxes_and_masks_and_leave_crowds_out(tmp_path, coco):
    data = read(tmp_path, coco, "masks")
    batch = SceneLoader(data, 40, "masks")(torch.tensor([0, 0]))
    assert batch["image"].shape == (2, 3, 40, 40)
    assert batch["boxes"].tolist() == [[[4, 6, 16, 18]]] * 2
    assert batch["classes"].tolist() == [[2], [2]]
    rows, columns = batch["masks"][0, 0].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 17, 4, 15)


def test_mirroring_moves_boxes_masks_and_classes_with_the_pixels(tmp_path):
    file = coco_scenes(tmp_path, 6)
    for task in ("masks", "classes"):
        data = read_dense_data(str(file), task)
        batch = SceneLoader(data, 48, task)(torch.arange(6))
        view = SceneViews(flip=1.0)(batch).inputs[0]
        assert torch.equal(view["image"], batch["image"].flip(-1).float() / 255)
        if task == "classes":
            assert torch.equal(view["class_map"], batch["class_map"].flip(-1))
            continue
        for target in targets(view):
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = mask.nonzero().unbind(1)
                around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == [int(edge) for edge in around]
        mixed = SceneViews(flip=0.5, seed=1)(batch).inputs[0]["boxes"]
        same = (mixed == batch["boxes"]).flatten(1).all(dim=1)
        assert 0 < int(same.sum()) < 6, "each image by its own draw"


def test_the_held_back_part_is_the_same_every_time_and_neither_part_is_empty(tmp_path):
    data = read_dense_data(str(coco_scenes(tmp_path, 10)), "boxes")
    parts = [[scene.name for scene in part.scenes] for part in data.hold_back(0.3)]
    assert [len(part) for part in parts] == [7, 3]
    assert sorted(parts[0] + parts[1]) == sorted(scene.name for scene in data.scenes)
    assert parts == [[scene.name for scene in part.scenes] for part in data.hold_back(0.3)]
    with pytest.raises(UserError, match="--validation-share"):
        data.hold_back(0.01)


def test_an_image_that_breaks_after_it_was_checked_is_named(tmp_path):
    file = coco_scenes(tmp_path, 4)
    data = read_dense_data(str(file), "boxes")
    (tmp_path / "images" / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2.png can't be read"):
        list(scene_batches(SceneLoader(data, 32, "boxes"), 4, 0))


def test_coordinates_that_are_no_json_numbers_are_refused(tmp_path, coco):
    text = json.dumps(coco).replace('"bbox": [2', '"bbox": ["2"')
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(UserError, match="annotation 1: its bbox"):
        read_dense_data(str(tmp_path / "all.json"), "boxes")


def test_a_list_of_classes_that_is_not_utf8_is_named(tmp_path):
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes.txt is no text in UTF-8 .*save it as such"):
        read_dense_data(str(tmp_path), "boxes")
