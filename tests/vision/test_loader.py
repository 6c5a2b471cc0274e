import threading

import numpy as np
import pytest
import torch
from pictures import break_file, picture
from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.training.accelerator import current_device
from contrastive_mm.vision.data.decoding import Crop
from contrastive_mm.vision.data.images import ImageSet
from contrastive_mm.vision.data.loader import CropBatches, CropWorkers, crop_draws, single_threaded_pool
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.domain import ImageDomain, VisionConfig
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews

CROPS = [Crop(16), Crop(16), Crop(8, 0.05, 0.3)]


@pytest.fixture
def photos(tmp_path):
    """Twelve JPEGs of several sizes, each of its own grey level with noise on it."""
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = 20 * i + random.integers(0, 8, (30 + 3 * i, 60 - 2 * i, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02}.jpg", quality=95)
    return tmp_path


def batches_of(folder, workers=2, prefetch=2, seed=0, max_broken=0.0, crops=CROPS):
    images = ImageSet(find_images(str(folder)), 16, max_broken, memory_limit=0)
    return CropBatches(
        len(images),
        4,
        CropWorkers(crops, workers),
        images.open,
        lambda indices: {"index": indices},
        images.note_broken,
        seed,
        prefetch,
    )


def take(batches, count):
    """So many batches, epoch after epoch, as a trainer takes them; what is left of the last epoch stays."""
    taken = []
    while len(taken) < count:
        for batch in batches:
            taken.append({name: value.clone() for name, value in batch.items()})
            if len(taken) == count:
                break
    return taken


def same(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def test_a_batch_holds_a_crop_for_each_view_and_the_index(photos):
    batch = take(batches_of(photos), 1)[0]
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "view_0": ((4, 3, 16, 16), torch.uint8),
        "view_1": ((4, 3, 16, 16), torch.uint8),
        "view_2": ((4, 3, 8, 8), torch.uint8),
        "index": ((4,), torch.int64),
    }
    for name in ("view_0", "view_1", "view_2"):
        levels = batch[name].float().mean(dim=(1, 2, 3)) / 20
        assert levels.floor().int().tolist() == batch["index"].tolist(), "pixels belong to the index"


def test_every_image_comes_once_an_epoch_and_in_another_order_in_the_next(photos):
    taken = [batch["index"].tolist() for batch in take(batches_of(photos), 6)]
    first, second = np.concatenate(taken[:3]).tolist(), np.concatenate(taken[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (1, 3), (2, 1), (5, 7)])
def test_batches_do_not_depend_on_how_many_threads_make_them_how_far_ahead(photos, workers, prefetch):
    assert same(take(batches_of(photos, 1, 0), 6), take(batches_of(photos, workers, prefetch), 6))


def test_another_seed_makes_other_crops_and_each_view_and_epoch_has_its_own(photos):
    one, other = take(batches_of(photos), 6), take(batches_of(photos, seed=1), 6)
    assert not same(one, other)
    everything = [batch[name] for batch in one for name in ("view_0", "view_1")]
    rows = torch.cat(everything).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4])
def test_a_resumed_run_gets_the_batches_and_crops_of_an_uninterrupted_one(photos, done):
    whole = take(batches_of(photos), 6)
    killed = batches_of(photos, workers=1, prefetch=3)
    before = take(killed, done) if done else []
    resumed = batches_of(photos, workers=3, prefetch=1)
    resumed.load_state_dict(killed.state_dict())
    assert same(whole, before + take(resumed, 6 - done))


def test_an_image_that_breaks_later_is_named_once_and_replaced_by_the_next(photos, capsys):
    whole = take(batches_of(photos), 6)
    batches = batches_of(photos, max_broken=0.1)
    break_file(photos / "05.jpg")
    taken = take(batches, 6)
    for before, after in zip(whole, taken, strict=True):
        assert after["index"].tolist() == [6 if index == 5 else index for index in before["index"].tolist()]
        kept = before["index"] != 5
        assert torch.equal(before["view_0"][kept], after["view_0"][kept])
        levels = (after["view_0"].float().mean(dim=(1, 2, 3)) / 20).floor().int()
        assert torch.equal(levels.long(), after["index"])
    assert capsys.readouterr().out.count("05.jpg can't be read") == 1


def test_more_broken_images_than_allowed_stop_the_run_by_name(photos):
    batches = batches_of(photos, max_broken=0.1)
    break_file(photos / "05.jpg")
    (photos / "07.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 12 images can't be read, more than --max-broken 0.1.*--resume"):
        take(batches, 3)


def test_where_nothing_can_be_read_any_more_the_run_stops(photos):
    batches = batches_of(photos, max_broken=1.0)
    for file in photos.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="Not one of 12 images in a row can be read"):
        take(batches, 1)


def test_no_more_than_the_stated_batches_are_made_ahead(photos):
    images = ImageSet(find_images(str(photos)), 16, 0.0, memory_limit=0)
    opened = []
    lock = threading.Lock()

    def count(index):
        with lock:
            opened.append(index)
        return images.open(index)

    batches = CropBatches(12, 2, CropWorkers(CROPS, 2), count, lambda i: {"index": i}, images.note_broken, prefetch=2)
    iterator = iter(batches)
    next(iterator)
    assert len(opened) <= 2 * (1 + 2)
    iterator.close()


def test_an_error_in_a_thread_leaves_nothing_hanging(photos):
    images = ImageSet(find_images(str(photos)), 16, 0.0, memory_limit=0)

    def stop(index, error):
        raise UserError(f"stopped at {index}")

    batches = CropBatches(12, 4, CropWorkers(CROPS, 2), lambda i: images.open(99), lambda i: {}, stop, prefetch=4)
    with pytest.raises(UserError, match="stopped at"):
        next(iter(batches))


def test_decoding_threads_compute_alone_and_the_others_keep_their_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pool = single_threaded_pool(2)
        together = threading.Barrier(2)
        assert list(pool.map(lambda _: (together.wait(), torch.get_num_threads())[1], range(2))) == [1, 1]
        assert torch.get_num_threads() == 3
        seen = []
        other = threading.Thread(target=lambda: seen.append(torch.ones(4).sum() * 0 + torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_draws_are_uniform_and_differ_by_seed_epoch_and_batch():
    draws = [crop_draws(*place, 50, 2) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert all(array.min() >= 0 and array.max() < 1 and abs(array.mean() - 0.5) < 0.02 for array in draws)
    assert all(abs(np.corrcoef(draws[0].ravel(), other.ravel())[0, 1]) < 0.1 for other in draws[1:])


def test_views_take_crops_as_they_are_and_mirror_them(photos):
    config = ImageViewConfig(flip=1.0, jitter=0.0, greyscale=0.0)
    make_views = ImageViews(16, config)
    assert make_views.crops == [Crop(16, 0.08), Crop(16, 0.08)]
    batch = take(batches_of(photos, crops=make_views.crops), 1)[0]
    views = make_views(batch)
    for name, view in zip(("view_0", "view_1"), views.inputs, strict=True):
        assert torch.equal(view, batch[name].float().flip(3) / 255 * 2 - 1)


def test_large_images_stay_on_disk_and_small_ones_in_memory(tmp_path):
    for i in range(4):
        picture(i, (120, 100)).save(tmp_path / f"{i}.png")
    options = {"data": str(tmp_path), "batch_size": 2}
    assert not ImageDomain(VisionConfig(**options), 0).images.in_memory
    assert ImageDomain(VisionConfig(**options, storage="memory"), 0).images.in_memory
    assert ImageDomain(VisionConfig(**options, image_size=16), 0).images.in_memory
    assert not ImageDomain(VisionConfig(**options, image_size=16, storage="disk"), 0).images.in_memory


def test_images_in_memory_move_to_the_device_once(tmp_path, monkeypatch):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    domain = ImageDomain(VisionConfig(data=str(tmp_path), batch_size=2), 0)
    monkeypatch.setattr("contrastive_mm.vision.domain.current_device", lambda: torch.device("meta"))
    moves = []
    pixels_on = domain.images.pixels_on
    monkeypatch.setattr(domain.images, "pixels_on", lambda device: (moves.append(device), pixels_on(device))[1])
    batches = take(domain.train_batches(), 4)
    assert {batch["image"].device.type for batch in batches} == {"meta"}
    assert len(moves) == 1


def test_without_an_accelerator_the_device_is_the_cpu(monkeypatch):
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert current_device() == torch.device("cpu")


@pytest.mark.parametrize("options", [{"workers": 0}, {"prefetch": -1}])
def test_workers_and_prefetch_are_checked(options):
    with pytest.raises(UserError, match=f"--{next(iter(options))}"):
        VisionConfig(**options)


def test_small_crops_come_from_the_loader_at_their_size_and_scale(photos):
    make_views = ImageViews(16, ImageViewConfig(augmentation="swav", small_crops=2, small_size=8))
    assert make_views.crops == [Crop(16, 0.14, 1.0)] * 2 + [Crop(8, 0.05, 0.14)] * 2
    views = make_views(take(batches_of(photos, crops=make_views.crops), 1)[0])
    assert [tuple(view.shape) for view in views.inputs] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2
    assert views.num_global == 2
