"""The log of a run: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from contrastive_mm.checkpoint import write_atomically
from contrastive_mm.errors import UserError


class MetricsLog:
    """Appends to ``metrics.jsonl``; each line is on the disk's side of the program as soon as it is written.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: dict[str, Any]) -> None:
        """Add one line.

        Raises:
            UserError: the disk is full, or can't be written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written ({error.strerror}). Make room on the disk; training then goes on with "
                "--resume."
            ) from error

    def last(self) -> dict[str, Any]:
        """The newest line; empty where there is none."""
        lines = read_metrics(self.path) if self.path.exists() else []
        return lines[-1] if lines else {}

    def cut_after(self, step: int) -> None:
        """Drop the lines of later steps, and a line torn by a kill, so that a resumed run logs each step once."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. What is no line of it (torn by a kill, say) is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and "step" in values:
            lines.append(values)
    return lines
