"""The rl domain: observations in, encoders for agents out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from contrastive_mm.batches import ShuffledBatches
from contrastive_mm.domain import Embeddings
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import extract_features, ridge_r2, unlabelled_scores
from contrastive_mm.rl.crops import RandomCrops, centre_crop
from contrastive_mm.rl.encoders import PixelEncoder
from contrastive_mm.rl.frames import FrameStore, find_frames

EVALUATION_BATCH = 256
RAW_SIDE = 32
UNLABELLED_ROWS = 2048


@dataclass(frozen=True)
class ObservationConfig:
    """Observations of an environment."""

    data: str = ""
    """Gymnasium environment, played by a random policy, or an .npz file with frames (and states, episodes)."""
    frames: int = 3000
    """Frames to collect from an environment."""
    frame_size: int = 48
    """Side to which frames are brought, in pixels."""
    crop_size: int = 44
    """Side of the random crops, in pixels."""
    frame_stack: int = 3
    """Frames in one observation, so that motion can be seen."""
    feature_dim: int = 128
    """Dimensions of the encoder's features."""
    batch_size: int = 128
    """Observations a step; each has batch_size - 1 negatives."""
    validation_share: float = 0.25
    """Last part of the frames that is held back from training, for `evaluate`; where an episode crosses into it,
    observations with a training frame in their stack are left out."""
    data_seed: int = 0
    """Of the environment and its random policy. It is not the run's seed: runs compare on the same frames."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise UserError(f"--validation-share = {self.validation_share}; it must lie between 0 and 1.")
        if not 32 <= self.crop_size <= self.frame_size:
            raise UserError(
                f"--crop-size = {self.crop_size}; it must lie between 32 and --frame-size = {self.frame_size}."
            )
        for name in ("frames", "frame_stack", "feature_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} = {getattr(self, name)}; it must be at least 1.")


class ObservationDomain:
    """Pretrains observation encoders and scores how well the true state is read out of frozen features."""

    config_class: ClassVar[type[ObservationConfig]] = ObservationConfig
    default_method: ClassVar[str] = "curl"

    def __init__(self, config: ObservationConfig, seed: int, saved: Path | None = None) -> None:
        self.config = config
        self.seed = seed
        self._said_still = False
        self.store = find_frames(config.data, config.frames, config.frame_size, config.data_seed)
        self.train_rows, self.validation_rows = self._split()
        self.make_views = RandomCrops(config.crop_size, seed)

    def _split(self) -> tuple[Tensor, Tensor]:
        count = len(self.store)
        kept = count - round(self.config.validation_share * count)
        later = torch.arange(kept, count)
        # No validation observation holds a frame that was trained on: the first stacks after the cut would.
        return torch.arange(kept), later[self.store.oldest(later, self.config.frame_stack) >= kept]

    def build_encoder(self) -> nn.Module:
        """A convolutional encoder with random weights."""
        channels = self.store.frames.shape[1] * self.config.frame_stack
        return PixelEncoder(channels, self.config.crop_size, self.config.feature_dim)

    def train_batches(self) -> ShuffledBatches:
        """Batches of ``observation`` (B, C, H, W) uint8 and ``index`` (B,), its number among those trained on.

        Raises:
            UserError: nothing is left to validate on, which would come out only after training.
        """
        if len(self.validation_rows) < 2:
            raise self._too_few()
        return ShuffledBatches(len(self.train_rows), self.config.batch_size, self._load, self.seed)

    def _load(self, indices: Tensor) -> dict[str, Tensor]:
        rows = self.train_rows[indices]
        return {"observation": self.store.stacked(rows, self.config.frame_stack), "index": indices}

    def evaluate(self, encoder: nn.Module | None) -> dict[str, float]:
        """Scores on the validation part; raw pixels (at most 32x32, all stacked frames) for None.

        With states: ``r2_<name>``, the share of each state variable's variance that a ridge regression from
        200 frames' frozen features explains (mean of 10 draws). A state that never varies in the validation part
        is left out, and named once. Without states, or where none varies: ``uniformity`` and ``effective_rank``
        of up to 2,048 training observations.

        Raises:
            UserError: there are states, but fewer than two frames to learn from or to validate on.
        """
        states, names = self.store.states, self.store.state_names
        if states is None or names is None:
            return unlabelled_scores(self._features(encoder, self.train_rows[:UNLABELLED_ROWS]))
        if min(len(self.train_rows), len(self.validation_rows)) < 2:
            raise self._too_few()
        scored = self._scored_states(states, names)
        if len(scored) == 0:
            return unlabelled_scores(self._features(encoder, self.train_rows[:UNLABELLED_ROWS]))
        train, test = (self._features(encoder, rows) for rows in (self.train_rows, self.validation_rows))
        train_states, test_states = (states[rows][:, scored] for rows in (self.train_rows, self.validation_rows))
        scores = ridge_r2(train, train_states, test, test_states)
        return {f"r2_{names[column]}": score for column, score in zip(scored, scores, strict=True)}

    def _scored_states(self, states: Tensor, names: list[str]) -> list[int]:
        """Columns that vary in the validation part: R squared is a share of variance."""
        values = states[self.validation_rows]
        varies = (values.amax(0) > values.amin(0)).tolist()
        still = [name for name, moves in zip(names, varies, strict=True) if not moves]
        if still and not self._said_still:
            tqdm.write(f"No score for {', '.join(still)}: never varies in the validation part.", file=sys.stderr)
            self._said_still = True
        return [column for column, moves in enumerate(varies) if moves]

    def _too_few(self) -> UserError:
        return UserError(
            f"--validation-share = {self.config.validation_share} of {len(self.store)} frames leaves "
            f"{len(self.train_rows)} observations to train on and {len(self.validation_rows)} to validate on, of "
            "--frame-stack frames each that were not trained on; at least 2 of each are needed. Change the share, "
            "or give more frames."
        )

    def embed(self, encoder: nn.Module | None, everything: bool = False) -> Embeddings:
        """Embed the validation part (all frames where nothing is held back), or everything; raw pixels for None."""
        held_back = len(self.validation_rows) > 0 and not everything
        rows = self.validation_rows if held_back else torch.arange(len(self.store))
        return Embeddings(
            features=self._features(encoder, rows),
            ids=[f"frame {row}" for row in rows.tolist()],
            labels=None if self.store.states is None else _colour_by(self.store)[rows].tolist(),
            previews=_Pictures(self.store, rows),
        )

    def save(self, folder: Path) -> None:
        """Nothing beyond the options is needed."""

    def _features(self, encoder: nn.Module | None, rows: Tensor) -> Tensor:
        stacks = (self.store.stacked(part, self.config.frame_stack) for part in rows.split(EVALUATION_BATCH))
        if encoder is not None:
            return extract_features(encoder, (centre_crop(stack, self.config.crop_size) for stack in stacks))
        side = min(RAW_SIDE, self.config.frame_size)
        small = (nn.functional.adaptive_avg_pool2d(stack.float() / 255, side) for stack in stacks)
        return torch.cat([picture.flatten(1) for picture in small])


def _colour_by(store: FrameStore) -> Tensor:
    """The state variable that colours the pictures: an angle where one is named, else the first."""
    assert store.states is not None
    names = store.state_names or []
    return store.states[:, names.index("angle") if "angle" in names else 0]


class _Pictures(Sequence[Any]):
    """Frames to look at."""

    def __init__(self, store: FrameStore, rows: Tensor) -> None:
        self.store = store
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        frame = self.store.frames[self.rows[index]]
        colours = frame[:3] if len(frame) >= 3 else frame[:1].expand(3, -1, -1)
        return colours.permute(1, 2, 0).numpy()
