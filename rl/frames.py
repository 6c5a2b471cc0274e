"""Frames to learn from: rendered by a Gymnasium environment, or read from a file."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.progress import progress

STATE_NAMES = {"CartPole": ["position", "velocity", "angle", "angular_velocity"]}
ARCHIVE_FAULTS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class FrameStore:
    """Frames in the order in which they were seen, each kept once; stacks are put together on reading.

    Attributes:
        frames: (N, C, H, W) uint8.
        episodes: (N,) number of the episode that each frame belongs to, not descending.
        states: (N, S) true state behind each frame, or None.
        state_names: name of each of the S.
    """

    frames: UInt8[Tensor, "frames channels height width"]
    episodes: Int[Tensor, " frames"]
    states: Float[Tensor, "frames states"] | None = None
    state_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def stacked(self, rows: Int[Tensor, " batch"], stack: int) -> UInt8[Tensor, "batch stacked_channels height width"]:
        """Observations of ``stack`` frames, oldest first, ending at these rows.

        At the start of an episode its first frame is repeated, as Gymnasium's frame stack does.
        """
        ages = torch.arange(stack - 1, -1, -1)
        index = (rows[:, None] - ages).maximum(self.oldest(rows, stack)[:, None])
        return self.frames[index].flatten(1, 2)

    def oldest(self, rows: Int[Tensor, " batch"], stack: int) -> Int[Tensor, " batch"]:
        """The oldest frame in the observation of ``stack`` frames that ends at each of these rows."""
        first = torch.searchsorted(self.episodes, self.episodes[rows])
        return (rows - stack + 1).maximum(first)


def find_frames(data: str, count: int, size: int, seed: int) -> FrameStore:
    """Frames by environment or by file.

    Args:
        data: a Gymnasium environment's id, played by a random policy; or an ``.npz`` file with ``frames``
            (N, H, W, C) uint8 (C = 1 for grey ones) and, where known, ``states`` (N, S), finite numbers, and
            ``episodes`` (N,), integers that never descend.
        count: frames to collect from an environment.
        size: side in pixels to which frames are brought.
        seed: of the environment and its policy.

    Raises:
        UserError: nothing is there, it can't be rendered, or an array does not fit (file, array and row are named).
    """
    if not data:
        raise UserError("--data is missing: give a Gymnasium environment such as CartPole-v1, or an .npz file.")
    path = Path(data).expanduser()
    if path.suffix.lower() == ".npz":
        return read_frames(path, size)
    return collect_frames(data, count, size, seed)


def _resize(frame: NDArray[Any], size: int) -> NDArray[Any]:
    if frame.shape[:2] == (size, size):
        return frame
    if frame.shape[2] != 3:  # Pillow knows no pictures of other numbers of channels, or takes the fourth for opacity
        return np.stack([_resize_channel(frame[:, :, channel], size) for channel in range(frame.shape[2])], axis=2)
    return _resize_channel(frame, size)


def _resize_channel(frame: NDArray[Any], size: int) -> NDArray[Any]:
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BOX))


@lru_cache(maxsize=4)  # runs with several seeds learn from the same frames
def collect_frames(environment: str, count: int, size: int, seed: int = 0) -> FrameStore:
    """Play a random policy and keep what is rendered.

    Where the environment's observation is a vector, it is kept as the state behind the frame.

    Args:
        environment: a Gymnasium id; it must render to ``rgb_array``.
        count: frames.
        size: side in pixels to which frames are brought (the picture is squeezed to a square).
        seed: of the environment and the policy.

    Raises:
        UserError: no such environment, or it can't render.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a screen
    import gymnasium

    try:
        env = gymnasium.make(environment, render_mode="rgb_array")
    except gymnasium.error.NameNotFound as error:
        raise unknown_name("environment", environment, gymnasium.registry) from error
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise UserError(f"Environment {environment!r} can't be made for rendering: {error}") from error
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    vectors = isinstance(observation, np.ndarray) and observation.ndim == 1
    frames = np.empty((count, 3, size, size), np.uint8)
    states, episodes, episode = [], [], 0
    for row in progress(range(count), desc="render", unit="frame"):
        picture = env.render()
        if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(f"Environment {environment!r} renders no picture of (H, W, 3).")
        frames[row] = _resize(picture, size).transpose(2, 0, 1)
        states.append(observation)
        episodes.append(episode)
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            observation, _ = env.reset()
            episode += 1
    env.close()
    known = _checked_states(np.stack(states), f"environment {environment!r}", count) if vectors else None
    names = None
    if known is not None:
        kind = environment.split("/")[-1].split("-")[0]
        names = STATE_NAMES.get(kind, [f"state_{number}" for number in range(known.shape[1])])
    return FrameStore(torch.from_numpy(frames), torch.tensor(episodes), known, names)


def read_frames(path: Path, size: int) -> FrameStore:
    """Frames of an ``.npz`` file, as ``find_frames`` describes it.

    Raises:
        UserError: there is no such file, it can't be read, or an array does not fit; the array and row are named.
    """
    arrays = _read_arrays(path)
    frames = _checked_frames(arrays, path)
    count = len(frames)
    if frames.shape[1:3] != (size, size):
        frames = np.stack([_resize(frame, size) for frame in frames])
    states = _checked_states(arrays["states"], str(path), count) if "states" in arrays else None
    return FrameStore(
        torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),
        _checked_episodes(arrays["episodes"], path, count) if "episodes" in arrays else torch.zeros(count).long(),
        states,
        None if states is None else [f"state_{number}" for number in range(states.shape[1])],
    )


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        with path.open("rb") as file:  # opened here: numpy leaves it open where the archive is broken
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise UserError(f"{path} holds one array without a name; save it with np.savez(path, frames=...).")
            arrays = {name: content[name] for name in content.files}
    except ARCHIVE_FAULTS as error:
        raise UserError(f"{path} can't be read as .npz without pickled objects: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy hands on the bytes of what is no array
            raise UserError(f"{path}: {name!r} is no array; save the file with np.savez.")
    return arrays


def _checked_frames(arrays: dict[str, NDArray[Any]], path: Path) -> NDArray[Any]:
    frames = arrays.get("frames")
    if frames is None:
        raise UserError(f"{path} needs an array 'frames' of (N, H, W, C) uint8; it has {', '.join(arrays)}.")
    has = f"{path}: 'frames' is {frames.shape} {frames.dtype}, but (N, H, W, C) uint8 is needed"
    if frames.ndim == 3:
        raise UserError(f"{has}; give grey frames an axis of one channel: frames[..., None].")
    if frames.ndim != 4 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise UserError(f"{has}, with one frame at least.")
    if frames.shape[3] > min(frames.shape[1:3]):
        raise UserError(f"{has}; the channels come last: frames.transpose(0, 2, 3, 1).")
    return frames


def _check_length(name: str, array: NDArray[Any], source: str, count: int) -> None:
    if len(array) != count:
        raise UserError(f"{source}: 'frames' has {count} rows, {name!r} has {len(array)}.")


def _checked_states(states: NDArray[Any], source: str, count: int) -> Float[Tensor, "frames states"]:
    if states.ndim != 2 or states.shape[1] == 0 or states.dtype.kind not in "biuf":
        hint = "; for one number a frame: states[:, None]" if states.ndim == 1 else ""
        raise UserError(f"{source}: 'states' is {states.shape} {states.dtype}, but (N, S) numbers are needed{hint}.")
    _check_length("states", states, source, count)
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is named below
        single = states.astype(np.float32)
    wrong = np.argwhere(~np.isfinite(single))
    if len(wrong):
        row, column = wrong[0]
        raise UserError(
            f"{source}: 'states' has {states[row, column]} in row {row}, column {column}; "
            "finite numbers within float32's range are needed."
        )
    return torch.from_numpy(single)


def _checked_episodes(episodes: NDArray[Any], path: Path, count: int) -> Int[Tensor, " frames"]:
    if episodes.ndim != 1 or episodes.dtype.kind not in "biu":
        raise UserError(f"{path}: 'episodes' is {episodes.shape} {episodes.dtype}, but (N,) integers are needed.")
    _check_length("episodes", episodes, str(path), count)
    numbers = episodes.astype(np.int64)
    descents = np.flatnonzero(np.diff(numbers) < 0)
    if len(descents):
        row = descents[0] + 1
        raise UserError(
            f"{path}: 'episodes' descends in row {row}, from {numbers[row - 1]} to {numbers[row]}. "
            "Frames must stand in the order in which they were seen, one episode after the other."
        )
    return torch.from_numpy(numbers)
