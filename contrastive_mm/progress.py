"""Progress bars that suit a terminal and a log file alike."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


class _Lines:
    """A log file: what a terminal would draw over itself becomes a line of its own."""

    def write(self, text: str) -> None:
        if shown := text.strip():
            sys.stderr.write(shown + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Any = None, **options: Any) -> Any:
    """A tqdm bar that goes away when it is done; a log file gets a line every 30 seconds, a terminal a moving bar."""
    if sys.stderr.isatty():
        return tqdm(items, leave=False, delay=2, **options)
    # A bar that is done is drawn once more before it goes away: in a log that would be an empty or doubled line.
    return tqdm(items, leave=False, mininterval=30.0, maxinterval=60.0, delay=2, file=_Lines(), ascii=True, **options)
