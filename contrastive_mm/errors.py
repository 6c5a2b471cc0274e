"""Errors that a user can act on: each names what is wrong and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 40
"""Known names that an error lists; nobody reads a longer list."""


class UserError(Exception):
    """Bad input from the user; the command line prints it without a traceback and exits with 2."""


class TrainingError(UserError):
    """A run that can't go on, for example because its loss is no longer a number."""


class NotFiniteError(UserError):
    """NaN or infinity where numbers are needed."""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """An error for a misspelt name that offers the nearest right one.

    Args:
        kind: what the name is of, for example ``"method"``.
        name: what the user wrote.
        known: the names that exist.
        where: the file or option that the name stands in, if there is one.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    place = f" in {where}" if where else ""
    shown = choices[:MOST_NAMES] if len(choices) > MOST_NAMES else choices
    more = f", and {len(choices) - MOST_NAMES} more" if len(choices) > MOST_NAMES else ""
    return UserError(f"Unknown {kind} {name!r}{place}.{guess} Known: {', '.join(shown)}{more}.")
