"""Progress bars that suit a terminal and a log file alike."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress(items: Any = None, **options: Any) -> Any:
    """A tqdm bar that goes away when it is done; a log file gets a line every 30 seconds, a terminal a moving bar."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(items, leave=False, mininterval=pause, delay=2, **options)
