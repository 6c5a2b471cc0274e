"""Things by name: the project's own, and those that other installed packages offer through entry points.

A name is looked up in two places, and nothing is imported before it is asked for. The project's own names always
win: an entry point of the same name is named on standard error and left out, so that no package can replace what a
published number was made with.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from contrastive_mm.errors import UserError, unknown_name

_said: set[str] = set()


class Registry:
    """Classes of one kind by name.

    Args:
        kind: what the names are of, for messages: ``"method"``.
        group: the entry-point group in which other packages offer more of them.
        built_in: name to ``module:Class`` of the project's own.
        find_fault: says what keeps an imported object from being of this kind, or None.
        reserved: further names that no package may take.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Mapping[str, str],
        find_fault: Callable[[Any], str | None],
        reserved: Collection[str] = (),
    ) -> None:
        self.kind = kind
        self.group = group
        self.built_in = built_in
        self.find_fault = find_fault
        self.reserved = reserved

    def packages(self) -> dict[str, str]:
        """The names that other packages offer, each with its package; nothing is imported."""
        return {name: " and ".join(map(_package, offers)) for name, offers in sorted(self._offers().items())}

    def names(self) -> list[str]:
        """All names, in order; nothing is imported."""
        return sorted({*self.built_in, *self._offers()})

    def usable_names(self) -> list[str]:
        """All names that can be used: other packages are imported, and a broken one is said and left out."""
        names = set(self.built_in)
        for name, offers in self._offers().items():
            try:
                self._load(name, offers)
            except UserError as error:
                _say_once(f"skipped: {error}")
            else:
                names.add(name)
        return sorted(names)

    def load(self, name: str) -> Any:
        """Import the class of a name; of what other packages offer, only that one is imported.

        Raises:
            UserError: there is none (the message offers the nearest name), or another package's is broken.
        """
        offered = self._offers()
        if name in self.built_in:
            return import_object(self.built_in[name])
        if name not in offered:
            raise unknown_name(self.kind, name, self.usable_names())
        return self._load(name, offered[name])

    def _offers(self) -> dict[str, list[EntryPoint]]:
        """What other packages offer, by name; a list, since two packages may offer the same name."""
        offers: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            if point.name in self.built_in or point.name in self.reserved:
                _say_once(
                    f"skipped: the {self.kind} {point.name!r} of package {_package(point)}, because the name is "
                    "contrastive_mm's own and can't be replaced; the package has to choose another."
                )
            elif point not in offers.setdefault(point.name, []):
                offers[point.name].append(point)
        return offers

    def _load(self, name: str, offers: list[EntryPoint]) -> Any:
        if len(offers) > 1:
            packages = " and ".join(map(_package, offers))
            raise UserError(f"The {self.kind} {name!r} is offered by {packages}: uninstall all but one of them.")
        (point,) = offers
        try:
            found = point.load()
            fault = self.find_fault(found)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever another package's code may raise, SystemExit too
            raise self._broken(point, _in_one_line(error)) from error
        if fault is not None:
            raise self._broken(point, fault)
        return found

    def _broken(self, point: EntryPoint, fault: str) -> UserError:
        return UserError(
            f"The {self.kind} {point.name!r} of package {_package(point)} ({point.value}) can't be used: {fault}."
        )


def import_object(place: str) -> Any:
    """Import ``module:name``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def options_fault(options_class: Any, required: Collection[str] = ()) -> str | None:
    """What keeps a class from holding the options of a method or domain, or None.

    Args:
        options_class: ought to be a dataclass whose fields all have defaults.
        required: fields that it must have.
    """
    if not (isinstance(options_class, type) and dataclasses.is_dataclass(options_class)):
        return f"its config_class must be a dataclass, not {options_class!r}"
    fields = [field for field in dataclasses.fields(options_class) if field.init]
    for field in fields:
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            return f"option {field.name!r} of {options_class.__name__} has no default"
    missing = sorted(set(required) - {field.name for field in fields})
    if missing:
        return f"{options_class.__name__} lacks the option {missing[0]!r}"
    return None


def _package(point: EntryPoint) -> str:
    distribution = point.dist
    return point.value if distribution is None else f"{distribution.metadata['Name']} {distribution.version}"


def _in_one_line(error: BaseException) -> str:
    """The error, and where in the other package it came up."""
    said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    ours = (__file__, str(Path(importlib.__file__).parent), "<frozen importlib")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(f"contrastive-mm: {message}", file=sys.stderr)
