"""A stage of a longer command: a folder that is trained once, continued after a kill, and then only read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_mm.checkpoint import load_encoder, save_encoder, write_atomically
from contrastive_mm.errors import UserError

SETTINGS_FILE = "settings.json"
SCORES_FILE = "scores.json"
CLASSIFIER_FILE = "classifier.safetensors"


def fingerprint(value: nn.Module | Tensor) -> str:
    """A short digest of a module's weights or of a tensor, equal where they are equal bit for bit."""
    tensors = {"": value} if isinstance(value, Tensor) else value.state_dict()
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def run_stage(folder: Path, settings: Mapping[str, Any], train: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Train a stage, or read its scores where that is done.

    Args:
        folder: of the stage; ``settings.json`` is written there before and ``scores.json`` after it is trained.
        settings: everything that its result depends on.
        train: trains it, from its last checkpoint where there is one, and returns its scores.

    Raises:
        UserError: the folder holds a stage with other settings, or one that can't be read.
    """
    wanted = json.loads(json.dumps(settings))
    held = _read(folder / SETTINGS_FILE)
    if held is not None and held != wanted:
        names = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
        raise UserError(
            f"{folder} was begun with other settings: {_differences(held, wanted, names[:3])}. Repeat the command as "
            "it was to continue, begin anew with --overwrite, or choose another --output."
        )
    if held is None:
        _write(folder / SETTINGS_FILE, wanted)
    scores = _read(folder / SCORES_FILE)
    if scores is None:
        scores = dict(train())
        _write(folder / SCORES_FILE, scores)
    return scores


def _differences(held: Mapping[str, Any], wanted: Mapping[str, Any], names: list[str]) -> str:
    return "; ".join(f"{name} was {held.get(name)}, now {wanted.get(name)}" for name in names)


def _read(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}). Begin anew with --overwrite.") from error


def _write(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=1) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_classifier(classifier: nn.Module, folder: Path) -> None:
    """Keep a stage's classifier as safetensors."""
    save_encoder(classifier, folder / CLASSIFIER_FILE)


def load_classifier(classifier: nn.Module, folder: Path) -> None:
    """Load weights written by ``save_classifier``.

    Raises:
        UserError: the file is missing, unreadable, or of another architecture.
    """
    load_encoder(classifier, folder / CLASSIFIER_FILE)
