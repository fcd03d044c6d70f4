"""Manifests of checkpoints: what a folder's say, and of which steps all that is needed is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from runtime.files.text import read_json
from runtime.parallel.topology import Topology

VERSION = 4  # format of parts and manifests
MANIFEST = re.compile(r"manifest-(\d{5,})-(\d+)\.json")
PART = re.compile(r"part-\d{5,}-\d+\.pt")


def complete_steps(folder: Path) -> list[int]:
    """Steps of which every rank of the group that wrote them has a manifest, newest first.

    Raises:
        OSError: the folder cannot be read.
    """
    return _steps(folder, lambda machine, here: True)


def kept_steps(folder: Path) -> list[int]:
    """Steps of which every rank has a manifest, here or on a machine that wrote none of its ranks' here."""
    return _steps(folder, lambda machine, here: machine in ("", *here))


def _steps(folder: Path, should_be_here: Callable[[str, Set[str]], bool]) -> list[int]:
    """Steps of which no rank's manifest is missing that should be in this folder, newest first.

    Args:
        should_be_here: whether it should, given the machine that wrote it, and those that wrote others.
    """
    groups: dict[tuple[int, str, Topology], dict[int, Seen]] = {}
    for one in seen_manifests(folder):
        groups.setdefault((one.step, one.group, one.topology), {})[one.rank] = one
    found = set()
    for (step, _, topology), seen in groups.items():
        here = {one.machine_of(rank) for rank, one in seen.items()}
        known = next(iter(seen.values()))
        missing = set(range(topology.world)) - seen.keys()
        if not any(should_be_here(known.machine_of(rank), here) for rank in missing):
            found.add(step)
    return sorted(found, reverse=True)


class Seen(NamedTuple):
    """What a manifest in a folder says of the checkpoint to which it belongs.

    Attributes:
        step: the last step that is done.
        group: mark of the ranks that wrote the checkpoint together.
        topology: their arrangement.
        rank: the one that wrote the manifest.
        machines: name of every rank's machine; empty if unknown.
        whole: newest step of which it was certain that all of them had written; -1 if none.
    """

    step: int
    group: str
    topology: Topology
    rank: int
    machines: tuple[str, ...]
    whole: int

    def machine_of(self, rank: int) -> str:
        """Name of the machine of a rank of the group; empty if unknown."""
        return self.machines[rank] if rank < len(self.machines) else ""


def seen_manifests(folder: Path) -> list[Seen]:
    """Read what the manifests in a folder say; damaged ones, and those of other versions, are left out.

    Raises:
        OSError: the folder cannot be read.
    """
    seen = []
    for name in names_in(folder):
        match = MANIFEST.fullmatch(name)
        if match is None:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            step, rank = int(match[1]), int(match[2])
            one = read_manifest(folder, step, rank)
            topology = Topology(**one["topology"])
            machines, whole = map(str, one.get("machines", [])), int(one.get("whole", -1))
            if rank < topology.world:
                seen.append(Seen(step, str(one.get("group", "")), topology, rank, tuple(machines), whole))
    return seen


def read_manifest(folder: Path, step: int, rank: int) -> dict[str, Any]:
    """Read a rank's manifest of a step.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, damaged, or of another version.
    """
    manifest = read_json(folder / manifest_name(step, rank))
    if manifest["version"] != VERSION:
        raise ValueError(f"{folder} was written by another version of Lockstep")
    return manifest


def manifest_name(step: int, rank: int) -> str:
    """File name of a rank's manifest of a step."""
    return f"manifest-{step:05d}-{rank}.json"


def names_in(folder: Path) -> list[str]:
    """List the names in a folder, which may be missing.

    Raises:
        OSError: it cannot be read, so nobody knows what is in it.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
