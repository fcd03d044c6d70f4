"""Topology: the arrangement of the ranks of one group, and every rank's place in it.

Axes, outermost first: `cfg` (guidance branches) × `ring` × `ulysses`. Ranks that differ only in `ulysses` are
neighbours, so that the all-to-all stays inside a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import isqrt

from runtime.errors import BadRequestError

_LISTED = 4  # machines that a warning lists


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinates.

    Attributes:
        cfg, ring, ulysses: coordinates along the axes.
        sequence: number of its part of the token sequence, ring · ulysses degree + ulysses.
    """

    cfg: int
    ring: int
    ulysses: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Degrees:
    """Degrees of parallelism that a user requests; None leaves the choice to `Topology.choose`."""

    cfg: int | None = None
    ring: int | None = None
    ulysses: int | None = None

    def __str__(self) -> str:
        given = ((axis, getattr(self, axis)) for axis in ("cfg", "ring", "ulysses"))
        return ", ".join(f"{axis} {degree}" for axis, degree in given if degree) or "no degree"

    @property
    def product(self) -> int:
        """Smallest number of ranks with these degrees."""
        return (self.cfg or 1) * (self.ring or 1) * (self.ulysses or 1)


@dataclass(frozen=True, slots=True)
class Topology:
    """Degrees of parallelism along each axis."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Number of ranks that share one branch's tokens."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.cfg * self.sequence

    def place(self, rank: int) -> Place:
        """Coordinates of `rank`."""
        cfg, sequence = divmod(rank, self.sequence)
        ring, ulysses = divmod(sequence, self.ulysses)
        return Place(cfg, ring, ulysses, sequence)

    def rows(self, *axes: int) -> list[list[int]]:
        """Group ranks that differ only along `axes` (0 cfg, 1 ring, 2 ulysses); each is in one row."""
        degrees = (self.cfg, self.ring, self.ulysses)
        rows: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(product(*map(range, degrees))):
            fixed = tuple(at for axis, at in enumerate(place) if axis not in axes)
            rows.setdefault(fixed, []).append(rank)
        return list(rows.values())

    def check(self, *, heads: int, tokens: int | None, guided: bool) -> None:
        """Refuse degrees that a model and request cannot use. No number has to divide another.

        Args:
            heads: attention heads of the model.
            tokens: tokens of the sequence; None if unknown.
            guided: whether there are two branches.

        Raises:
            BadRequestError: one line per degree that does not fit, with one that would.
        """
        problems = [
            f"{axis}: {getattr(self, axis)} given; must be at least 1"
            for axis in ("cfg", "ring", "ulysses")
            if getattr(self, axis) < 1
        ]
        if self.cfg > (most := 2 if guided else 1):
            why = "guidance has two branches" if guided else "without guidance there is one branch"
            problems.append(f"cfg: {self.cfg} given; {why}, so it must be at most {most}")
        if self.ulysses > heads:
            problems.append(
                f"ulysses: {self.ulysses} given; the model has {heads} heads to split, use a larger ring"
            )
        if tokens is not None and self.sequence > tokens:
            problems.append(f"ranks: {self.sequence} would share {tokens} tokens; each needs at least one")
        if problems:
            raise BadRequestError("\n".join(problems))

    def crossings(self, hosts: Sequence[str]) -> list[str]:
        """Warn of axes that make every step wait for the network between machines without need.

        A ring that crosses from machine to machine evenly is how several machines are meant to be used.

        Args:
            hosts: machine of every rank, as `host_name` has it.
        """
        sizes = [f"{machine_name(host)} ({count})" for host, count in Counter(hosts).items()]
        placed, warnings = f"{', '.join(sizes[:_LISTED])}{' …' if len(sizes) > _LISTED else ''}", []
        if any(_spans(row, hosts) for row in self.rows(2)):
            most = neighbours(hosts)
            within = f"ulysses {most} or a divisor of it" if most > 1 else "a ring instead"
            warnings.append(
                f"ulysses: {self.ulysses} exchanges heads between machines in every block, which is slow; "
                f"{within} stays within them. Ranks by machine: {placed}"
            )
        rows = self.rows(1)
        counts = [set(Counter(hosts[rank] for rank in row).values()) for row in rows if _spans(row, hosts)]
        if counts and (len(counts) < len(rows) or any(len(count) > 1 for count in counts)):
            warnings.append(
                f"ring: {self.ring} crosses from machine to machine unevenly, and every rank waits for the "
                f"network as often; as many ranks on each machine would avoid it. Ranks by machine: {placed}"
            )
        return warnings

    @classmethod
    def every(cls, world: int, *, guided: bool, wanted: Degrees = Degrees()) -> list[Topology]:
        """List the arrangements of `world` ranks that have the `wanted` degrees; none if they do not fit.

        Args:
            world: number of ranks.
            guided: whether there are two branches.
            wanted: degrees that the user gave.
        """
        cfgs = [wanted.cfg] if wanted.cfg else [2, 1] if guided else [1]
        return [
            cls(cfg, world // cfg // ulysses, ulysses)
            for cfg in cfgs
            if world % cfg == 0
            for ulysses in _divisors(world // cfg)
            if wanted.ring in (None, world // cfg // ulysses) and wanted.ulysses in (None, ulysses)
        ]

    @classmethod
    def choose(
        cls,
        world: int,
        *,
        heads: int,
        guided: bool,
        wanted: Degrees = Degrees(),
        per_node: int | None = None,
    ) -> Topology:
        """Choose the arrangement of `world` ranks that moves the fewest bytes and has the `wanted` degrees.

        Guidance branches exchange only the output, so they are split first. Ulysses moves less than a ring of
        the same degree, so it gets the largest degree that divides the heads and stays within a node, and the
        ring takes the rest.

        Args:
            world: number of ranks.
            heads: attention heads of the model.
            guided: whether there are two branches.
            wanted: degrees that the user gave.
            per_node: number of neighbours that never span two nodes, if there are several; see `neighbours`.

        Raises:
            BadRequestError: the product of the wanted degrees does not fit `world`.
        """
        found = cls.every(world, guided=guided, wanted=wanted)
        if not found:
            raise BadRequestError(
                f"ranks: {world} given; {wanted} cannot make that number (cfg × ring × ulysses = ranks)"
            )
        node = per_node or world
        return max(found, key=lambda t: (node % t.ulysses == 0, heads % t.ulysses == 0, t.cfg, t.ulysses))


def machine_name(host: str) -> str:
    """Name of a machine for people, from its `heartbeats.host_name`."""
    return host.partition(":")[0]


def neighbours(hosts: Sequence[str]) -> int:
    """Largest number of neighbouring ranks, counted off from the first, that never spans two machines.

    Args:
        hosts: machine of every rank.

    Example:
        >>> neighbours("aaaabb"), neighbours("aaab"), neighbours("abab")
        (2, 1, 1)
    """
    world = len(hosts)
    sizes = sorted(_divisors(world), reverse=True)
    return next(
        size for size in sizes if not any(_spans(range(at, at + size), hosts) for at in range(0, world, size))
    )


def _spans(ranks: Sequence[int], hosts: Sequence[str]) -> bool:
    return len({hosts[rank] for rank in ranks}) > 1


def _divisors(number: int) -> set[int]:
    """All divisors of a number; takes milliseconds for the largest that options allow (2^33)."""
    small = [one for one in range(1, isqrt(number) + 1) if number % one == 0]
    return {*small, *(number // one for one in small)}
