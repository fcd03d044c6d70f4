"""Handing checkpoints over between machines that share no disk: who has what, and how it gets to whom.

Every rank writes to its own machine. At a resume the machines tell each other which manifests and parts
they have, and a part that a machine needs and lacks is sent to it by one that has it. All of this is
collective.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runtime.checkpoint.folder import FETCHED
from runtime.checkpoint.manifests import PART, Seen, manifest_name, read_manifest, seen_manifests
from runtime.checkpoint.writer import file_digest
from runtime.errors import BadRequestError, reason
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology, machine_name

_CHUNK = 4 << 20  # bytes that one machine sends another at a time; a wait for it must stay short

Manifests = dict[int, dict[str, Any]]
"""Rank that wrote → its manifest."""


@dataclass(frozen=True, slots=True)
class Known:
    """A checkpoint of which at least one manifest was found.

    Attributes:
        step: the last step that is done.
        group: mark of the ranks that wrote it, as manifests have it.
        topology: their arrangement.
        machines: name of each one's machine; empty if unknown.
        newest_whole: newest step of which that group was certain that all of it had written; -1 if none.
        holders: rank that wrote → ranks of this job on whose machine its manifest is, one on each.
    """

    step: int
    group: str
    topology: Topology
    machines: tuple[str, ...]
    newest_whole: int
    holders: Mapping[int, Sequence[int]]

    @property
    def missing(self) -> list[int]:
        """Ranks whose manifests no machine has."""
        return [rank for rank in range(self.topology.world) if rank not in self.holders]

    def why_missing(self, machines: Sequence[str]) -> str:
        """Say which file is missing, if its loss is certain; empty if it may never have been written.

        Args:
            machines: name of every rank's machine in this job.
        """
        for rank in self.missing if len(set(self.machines)) > 1 else []:
            host = self.machines[rank]
            where = "is not a machine of this job" if host not in machines else ""
            if not where and self.step <= self.newest_whole:
                where = "does not have it any more"
            if where:
                name = manifest_name(self.step, rank)
                return f"{name!r} and its parts were written on {host}, which {where}"
        return ""


def survey(folder: Path, ranks: Ranks) -> list[Known]:
    """Find the checkpoints of a generation on all machines, newest first."""
    own = [_plain(one) for one in seen_manifests(folder)] if ranks.leads_machine else []
    found: dict[tuple[int, str, Topology], list[tuple[int, Seen]]] = {}
    everyone: list[list[list[Any]]] = ranks.control.all_gather_object(own)
    for holder, told in enumerate(everyone):
        for one in map(_seen, told):
            found.setdefault((one.step, one.group, one.topology), []).append((holder, one))
    whole: dict[str, int] = {}
    for _, one in itertools.chain.from_iterable(found.values()):
        whole[one.group] = max(one.whole, whole.get(one.group, -1))
    known = []
    for (step, group, topology), seen in sorted(found.items(), key=lambda item: item[0][:2], reverse=True):
        holders: dict[int, list[int]] = {}
        for holder, one in seen:
            holders.setdefault(one.rank, []).append(holder)
        known.append(Known(step, group, topology, seen[0][1].machines, whole[group], holders))
    return known


def _plain(one: Seen) -> list[Any]:
    """As JSON."""
    return [asdict(part) if isinstance(part, Topology) else part for part in one]


def _seen(told: Sequence[Any]) -> Seen:
    step, group, topology, rank, machines, whole = told
    return Seen(step, group, Topology(**topology), rank, tuple(machines), whole)


def gather_manifests(folder: Path, known: Known, ranks: Ranks) -> Manifests:
    """Get every manifest of a checkpoint from a machine that has it.

    Raises:
        ValueError: one cannot be read any more, or is damaged; raised on every rank.
    """
    own: Manifests = {}
    for writer, holders in known.holders.items():
        if holders[0] == ranks.rank:
            with suppress(OSError, ValueError, KeyError, TypeError):
                own[writer] = read_manifest(folder, known.step, writer)
    told = ranks.control.all_gather_object({str(rank): manifest for rank, manifest in own.items()})
    found = {int(rank): manifest for one in told for rank, manifest in one.items()}
    for rank in range(known.topology.world):
        manifest = found.get(rank, {})
        parts = manifest.get("parts")
        if not isinstance(parts, dict) or manifest.get("last") not in parts:
            name = manifest_name(known.step, rank)
            raise ValueError(f"{name!r} cannot be read any more, or is damaged")
        for part in parts:
            if not PART.fullmatch(part):
                raise ValueError(f"a manifest names {part!r}, which is not a part of a checkpoint")
    return found


class Delivery(NamedTuple):
    """A file that one rank's machine sends to another's.

    Attributes:
        name, size: the file, and its bytes.
        source, target: the ranks that send and receive it.
    """

    name: str
    size: int
    source: int
    target: int


def fetch(folder: Path, needed: Mapping[str, str], ranks: Ranks) -> Path | None:
    """Bring the parts that this machine needs and lacks into a folder of its own, verified.

    Args:
        folder: folder of the generation, on every machine.
        needed: parts that this machine's ranks need → SHA-256.
        ranks: all ranks.

    Returns:
        that folder, to be removed once it was read; None if nothing had to be sent to any machine.

    Raises:
        ValueError: no machine has a part that another needs, or one arrived damaged; raised on every rank.
        BadRequestError: a machine cannot write what it was sent; raised on every rank.
    """
    lacking = _lacking(folder, needed) if ranks.leads_machine else []
    own = [[name, needed[name]] for name in lacking]
    wanted: list[list[list[str]]] = ranks.control.all_gather_object(own)
    if not any(wanted):
        return None
    every = {name: digest for one in wanted for name, digest in one}
    owned = _owned(folder, every) if ranks.leads_machine else {}
    owners: list[dict[str, int]] = ranks.control.all_gather_object(owned)
    deliveries = []
    for target, one in enumerate(wanted):
        for name, _ in one:
            source = next((rank for rank, sizes in enumerate(owners) if name in sizes), None)
            if source is None:
                raise ValueError(f"{name!r} is damaged, or on no machine of this job")
            deliveries.append(Delivery(name, owners[source][name], source, target))
    place = folder / f"{FETCHED}{ranks.first_here}"
    if ranks.leads_machine:
        shutil.rmtree(place, ignore_errors=True)  # of a job that was killed
    problems = _deliver(folder, place, deliveries, needed, ranks)
    told = zip(*ranks.control.all_gather_object(list(problems)), strict=True)
    unwritten, damaged = (next(filter(None, of_ranks), "") for of_ranks in told)
    if (unwritten or damaged) and ranks.leads_machine:
        shutil.rmtree(place, ignore_errors=True)
    if unwritten:  # an earlier checkpoint would not fit either, and those that are there are still good
        raise BadRequestError(f"resume: cannot fetch checkpoints from other machines: {unwritten}")
    if damaged:
        raise ValueError(damaged)
    return place


def _lacking(folder: Path, needed: Mapping[str, str]) -> list[str]:
    """Needed parts that this machine does not have in the form that the manifests name."""
    return [name for name, digest in sorted(needed.items()) if not _is_whole(folder / name, digest)]


def _owned(folder: Path, wanted: Mapping[str, str]) -> dict[str, int]:
    """Wanted parts that this machine has → their sizes."""
    found = {}
    for name, digest in wanted.items():
        with suppress(OSError):
            if _is_whole(folder / name, digest):
                found[name] = (folder / name).stat().st_size
    return found


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except OSError:
        return False


def _deliver(
    folder: Path, place: Path, deliveries: Sequence[Delivery], digests: Mapping[str, str], ranks: Ranks
) -> tuple[str, str]:
    """Send and receive all files; returns what this rank could not write, and what arrived damaged."""
    arriving = {one: _Arriving(place / one.name) for one in deliveries if one.target == ranks.rank}
    for pieces in _rounds(deliveries):
        _exchange(folder, pieces, arriving, ranks)
    machine = machine_name(ranks.hosts[ranks.rank])
    unwritten = [f"{file.problem} (on {machine})" for file in arriving.values() if file.problem]
    damaged = [
        f"{one.name!r} arrived damaged: its checksum differs from the manifest's"
        for one in arriving
        if not _is_whole(place / one.name, digests[one.name])
    ]
    return next(iter(unwritten), ""), next(iter(damaged), "")


class Piece(NamedTuple):
    """Bytes of a delivery that are sent at once: `length` of them from `start` on."""

    delivery: Delivery
    start: int
    length: int


def _rounds(deliveries: Sequence[Delivery]) -> Iterator[list[Piece]]:
    """Plan transfers in which every machine sends each other one at most one piece."""
    pairs: dict[tuple[int, int], list[Delivery]] = {}
    for one in deliveries:
        pairs.setdefault((one.source, one.target), []).append(one)
    queues = [itertools.chain.from_iterable(map(_pieces, files)) for files in pairs.values()]
    while pieces := [piece for queue in queues if (piece := next(queue, None)) is not None]:
        yield pieces


def _pieces(one: Delivery) -> Iterator[Piece]:
    for start in range(0, one.size, _CHUNK):
        yield Piece(one, start, min(_CHUNK, one.size - start))


def _exchange(
    folder: Path, pieces: Sequence[Piece], arriving: Mapping[Delivery, _Arriving], ranks: Ranks
) -> None:
    """Send and receive one round; what cannot be read arrives as zeros, which the digest tells."""
    nothing = torch.empty(0, dtype=torch.uint8)
    outgoing, lengths = [nothing] * ranks.size, [0] * ranks.size
    for piece in pieces:
        source, target = piece.delivery.source, piece.delivery.target
        if source == ranks.rank:
            outgoing[target] = _read(folder / piece.delivery.name, piece)
        if target == ranks.rank:
            lengths[source] = piece.length
    arrived = ranks.control.all_to_all(outgoing, [(length,) for length in lengths])
    for piece in pieces:
        if piece.delivery.target == ranks.rank:
            arriving[piece.delivery].add(arrived[piece.delivery.source])


def _read(path: Path, piece: Piece) -> torch.Tensor:
    content = bytearray(piece.length)
    with suppress(OSError), path.open("rb") as file:
        file.seek(piece.start)
        file.readinto(content)
    return torch.frombuffer(content, dtype=torch.uint8)


class _Arriving:
    """A file that arrives in pieces.

    A disk that is full must not keep this rank from the transfers of others: `problem` tells of it.

    Attributes:
        problem: why it could not be written; empty if it could.
    """

    def __init__(self, path: Path):
        self._path, self.problem = path, ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        except OSError as error:
            self._fail(error)

    def add(self, content: torch.Tensor) -> None:
        """Write the next piece, 1-dim, uint8. The file is closed in between, as there may be very many."""
        try:
            if not self.problem:
                with self._path.open("ab") as file:
                    file.write(content.numpy().data)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.problem = self.problem or f"{str(self._path)!r}: {reason(error)}"
