"""Extensions: schedules, predictors, streams, kernels and commands of installed packages.

A package announces its modules as entry points, so every process that makes a video finds them, whether the
command line, torchrun or Ray started it. They are imported when an unknown name is asked for.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import BadRequestError, named

PARTS = "lockstep.parts"
COMMANDS = "lockstep.commands"
_T = TypeVar("_T")


class Registry(dict[str, _T]):
    """Things of one kind by name; unknown names are looked for in installed packages.

    Args:
        kind: kind of the things, for messages.
        known: Lockstep's own things.
    """

    def __init__(self, kind: str, known: Mapping[str, _T]):
        super().__init__(known)
        self._kind = kind

    def add(self, name: str, thing: _T) -> None:
        """Add an object under a name.

        Raises:
            ValueError: another object has this name.
        """
        if self.get(name, thing) is not thing:
            raise ValueError(f"there is a {self._kind} {name!r} already; give this one another name")
        self[name] = thing

    def find(self, name: str) -> _T | None:
        """Find the object of this name; None if neither Lockstep nor an installed package has one.

        Raises:
            BadRequestError: an announced module cannot be imported.
        """
        if name not in self:
            for entry in entry_points(group=PARTS):
                load_entry(entry)
        return self.get(name)


def announced() -> list[str]:
    """List what installed packages announce, each as `package: module`; imports nothing."""
    entries = [*entry_points(group=PARTS), *entry_points(group=COMMANDS)]
    return sorted(f"{entry.dist.name if entry.dist else '?'}: {entry.value}" for entry in entries)


def load_entry(entry: EntryPoint) -> Any:
    """Import what an entry point names.

    Raises:
        BadRequestError: it cannot be imported.
    """
    try:
        return entry.load()
    except Exception as error:  # whatever a module raises that is not of this project
        package = "an installed package" if entry.dist is None else f"the package {entry.dist.name!r}"
        raise BadRequestError(
            f"{entry.group}: {entry.value!r} of {package} cannot be imported ({named(error)}); "
            f"repair the package, or uninstall it"
        ) from error


def source_of(thing: Any) -> str | None:
    """Identity of the code of a class or function: SHA-256 of the file that defines it.

    None for Lockstep's own code, which has a version. Code without a file is known by its name alone, and an
    object by its class.
    """
    thing = thing if hasattr(thing, "__qualname__") else type(thing)
    if thing.__module__.partition(".")[0] in ("runtime", "spectrum"):
        return None
    try:
        path = inspect.getsourcefile(thing)
    except TypeError:
        path = None
    if path is None or not Path(path).is_file():
        return f"{thing.__module__}.{thing.__qualname__}"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
