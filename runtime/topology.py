"""Topology: how the ranks of one group are arranged, and every rank's place.

Axes, outermost first: `cfg` (guidance branches) × `ring` × `ulysses`. Ranks that differ only in `ulysses` are
neighbours, so that the all-to-all stays inside a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import BadRequestError


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinates.

    Attributes:
        sequence: its part of the token sequence, ring · ulysses degree + ulysses.
    """

    cfg: int
    ring: int
    ulysses: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Topology:
    """Degrees of parallelism along each axis."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share one branch's tokens."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.cfg * self.sequence

    def place(self, rank: int) -> Place:
        """Coordinates of `rank`."""
        cfg, sequence = divmod(rank, self.sequence)
        ring, ulysses = divmod(sequence, self.ulysses)
        return Place(cfg, ring, ulysses, sequence)

    def check(self, *, heads: int, tokens: int, guided: bool) -> None:
        """Refuse degrees that a model and request cannot use. Nothing has to divide anything.

        Raises:
            BadRequestError: one line per degree that does not fit, with what would.
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
                f"ulysses: {self.ulysses} given; the model has {heads} heads to split, use more ring"
            )
        if self.sequence > tokens:
            problems.append(f"ranks: {self.sequence} would share {tokens} tokens; each needs at least one")
        if problems:
            raise BadRequestError("\n".join(problems))

    @classmethod
    def choose(cls, world: int, *, heads: int, guided: bool) -> Topology:
        """The arrangement of `world` ranks that moves the fewest bytes without a remainder.

        Guidance branches exchange only the output, so they are split first. Ulysses moves less than a ring of
        the same degree, so it gets the largest degree that divides both the ranks and the heads, and the ring
        the rest.
        """
        cfg = 2 if guided and world % 2 == 0 else 1
        sequence = world // cfg
        ulysses = max(u for u in range(1, sequence + 1) if sequence % u == 0 and heads % u == 0)
        return cls(cfg=cfg, ring=sequence // ulysses, ulysses=ulysses)
