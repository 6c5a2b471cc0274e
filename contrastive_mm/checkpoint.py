"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contrastive_mm.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name, flush it to the disk, then rename it into place.

    Whatever happens in between, ``path`` is the old file or the new one, never half of one.

    Args:
        path: the file to make or replace.
        write: writes the content to the path that it is given.

    Raises:
        UserError: the disk is full, or can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} can't be written ({reason}); what was there is as it was. Make room on the disk, or write "
            "elsewhere; a training then goes on with --resume."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_with_torch(value: Any, path: Path) -> None:
    """``torch.save``, whose writer gives no reason where the system refuses to write.

    Raises:
        OSError: it can't be written.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


class CheckpointFolder:
    """The checkpoints of one run; the newest ``keep`` stay.

    Args:
        folder: where they lie; made at the first save.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, then drop those beyond ``keep``."""
        path = self.folder / f"step-{step:09d}.pt"
        write_atomically(path, lambda temporary: save_with_torch(dict(state), temporary))
        for old in self.paths()[: -self.keep]:
            old.unlink()
        for litter in self.folder.glob(".step-*"):  # of a process that was killed while it wrote
            litter.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint's content on the CPU, or None where there is none.

        Raises:
            UserError: it can't be read, or is no checkpoint.
        """
        paths = self.paths()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint make the reader raise nearly every kind there is
            raise UserError(
                f"The checkpoint {paths[-1]} can't be read ({str(error) or type(error).__name__}). Delete it to "
                "resume from the one before it."
            ) from error
        if not isinstance(state, dict):
            raise UserError(f"{paths[-1]} is no checkpoint: it holds a {type(state).__name__}. Move it away.")
        return state


def random_state() -> dict[str, Any]:
    """The state of every global random number generator, in types that load without running code."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - encoders may draw from the global one
    assert isinstance(numpy_state, dict)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_position": [
            numpy_state["state"]["pos"],
            numpy_state["has_gauss"],
            float(numpy_state["gauss"]),
        ],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every global random number generator to a saved state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    position, has_gauss, gauss_value = state["numpy_position"]
    np.random.set_state(  # noqa: NPY002
        ("MT19937", state["numpy_key"].numpy().astype(np.uint32), position, has_gauss, gauss_value)
    )


def load_weights(module: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Load a state dict, or say which tensors don't fit.

    Args:
        module: takes the weights.
        weights: the state dict.
        source: where it comes from, for the message.

    Raises:
        UserError: names or shapes differ: the weights belong to another architecture.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in this model" for name in weights if name not in own]
    for name, value in own.items():
        there = weights.get(name)
        if isinstance(value, Tensor) and isinstance(there, Tensor) and value.shape != there.shape:
            problems.append(f"{name} has shape {tuple(there.shape)}, this model {tuple(value.shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source} belongs to another architecture: {'; '.join(problems[:3])}{more}. "
            "Use the encoder and method options that it was trained with (the run's config.yaml has them)."
        )
    module.load_state_dict(weights)


def save_encoder(encoder: nn.Module, path: Path) -> None:
    """Write an encoder's weights as safetensors."""
    # Tied weights share storage, which safetensors refuses; a copy of each does not.
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in encoder.state_dict().items()
    }
    write_atomically(path, lambda temporary: save_file(weights, temporary))


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Load weights written by ``save_encoder``.

    Raises:
        UserError: the file is missing, unreadable, of another architecture, or holds NaN or infinity.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: has this run saved an encoder yet?")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} can't be read as safetensors ({error}).") from error
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(
            f"{path}: {broken[0]} holds NaN or infinity, and {len(broken) - 1} more do. Training never saves such "
            "weights: write the file again from the last checkpoint with --resume, or train anew."
        )
    load_weights(encoder, weights, str(path))
