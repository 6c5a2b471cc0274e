"""What the observation domain learns from, what it is scored on, and what it refuses before training."""

import gymnasium
import numpy as np
import pytest
import torch

import contrastive_mm.rl.domain as observation_domain
from contrastive_mm.errors import UserError
from contrastive_mm.rl.domain import ObservationConfig, ObservationDomain
from contrastive_mm.rl.frames import collect_frames

COUNT, SIDE = 40, 32


def numbered(count=COUNT):
    """Frames whose pixels are the number of their row."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, SIDE, SIDE, 3))


def make_domain(tmp_path, frames=None, share=0.25, stack=3, **arrays):
    np.savez(tmp_path / "f.npz", frames=numbered() if frames is None else frames, **arrays)
    config = ObservationConfig(
        data=str(tmp_path / "f.npz"),
        frame_size=SIDE,
        crop_size=SIDE,
        batch_size=5,
        frame_stack=stack,
        validation_share=share,
    )
    return ObservationDomain(config, 0)


class Recorder(torch.nn.Module):
    """An encoder that says which rows are in a stack: the numbers that their pixels are."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, observations):
        return ((observations[:, ::3, 0, 0] + 0.5) * 255).round()


def test_an_epoch_holds_training_rows_only(tmp_path):
    domain = make_domain(tmp_path)
    seen = []
    for batch in domain.train_batches():
        assert batch["index"].tolist() == batch["observation"][:, -1, 0, 0].tolist()
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(30))
    assert not set(seen) & set(domain.validation_rows.tolist())


@pytest.mark.parametrize("stack", [1, 3, 4])
@pytest.mark.parametrize("boundary", [25, 29, 30, 31, 35])
def test_no_validation_stack_holds_a_frame_that_was_trained_on(tmp_path, stack, boundary):
    domain = make_domain(tmp_path, stack=stack, episodes=(np.arange(COUNT) >= boundary).astype(int))
    trained = {int(value) for batch in domain.train_batches() for value in batch["observation"].unique()}
    shown = {int(value) for value in domain.store.stacked(domain.validation_rows, stack).unique()}
    assert not trained & shown
    # Only what must go is gone: an episode that begins behind the cut keeps its first frames.
    lost = range(30, min(30 + stack - 1, boundary)) if boundary > 29 else range(30, 30 + stack - 1)
    assert domain.validation_rows.tolist() == [row for row in range(30, COUNT) if row not in lost]


def test_scores_are_learned_from_training_rows_and_measured_on_validation_rows(tmp_path, monkeypatch):
    states = np.random.default_rng(0).normal(size=(COUNT, 2)).astype(np.float32)
    domain = make_domain(tmp_path, states=states)
    calls = []
    monkeypatch.setattr(observation_domain, "ridge_r2", lambda *given: calls.append(given) or [0.1, 0.2])
    assert domain.evaluate(Recorder()) == {"r2_state_0": 0.1, "r2_state_1": 0.2}
    ((train, train_states, test, test_states),) = calls
    assert train[:, -1].tolist() == list(range(30))
    assert test[:, -1].tolist() == list(range(32, COUNT))
    assert torch.equal(train_states, torch.from_numpy(states[:30]))
    assert torch.equal(test_states, torch.from_numpy(states[32:]))


class Counter(gymnasium.Env):
    """Shows a number and observes the same; an episode has seven steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(0, 255, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    number = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number += 11
        self.steps = 0
        return np.array([self.number], np.float32), {}

    def step(self, action):
        self.number += 1
        self.steps += 1
        return np.array([self.number], np.float32), 0.0, self.steps == 7, False, {}

    def render(self):
        return np.full((SIDE, SIDE, 3), self.number, np.uint8)


def test_states_belong_to_the_frames_that_show_them():
    gymnasium.register("Counter-v0", Counter)
    try:
        store = collect_frames("Counter-v0", COUNT, SIDE)
    finally:
        del gymnasium.registry["Counter-v0"]
    assert store.frames[:, 0, 0, 0].tolist() == store.states[:, 0].tolist()
    assert store.episodes.tolist() == [row // 7 for row in range(COUNT)]
    assert store.states[:2, 0].tolist() == [11, 12], "the first frame is the reset's"
    assert store.states[7, 0] == 29, "the next episode's first frame too"


def test_a_share_too_small_to_validate_on_is_refused_before_training(tmp_path):
    states = np.random.default_rng(0).normal(size=(COUNT, 1))
    for share in (0.001, 0.1):  # no frame at all; four, of which two have a trained frame in their stack
        domain = make_domain(tmp_path, share=share, stack=3 if share < 0.01 else 5, states=states)
        assert len(domain.validation_rows) == 0
        message = rf"--validation-share = {share} of 40 frames leaves \d+ observations to train on and 0 to validate"
        with pytest.raises(UserError, match=message):
            domain.train_batches()
        with pytest.raises(UserError, match=message):
            domain.evaluate(None)
        assert len(domain.embed(None).ids) == COUNT, "all are embedded where none is held back"


def test_a_single_frame_can_be_embedded_and_has_no_score(tmp_path):
    domain = make_domain(tmp_path, frames=numbered(1))
    assert domain.embed(None, everything=True).ids == ["frame 0"]
    with pytest.raises(UserError, match="1 samples have no spread"):
        domain.evaluate(None)


def test_a_state_that_never_varies_is_named_once_and_left_out(tmp_path, capsys):
    rows = np.arange(COUNT, dtype=float)
    states = np.stack([rows % 7, np.full(COUNT, 3.0), np.minimum(rows, 20)], axis=1)
    domain = make_domain(tmp_path, states=states)
    scores = [domain.evaluate(encoder) for encoder in (None, Recorder())]
    assert [set(score) for score in scores] == [{"r2_state_0"}] * 2
    said = capsys.readouterr().err
    assert said.count("No score for state_1, state_2: never varies") == 1
    still = make_domain(tmp_path, states=states[:, 1:2])
    assert set(still.evaluate(None)) == {"uniformity", "effective_rank"}


def test_every_state_has_its_own_score(tmp_path):
    noise = np.random.default_rng(0).normal(size=COUNT)
    shuffled = np.random.default_rng(1).permutation(COUNT).astype(np.uint8)
    frames = np.broadcast_to(shuffled[:, None, None, None], (COUNT, SIDE, SIDE, 3))
    states = np.stack([noise, np.zeros(COUNT), shuffled], axis=1)
    domain = make_domain(tmp_path, frames=frames, states=states, episodes=np.arange(COUNT))
    scores = domain.evaluate(Recorder())
    assert set(scores) == {"r2_state_0", "r2_state_2"}
    assert scores["r2_state_2"] > 0.99
    assert scores["r2_state_0"] < 0.5
