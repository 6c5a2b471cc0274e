"""Frames to learn from: rendered by a Gymnasium environment, or read from a file."""

from __future__ import annotations

import os
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
        first = torch.searchsorted(self.episodes, self.episodes[rows])
        ages = torch.arange(stack - 1, -1, -1)
        index = (rows[:, None] - ages).maximum(first[:, None])
        return self.frames[index].flatten(1, 2)


def find_frames(data: str, count: int, size: int, seed: int) -> FrameStore:
    """Frames by environment or by file.

    Args:
        data: a Gymnasium environment's id, played by a random policy; or an ``.npz`` file with ``frames``
            (N, H, W, C) uint8 and, where known, ``states`` (N, S) and ``episodes`` (N,).
        count: frames to collect from an environment.
        size: side in pixels to which frames are brought.
        seed: of the environment and its policy.

    Raises:
        UserError: nothing is there, or it can't be rendered.
    """
    if not data:
        raise UserError("--data is missing: give a Gymnasium environment such as CartPole-v1, or an .npz file.")
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        return _read_file(path, size)
    return collect_frames(data, count, size, seed)


def _resize(frame: NDArray[Any], size: int) -> NDArray[Any]:
    if frame.shape[:2] == (size, size):
        return frame
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
        if not isinstance(picture, np.ndarray) or picture.ndim != 3:
            raise UserError(f"Environment {environment!r} renders no picture of (H, W, 3).")
        frames[row] = _resize(picture, size).transpose(2, 0, 1)
        states.append(observation)
        episodes.append(episode)
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            observation, _ = env.reset()
            episode += 1
    env.close()
    known = torch.from_numpy(np.stack(states)).float() if vectors else None
    names = None
    if known is not None:
        kind = environment.split("/")[-1].split("-")[0]
        names = STATE_NAMES.get(kind, [f"state_{number}" for number in range(known.shape[1])])
    return FrameStore(torch.from_numpy(frames), torch.tensor(episodes), known, names)


def _read_file(path: Path, size: int) -> FrameStore:
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as .npz without pickled objects: {error}") from error
    frames = arrays.get("frames")
    if frames is None or frames.ndim != 4 or frames.dtype != np.uint8:
        raise UserError(f"{path} needs an array 'frames' of (N, H, W, C) uint8; it has {', '.join(arrays)}.")
    if frames.shape[1:3] != (size, size):
        frames = np.stack([_resize(frame, size) for frame in frames])
    for name in ("states", "episodes"):
        if name in arrays and len(arrays[name]) != len(frames):
            raise UserError(f"{path}: 'frames' has {len(frames)} rows, {name!r} has {len(arrays[name])}.")
    states = torch.from_numpy(arrays["states"]).float() if "states" in arrays else None
    return FrameStore(
        torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),
        torch.from_numpy(arrays.get("episodes", np.zeros(len(frames), np.int64))).long(),
        states,
        None if states is None else [f"state_{number}" for number in range(states.shape[1])],
    )
