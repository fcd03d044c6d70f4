"""Weight files that a user gave: found in a folder, or named one by one, with the parts of each together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.models.layouts.stored import SUFFIXES, Stored, stored_in

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_DEPTH = 3  # levels of folders that are searched, as in ComfyUI's `models`
_MOST = 200  # weight files in a folder that are looked into
_SHOWN = 3  # names of tensors that are told


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One weight file, or the parts of one that was split.

    Attributes:
        name: its name for messages: the file, relative to the folder that was searched.
        files: the files, in order.
        role: component that it was given for; empty if that is to be found out.
    """

    name: str
    files: tuple[Path, ...]
    role: str = ""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Its tensors by their names; only headers are read.

        Raises:
            OSError, ValueError: see `stored_in`.
        """
        return {key: stored for file in self.files for key, stored in stored_in(file).items()}

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.files[0].parent

    def is_readable(self) -> bool:
        """Return whether its tensors can be listed."""
        try:
            return self.tensors is not None
        except (OSError, ValueError):
            return False

    def seen(self) -> str:
        """Tell what it holds, for messages: its first names, or why it cannot be read."""
        try:
            keys = list(self.tensors)
        except (OSError, ValueError) as error:
            return str(error)
        names = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        return f"{self.name} holds {names or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Given:
    """What a user gave instead of a folder in diffusers layout.

    Attributes:
        sets: the weight files.
        folder: the folder that was searched; None if files were named one by one.
        tokenizer: folder or file of the tokenizer, if it was named.
    """

    sets: Sequence[WeightSet]
    folder: Path | None = None
    tokenizer: Path | None = None

    def readable(self) -> list[WeightSet]:
        """Files whose tensors can be listed, and those that were named: in a folder there may be others."""
        return [one for one in self.sets if one.role or one.is_readable()]

    def seen(self) -> str:
        """Tell what the files hold, for messages, beginning with those that cannot be read."""
        sets = sorted(self.sets, key=WeightSet.is_readable)
        return "; ".join(one.seen() for one in sets[:_SHOWN]) + "; …" * (len(sets) > _SHOWN)


def given_folder(folder: Path) -> Given:
    """Find the weight files of a folder.

    Raises:
        OSError, ValueError: a part of a split file is missing, or there are too many files.
    """
    files = list(_weight_files(folder))
    if len(files) > _MOST:
        raise ValueError(
            f"it holds {len(files)} weight files; name those of one model, as docs/models.md says"
        )
    return Given(_grouped(files, folder), folder)


def given_file(file: Path, role: str) -> WeightSet:
    """Make the set of a file that was named: a split file is named by any of its parts, or by its folder.

    Raises:
        OSError, ValueError: it is missing, or not one set.
    """
    if file.is_dir():
        sets = _grouped(list(_weight_files(file, depth=1)), file)
        if len(sets) != 1:
            raise ValueError(f"{role}: {file} holds {len(sets)} weight files; name one")
        return WeightSet(sets[0].name, sets[0].files, role)
    if not file.is_file():
        raise FileNotFoundError(f"{role}: {file} is missing")
    (found,) = _grouped(parts_of(file), file.parent)
    return WeightSet(found.name, found.files, role)


def parts_of(file: Path) -> list[Path]:
    """Parts of a split file that are there, in order, from any of them; of another file or folder itself."""
    part = _PART.fullmatch(file.stem)
    if part is None or not file.is_file():
        return [file]
    name = re.compile(rf"{re.escape(part['stem'])}-\d{{5}}-of-{part['count']}{re.escape(file.suffix)}")
    return sorted(one for one in file.parent.iterdir() if name.fullmatch(one.name))


def _weight_files(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if depth > 1:
                yield from _weight_files(entry, depth - 1)
        elif entry.suffix in (*SUFFIXES, ".gguf"):
            yield entry


def _grouped(files: Sequence[Path], folder: Path) -> list[WeightSet]:
    """Put the parts of split files together.

    Raises:
        ValueError: a part is missing.
    """
    groups: dict[tuple[Path, int], list[Path]] = {}
    for file in files:
        part = _PART.fullmatch(file.stem)
        stem, count = (part["stem"], int(part["count"])) if part else (file.name, 1)
        groups.setdefault((file.parent / stem, count), []).append(file)
    sets = []
    for (stem, count), parts in groups.items():
        if len(parts) != count:
            there = {int(m["number"]) for m in (_PART.fullmatch(one.stem) for one in parts) if m}
            missing = next(number for number in range(1, count + 1) if number not in there)
            raise FileNotFoundError(f"{stem}-{missing:05d}-of-{count:05d}{parts[0].suffix} is missing")
        sets.append(WeightSet(str(parts[0].relative_to(folder)), tuple(sorted(parts))))
    return sets
