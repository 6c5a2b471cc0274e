"""Frames from files: what fits is read, what does not is named by file, array and row."""

import zipfile

import numpy as np
import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.rl.domain import ObservationConfig, ObservationDomain
from contrastive_mm.rl.frames import find_frames

SIDE = 32


def pictures(count=12, channels=3, side=SIDE):
    return np.random.default_rng(0).integers(0, 255, (count, side, side, channels), dtype=np.uint8)


def saved(path, **arrays):
    np.savez(path, **{"frames": pictures(), **arrays})
    return str(path)


def with_nan(row, column):
    states = np.zeros((12, 2))
    states[row, column] = np.nan
    return states


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"states": np.zeros(12)}, r"'states' is \(12,\) float64.*states\[:, None\]"),
        ({"states": np.zeros((12, 0))}, r"'states' is \(12, 0\)"),
        ({"states": np.array([["a"]] * 12)}, r"'states' is \(12, 1\) <U1"),
        ({"states": np.zeros((11, 2))}, "'frames' has 12 rows, 'states' has 11"),
        ({"states": with_nan(7, 1)}, "'states' has nan in row 7, column 1"),
        ({"states": np.full((12, 1), 1e200)}, r"'states' has 1e\+200 in row 0, column 0"),
        ({"frames": pictures()[..., 0]}, r"'frames' is \(12, 32, 32\) uint8.*frames\[\.\.\., None\]"),
        ({"frames": pictures().transpose(0, 3, 1, 2)}, r"'frames' is \(12, 3, 32, 32\).*channels come last"),
        ({"frames": pictures(0)}, "with one frame at least"),
        ({"episodes": np.array([0, 0, 0, 0, 2, 2, 2, 2, 1, 1, 1, 1])}, "'episodes' descends in row 8, from 2 to 1"),
        ({"episodes": np.zeros((12, 1), int)}, r"'episodes' is \(12, 1\)"),
        ({"episodes": np.zeros(12)}, r"'episodes' is \(12,\) float64, but \(N,\) integers"),
        ({"episodes": np.zeros(13, int)}, "'frames' has 12 rows, 'episodes' has 13"),
    ],
)
def test_an_array_that_does_not_fit_is_named(tmp_path, arrays, message):
    path = saved(tmp_path / "f.npz", **arrays)
    with pytest.raises(UserError, match=rf"f\.npz.*({message})"):
        find_frames(path, 0, SIDE, 0)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "f.npz"
    np.savez_compressed(path, frames=pictures())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200:300] = b"\xaa" * 100
    np.save(tmp_path / "one.npy", pictures())
    for content in (b"", b"no archive", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"f\.npz can't be read as \.npz"):
            find_frames(str(path), 0, SIDE, 0)
    path.write_bytes((tmp_path / "one.npy").read_bytes())
    with pytest.raises(UserError, match=r"f\.npz holds one array without a name"):
        find_frames(str(path), 0, SIDE, 0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frames.npy", b"")
    with pytest.raises(UserError, match=r"f\.npz: 'frames' is no array"):
        find_frames(str(path), 0, SIDE, 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_is_read_trained_on_and_shown(tmp_path, channels):
    path = saved(tmp_path / "f.npz", frames=pictures(channels=channels, side=40))
    store = find_frames(path, 0, SIDE, 0)
    assert store.frames.shape == (12, channels, SIDE, SIDE)
    domain = ObservationDomain(
        ObservationConfig(data=path, frame_size=SIDE, crop_size=32, batch_size=4, validation_share=0.5), 0
    )
    batch = next(iter(domain.train_batches()))
    assert domain.build_encoder()(domain.make_views(batch).inputs[0]).shape == (4, 128)
    assert domain.embed(None).previews[0].shape == (SIDE, SIDE, 3)


def test_channels_are_resized_each_by_itself(tmp_path):
    frames = pictures(channels=4, side=40)
    store = find_frames(saved(tmp_path / "f.npz", frames=frames), 0, 20, 0)
    halves = frames.reshape(12, 20, 2, 20, 2, 4).astype(float).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    assert np.abs(store.frames.numpy() - halves).max() <= 1, "a fourth channel is not opacity"


def test_the_case_of_the_suffix_does_not_matter(tmp_path):
    saved(tmp_path / "f.npz")
    (tmp_path / "f.npz").rename(tmp_path / "f.NPZ")
    assert len(find_frames(str(tmp_path / "f.NPZ"), 0, SIDE, 0)) == 12


def test_integer_states_and_episodes_are_read(tmp_path):
    arrays = {"states": np.arange(24).reshape(12, 2), "episodes": np.repeat([3, 3, 7], 4).astype(np.uint8)}
    store = find_frames(saved(tmp_path / "f.npz", **arrays), 0, SIDE, 0)
    assert store.states.dtype == torch.float32
    assert store.states.tolist() == arrays["states"].tolist()
    assert store.episodes.tolist() == [3] * 8 + [7] * 4
