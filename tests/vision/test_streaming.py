import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import encoded, picture
from test_loader import same, take
from test_shards import sample, write_tar

from contrastive_mm.configuration import parse_run
from contrastive_mm.errors import UserError
from contrastive_mm.runs import evaluate_run, pretrain
from contrastive_mm.vision.data import stream_batches, streaming
from contrastive_mm.vision.data.decoding import Crop
from contrastive_mm.vision.data.loader import CropWorkers
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.data.stream_batches import StreamBatches
from contrastive_mm.vision.data.streaming import open_stream
from contrastive_mm.vision.domain import ImageDomain, VisionConfig

CROPS = [Crop(8), Crop(4, 0.2, 0.6)]
SIZES = [7, 4, 9]
COUNT = sum(SIZES)


def write_tars(folder):
    for shard, size in enumerate(SIZES):
        first = sum(SIZES[:shard])
        members = [member for n in range(first, first + size) for member in sample(5 * n, n % 3)]
        write_tar(folder / f"s-{shard}.tar", members)
    return f"stream:{folder}/s-{{0..2}}.tar"


def write_hub(folder):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for shard, size in enumerate(SIZES):
        numbers = range(sum(SIZES[:shard]), sum(SIZES[:shard]) + size)
        cells = [{"bytes": encoded(5 * n), "path": None} for n in numbers]
        columns = {"image": cells, "label": [n % 3 for n in numbers]}
        built = datasets.Dataset.from_dict(columns, features=kinds)
        built.to_parquet(folder / f"train-{shard}.parquet", batch_size=3)
    return f"stream:hf:{folder}"


@pytest.fixture(params=[write_tars, write_hub], ids=["tar shards", "Hugging Face"])
def data(request, tmp_path):
    return request.param(tmp_path)


def batches_of(data, workers=2, prefetch=2, seed=0, buffer=8, **options):
    return StreamBatches(open_stream(data), 2, CropWorkers(CROPS, workers), seed, prefetch, buffer, **options)


def numbers_in(batches):
    """Which images the batches are of: image n has the grey level 5 n."""
    return [round(float(level) / 5) for batch in batches for level in batch["view_0"].float().mean(dim=(1, 2, 3))]


def test_an_epoch_of_a_stream_holds_each_image_once_with_its_label(data):
    batches = list(iter(batches_of(data)))
    numbers = numbers_in(batches)
    assert sorted(numbers) == sorted(set(numbers))
    assert len(numbers) == COUNT
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [number % 3 for number in numbers]
    assert set(batches[0]) == {"view_0", "view_1", "label"}
    assert batches[0]["view_1"].shape == (2, 3, 4, 4)


def test_images_are_shuffled_within_blocks_and_shards_among_themselves(data):
    batches = batches_of(data)
    epochs = [numbers_in(iter(batches)) for _ in range(8)]
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert all(epoch[:8] != sorted(epoch[:8]) for epoch in epochs)
    bounds = np.cumsum(SIZES)
    assert len({tuple(np.unique(np.searchsorted(bounds, epoch[:7], side="right"))) for epoch in epochs}) > 1


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (3, 5)])
def test_a_stream_does_not_depend_on_the_number_of_threads(data, workers, prefetch):
    assert same(take(batches_of(data), 14), take(batches_of(data, workers, prefetch), 14))
    assert not same(take(batches_of(data), 4), take(batches_of(data, seed=1), 4))


@pytest.mark.parametrize("done", [0, 1, 3, 4, 6, 9, 10, 11, 17])
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(data, tmp_path, done):
    whole = take(batches_of(data), 22)
    killed = batches_of(data, prefetch=3)
    before = take(killed, done) if done else []
    torch.save(killed.state_dict(), tmp_path / "state.pt")
    resumed = batches_of(data, workers=1, prefetch=1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(whole, before + take(resumed, 22 - done))


def test_a_stream_that_is_resumed_with_another_buffer_is_refused(data):
    with pytest.raises(UserError, match=r"block_batches = 4, this run has 2"):
        batches_of(data, buffer=4).load_state_dict(batches_of(data).state_dict())


def test_a_stream_needs_steps(data):
    with pytest.raises(UserError, match="say with --steps how long to train"):
        len(batches_of(data))


def test_a_stream_without_labels_gives_none(tmp_path):
    write_tar(tmp_path / "a.tar", sample(1) + sample(2) + sample(3, 1) + sample(4, 0))
    batches = list(iter(batches_of(f"stream:{tmp_path}/a.tar", buffer=4)))
    assert sum("label" in batch for batch in batches) <= 1


def test_a_broken_image_in_a_stream_is_named_once_and_replaced(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("x.png", encoded(1)[:40]), *sample(5), *sample(10), *sample(15)])
    batches = batches_of(f"stream:{tmp_path}/a.tar")
    numbers = [numbers_in(iter(batches)) for _ in range(2)]
    assert all(set(epoch) == {1, 2, 3} and len(epoch) == 4 for epoch in numbers)
    assert capsys.readouterr().out.count("a.tar/x can't be read") == 1
    with pytest.raises(UserError, match=r"more than --max-broken 0\.0"):
        list(iter(batches_of(f"stream:{tmp_path}/a.tar", max_broken=0.0)))


@pytest.mark.parametrize("end", [600, 1024, 1300, 2048, 2100, 3000])
def test_a_shard_that_is_cut_off_stops_the_stream_by_name(tmp_path, end):
    data = write_tars(tmp_path)
    path = tmp_path / "s-1.tar"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match=r"s-1\.tar can't be read behind sample"):
        list(iter(batches_of(data)))


def test_a_shard_that_is_not_there_stops_the_stream_by_name(tmp_path):
    data = write_tars(tmp_path)
    (tmp_path / "s-1.tar").unlink()
    with pytest.raises(UserError, match=r"s-1\.tar can't be read behind sample 0"):
        list(iter(batches_of(data)))


def test_compressed_shards_can_be_streamed_and_not_indexed(tmp_path):
    write_tar(tmp_path / "a.tar.gz", sample(5) + sample(10), "w:gz")
    assert sorted(numbers_in(iter(batches_of(f"stream:{tmp_path}/a.tar.gz")))) == [1, 2]


def test_a_stream_smaller_than_a_batch_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", sample(1))
    with pytest.raises(UserError, match="fewer than --batch-size 2 images"):
        next(iter(batches_of(f"stream:{tmp_path}/a.tar")))


@pytest.mark.parametrize(
    ("data", "message"),
    [("stream:digits", "a stream is hf:owner/name, or tar shards"), ("stream:hf:./nowhere", "could not be loaded")],
)
def test_what_is_no_stream_is_named(data, message):
    with pytest.raises(UserError, match=message):
        open_stream(data)


def test_a_hugging_face_stream_without_images_names_its_columns(tmp_path):
    pytest.importorskip("datasets")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="has no image column; its columns are text"):
        open_stream(f"stream:hf:{tmp_path}")


def test_the_beginning_of_a_stream_stands_in_for_it_where_images_are_counted(data):
    source = find_images(data)
    assert len(source) == COUNT
    assert source.labels is None
    domain = ImageDomain(VisionConfig(data=data, batch_size=2), 0)
    assert set(domain.evaluate(None)) == {"uniformity", "effective_rank"}
    assert len(domain.embed(None).ids) == COUNT


@pytest.mark.slow
def test_a_run_on_a_stream_trains_for_its_steps_and_is_scored_on_other_data(tmp_path):
    flags = [f"--data={write_tars(tmp_path)}", "--steps=4", "--batch-size=4", "--device=cpu", "--image-size=8"]
    flags.append("--validation-share=0.3")
    config, _ = parse_run("vision", flags)
    assert pretrain(config, tmp_path / "run")["steps"] == 4
    for n in range(8):
        (tmp_path / "other" / str(n % 2)).mkdir(parents=True, exist_ok=True)
        picture(100 * (n % 2) + n).save(tmp_path / "other" / str(n % 2) / f"{n}.png")
    scores = evaluate_run(tmp_path / "run", str(tmp_path / "other"))
    assert "knn_accuracy" in scores["trained encoder"]


@pytest.mark.parametrize(
    ("module", "data", "extra"), [("datasets", "hf:x/y", "hub"), ("webdataset", "a.tar", "stream")]
)
def test_a_stream_whose_library_is_missing_says_what_to_install(monkeypatch, module, data, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'pip install "contrastive_mm\[{extra}\]"'):
        open_stream(f"stream:{data}")


def test_where_only_the_beginning_of_a_stream_is_used_a_note_says_so(tmp_path, monkeypatch, capsys):
    data = write_tars(tmp_path)
    assert len(find_images(data)) == COUNT
    assert not capsys.readouterr().out
    monkeypatch.setattr(streaming, "SAMPLED", 5)
    assert len(find_images(data)) == 5
    assert "first 5 images stand in for it" in capsys.readouterr().out


def test_no_two_batches_of_an_epoch_draw_the_same_crops(data, monkeypatch):
    places, draw = [], stream_batches.crop_draws
    monkeypatch.setattr(stream_batches, "crop_draws", lambda *place: places.append(place[:3]) or draw(*place))
    batches = batches_of(data)
    for _ in range(2):
        numbers_in(iter(batches))
    assert len(places) == len(set(places)) >= 2 * 9
