"""Results that are written as they come, and found again by the next call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contrastive_mm.checkpoint import write_atomically


class KeptResults:
    """Results of protocols in one JSON file, each beside the settings that it came from.

    A result is found again as long as its settings and the subject (the encoder's weights, the data) are equal;
    results of another subject are dropped when the file is next written. What else stands in the file stays.

    Args:
        path: the file; made at the first ``put``.
        subject: what the results are of, as JSON values.
        overwrite: begin with nothing, whatever the file holds.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.subject = _as_json(subject)
        self._content = read_results(path)
        kept = self._content.get("protocols")
        if overwrite or self._content.get("subject") != self.subject or not isinstance(kept, dict):
            self._content["protocols"] = {}
        self._content["subject"] = self.subject

    @property
    def results(self) -> dict[str, Any]:
        """The results that are there, by protocol."""
        return {name: entry["result"] for name, entry in self._content["protocols"].items()}

    def find(self, protocol: str, settings: Mapping[str, Any]) -> Any | None:
        """The result of a protocol under these settings, or None."""
        entry = self._content["protocols"].get(protocol)
        return entry["result"] if entry and entry["settings"] == _as_json(settings) else None

    def put(self, protocol: str, settings: Mapping[str, Any], result: Any) -> None:
        """Keep a result, in place of an earlier one of the protocol, and write the file."""
        self._content["protocols"][protocol] = {"settings": _as_json(settings), "result": _as_json(result)}
        self.write()

    def write(self, **others: Any) -> None:
        """Write the file, with other values beside the results."""
        self._content.update(_as_json(others))
        text = json.dumps(self._content, indent=2) + "\n"
        write_atomically(self.path, lambda temporary: _write(temporary, text))


def _as_json(values: Any) -> Any:
    """Values as they come back from the file: tuples are lists, and every key is text."""
    return json.loads(json.dumps(values))


def read_results(path: Path) -> dict[str, Any]:
    """What a file of results holds; nothing where there is none, or where it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
