import numpy as np
import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.rl.crops import RandomCrops, centre_crop, cut
from contrastive_mm.rl.domain import ObservationConfig, ObservationDomain
from contrastive_mm.rl.encoders import PixelEncoder
from contrastive_mm.rl.frames import FrameStore, collect_frames, find_frames


def places(count=1, side=8):
    """Frames whose pixel values tell where they are."""
    square = (torch.arange(side)[:, None] * 10 + torch.arange(side)).to(torch.uint8)
    return square.expand(count, 2, side, side)


def test_cut_takes_the_square_that_begins_there():
    frames = places(3)
    crops = cut(frames, torch.tensor([0, 2, 5]), torch.tensor([1, 5, 0]), 3)
    for crop, frame, top, left in zip(crops, frames, [0, 2, 5], [1, 5, 0], strict=True):
        assert torch.equal(crop, frame[:, top : top + 3, left : left + 3])


def test_every_offset_is_reached_and_channels_are_cut_alike():
    crops = RandomCrops(5)({"observation": places(2000)}).inputs[0]
    assert torch.equal(crops[:, 0], crops[:, 1]), "one place for the whole stack"
    corners = ((crops[:, 0, 0, 0] + 0.5) * 255).round().int()
    tops, lefts = corners // 10, corners % 10
    assert set(tops.tolist()) == set(lefts.tolist()) == {0, 1, 2, 3}, "the last offset too"
    assert len(set(corners.tolist())) == 16, "rows and columns are drawn apart"


def test_two_crops_of_one_sample_differ_and_the_state_goes_on():
    views = RandomCrops(5, seed=1)
    batch = {"observation": places(50), "index": torch.arange(50)}
    made = views(batch)
    assert not torch.equal(made.inputs[0], made.inputs[1])
    assert made.sample_ids is batch["index"]
    state, other = views.state_dict(), RandomCrops(5, seed=9)
    other.load_state_dict(state)
    assert torch.equal(views(batch).inputs[0], other(batch).inputs[0])


def test_centre_crop_is_the_middle():
    crop = centre_crop(places(), 4)
    assert torch.equal(((crop + 0.5) * 255).round().byte(), places()[:, :, 2:6, 2:6])


def test_a_crop_larger_than_the_frame_is_refused():
    with pytest.raises(UserError, match="Crops of 9 pixels don't fit into frames of 8"):
        RandomCrops(9)({"observation": places()})
    with pytest.raises(UserError, match="--crop-size = 60"):
        ObservationConfig(crop_size=60, frame_size=48)


def test_stacks_never_reach_into_the_episode_before():
    frames = torch.arange(6).to(torch.uint8)[:, None, None, None].expand(6, 1, 2, 2)
    store = FrameStore(frames, torch.tensor([0, 0, 0, 1, 1, 1]))
    stacks = store.stacked(torch.tensor([0, 1, 2, 3, 5]), 3)[:, :, 0, 0]
    assert stacks.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 4, 5]]


def test_collected_frames_show_the_states_beside_them():
    store = collect_frames("CartPole-v1", 60, 64, seed=1)
    assert store.frames.shape == (60, 3, 64, 64)
    assert store.state_names == ["position", "velocity", "angle", "angular_velocity"]
    starts = (store.episodes.diff() == 1).nonzero().flatten() + 1
    assert len(starts) > 0
    assert store.states[starts].abs().max() < 0.06, "an episode begins near the middle"
    within = torch.ones(60, dtype=torch.bool)
    within[[0, *starts.tolist()]] = False
    moved = (store.states[within, 0] - store.states[within.nonzero().flatten() - 1, 0]).abs()
    assert moved.max() < 0.06, "positions go on from frame to frame"
    assert collect_frames("CartPole-v1", 60, 64, seed=1) is store, "rendered once for all seeds of a run"


def test_frames_from_a_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (40, 20, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "f.npz", frames=frames, states=np.random.rand(40, 2), episodes=np.arange(40) // 10)
    store = find_frames(str(tmp_path / "f.npz"), 0, 20, 0)
    assert store.frames.shape == (40, 3, 20, 20)
    assert store.state_names == ["state_0", "state_1"]
    config = ObservationConfig(data=str(tmp_path / "f.npz"), frame_size=36, crop_size=32)
    domain = ObservationDomain(config, 0)
    assert set(domain.evaluate(domain.build_encoder())) == {"r2_state_0", "r2_state_1"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros(3)}, "needs an array 'frames'.*it has pixels"),
        ({"frames": np.zeros((4, 8, 8, 3))}, "uint8"),
        ({"frames": np.zeros((4, 8, 8, 3), np.uint8), "states": np.zeros((3, 1))}, "4 rows, 'states' has 3"),
        ({"frames": np.array([{}], dtype=object)}, "without pickled objects"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(UserError, match=message):
        find_frames(str(tmp_path / "f.npz"), 0, 8, 0)


def test_files_and_environments_that_are_not_there():
    with pytest.raises(UserError, match=r"nowhere\.npz does not exist"):
        find_frames("nowhere.npz", 1, 8, 0)
    with pytest.raises(UserError, match="--data is missing"):
        find_frames("", 1, 8, 0)


@pytest.mark.parametrize(("size", "stack"), [(44, 3), (32, 1), (84, 9)])
def test_encoder_gives_what_it_declares(size, stack):
    encoder = PixelEncoder(3 * stack, size, 32)
    assert encoder(torch.rand(2, 3 * stack, size, size) - 0.5).shape == (2, 32)
