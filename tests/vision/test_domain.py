import pytest
from pictures import break_file, picture

from contrastive_mm.errors import UserError
from contrastive_mm.methods import get_method
from contrastive_mm.vision import domain as vision_domain
from contrastive_mm.vision.data.images import ImageSource
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.domain import ImageDomain, VisionConfig

CLASSES = ["ape", "bee", "cow"]
PER_CLASS = 8


def level_of(name):
    """The grey level that a file is painted with, another for each: its id can be read off its pixels."""
    folder, file = name.split("/")
    return 80 * CLASSES.index(folder) + 10 * int(file.removesuffix(".png"))


@pytest.fixture
def folder(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for i in range(PER_CLASS):
            picture(level_of(f"{name}/{i}.png"), (8, 8)).save(tmp_path / name / f"{i}.png")
    for broken in ("ape/0.png", "ape/7.png", "bee/3.png"):
        break_file(tmp_path / broken)
    return tmp_path


@pytest.fixture(params=["disk", "memory"])
def domain(request, folder):
    config = VisionConfig(data=str(folder), batch_size=3, validation_share=0.3, max_broken=0.2, storage=request.param)
    return ImageDomain(config, seed=0)


def trained_ids(domain, batch):
    """The names of a batch's images: ``index`` counts those trained on."""
    return [domain.images.ids[row] for row in domain.train_rows[batch["index"]].tolist()]


def painted(features):
    """The grey levels that raw features (pixels in -1..1) were painted with."""
    return (features.mean(dim=1) * 127.5 + 127.5).round().int().tolist()


def test_training_batches_carry_index_and_label_that_belong_to_the_pixels(domain):
    for _ in range(2):
        for batch in domain.train_batches():
            pixels = {"image"} if domain.images.in_memory else {"view_0", "view_1"}
            assert set(batch) == {*pixels, "index", "label"}
            names = trained_ids(domain, batch)
            for name in pixels:
                levels = batch[name].float().mean(dim=(1, 2, 3)).round().int().tolist()
                assert levels == [level_of(name) for name in names]
            assert batch["label"].tolist() == [CLASSES.index(name.split("/")[0]) for name in names]
            views = domain.make_views(batch)
            assert views.labels is batch["label"]
            assert views.sample_ids is batch["index"]


def test_batches_of_unlabelled_images_carry_no_label(tmp_path):
    for i in range(4):
        picture(i, (8, 8)).save(tmp_path / f"{i}.png")
    batch = next(iter(ImageDomain(VisionConfig(data=str(tmp_path), batch_size=4), 0).train_batches()))
    assert set(batch) == {"image", "index"}


def test_training_never_sees_a_held_back_image(domain):
    held_back = set(domain.embed(None).ids)
    assert len(held_back) == 6, "two of 6, two of 7 and two of 8"
    batches = domain.train_batches()
    trained = set()
    for _ in range(20):
        for batch in batches:
            trained |= set(trained_ids(domain, batch))
    assert not trained & held_back
    assert trained | held_back == set(domain.embed(None, everything=True).ids)


def test_evaluation_learns_from_training_images_and_is_scored_on_the_others(domain, monkeypatch):
    calls = []

    def record(train, train_y, test, test_y, *options):
        calls.append((painted(train), train_y.tolist(), painted(test), test_y.tolist()))
        return 0.0

    for score in ("few_label_accuracy", "knn_accuracy", "linear_probe_accuracy"):
        monkeypatch.setattr(vision_domain, score, record)
    domain.evaluate(None)
    held_back = sorted(level_of(name) for name in domain.embed(None).ids)
    assert len(calls) == 3, "few_label_accuracy of 1 label a class only (the smallest has 4), kNN and the probe"
    for train, train_y, test, test_y in calls:
        assert not set(train) & set(test)
        assert sorted(test) == held_back
        assert len(set(train)) == len(train) == len(domain.images) - len(held_back)
        assert train_y == [level // 80 for level in train]
        assert test_y == [level // 80 for level in test]


@pytest.mark.parametrize("everything", [False, True])
def test_embeddings_come_in_the_order_of_the_data_with_the_pixels_of_their_ids(domain, everything):
    embedded = domain.embed(None, everything)
    assert embedded.ids == sorted(embedded.ids)
    assert len(embedded.ids) == (21 if everything else 6)
    levels = [level_of(name) for name in embedded.ids]
    assert painted(embedded.features) == levels
    assert [int(preview.mean().round()) for preview in embedded.previews] == levels
    assert embedded.labels == [name.split("/")[0] for name in embedded.ids]


def digits_with_gaps():
    """Digits whose classes are 0, 20, 40, ...: most class numbers have no image, as in a part of ImageNet."""
    digits = find_images("digits")
    return ImageSource(digits.ids, digits.open_image, digits.labels * 20, [f"class {i}" for i in range(200)])


def test_classes_without_images_change_no_score(monkeypatch):
    config = VisionConfig(data="digits", image_size=8, validation_share=0.3)
    plain = ImageDomain(config, 0)
    monkeypatch.setattr(vision_domain, "find_images", lambda data: digits_with_gaps())
    monkeypatch.setattr(vision_domain, "FEW_LABELS", (5,))
    gaps = ImageDomain(config, 0)
    expected = plain.evaluate(None)
    assert set(expected) == {"few_label_accuracy_5", "knn_accuracy", "linear_probe_accuracy"}
    assert gaps.evaluate(None) == expected
    assert gaps.embed(None).labels == [f"class {20 * int(label)}" for label in plain.embed(None).labels]


def test_neighbours_are_half_of_the_smallest_class_that_is_there(monkeypatch):
    chosen = []
    monkeypatch.setattr(vision_domain, "find_images", lambda data: digits_with_gaps())
    monkeypatch.setattr(vision_domain, "knn_accuracy", lambda *options: chosen.append(options[-1]) or 0.0)
    monkeypatch.setattr(vision_domain, "FEW_LABELS", ())
    monkeypatch.setattr(vision_domain, "linear_probe_accuracy", lambda *options: 0.0)
    domain = ImageDomain(VisionConfig(data="digits", image_size=8, validation_share=0.3), 0)
    domain.evaluate(None)
    counts = domain.labels[domain.train_rows].unique(return_counts=True)[1]
    assert chosen == [int(counts.min()) // 2]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_max_broken_is_a_share(share):
    with pytest.raises(UserError, match="--max-broken"):
        VisionConfig(max_broken=share)


@pytest.fixture(params=["disk", "memory"])
def partly_labelled(request, tmp_path):
    for folder, first in (("ape", 0), ("bee", 100), ("unlabelled", 200)):
        (tmp_path / folder).mkdir()
        for i in range(8):
            picture(first + i, (8, 8)).save(tmp_path / folder / f"{i}.png")
    config = VisionConfig(data=str(tmp_path), batch_size=4, validation_share=0.25, storage=request.param)
    return ImageDomain(config, seed=0)


def test_partly_labelled_data_train_on_everything_and_score_by_what_has_a_label(partly_labelled, monkeypatch):
    domain, calls = partly_labelled, []
    held_back = {domain.images.ids[row] for row in domain.validation_rows.tolist()}
    assert held_back == {f"{name}/{i}.png" for name in ("ape", "bee") for i in (6, 7)}
    trained = [name for batch in domain.train_batches() for name in trained_ids(domain, batch)]
    assert len(trained) == len(set(trained)) == 20
    assert sum(name.startswith("unlabelled") for name in trained) == 8

    def record(train, train_y, test, test_y, *options):
        calls.append((painted(train), train_y.tolist(), painted(test), test_y.tolist()))
        return 0.0

    for score in ("few_label_accuracy", "knn_accuracy", "linear_probe_accuracy"):
        monkeypatch.setattr(vision_domain, score, record)
    domain.evaluate(None)
    assert len(calls) == 4, "1 and 5 labels a class (there are 6), kNN and the probe"
    for train, train_y, test, test_y in calls:
        assert sorted(train) == [*range(6), *range(100, 106)]
        assert sorted(test) == [6, 7, 106, 107]
        assert train_y == [level // 100 for level in train]
        assert test_y == [level // 100 for level in test]
    labels = dict(zip((embedded := domain.embed(None, everything=True)).ids, embedded.labels, strict=True))
    assert all(label == name.split("/")[0] for name, label in labels.items())


def test_methods_that_need_labels_refuse_partly_labelled_data_clearly(partly_labelled, encoder):
    method = get_method("supcon")(encoder, None)
    batch = next(iter(partly_labelled.train_batches()))
    assert "label" not in batch
    with pytest.raises(UserError, match="SupCon needs labels, one for each sample, but this data has none, or not"):
        method(partly_labelled.make_views(batch))


def test_one_labelled_class_among_unlabelled_images_is_scored_without_labels(tmp_path):
    for name in ("ape/1.png", "ape/2.png", "unlabelled/1.png", "unlabelled/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(len(name), (8, 8)).save(tmp_path / name)
    domain = ImageDomain(VisionConfig(data=str(tmp_path), batch_size=2, validation_share=0.5), 0)
    assert set(domain.evaluate(None)) == {"uniformity", "effective_rank"}
