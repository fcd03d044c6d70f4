"""Topologies: every rank has one place, and what does not fit is explained."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BadRequestError
from runtime.parallel.topology import Degrees, Topology, neighbours


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4))
def test_every_rank_has_its_own_place(cfg: int, ring: int, ulysses: int) -> None:
    topology = Topology(cfg, ring, ulysses)
    places = [topology.place(rank) for rank in range(topology.world)]
    assert len({(p.cfg, p.ring, p.ulysses) for p in places}) == topology.world
    for sequence in (p.sequence for p in places):
        assert 0 <= sequence < topology.sequence
    assert [p.ulysses for p in places[:ulysses]] == list(range(ulysses))  # innermost


@pytest.mark.parametrize(
    ("world", "heads", "guided", "chosen"),
    [
        (8, 12, False, Topology(1, 2, 4)),  # 12 heads on 8 ranks
        (8, 12, True, Topology(2, 1, 4)),
        (8, 40, False, Topology(1, 1, 8)),
        (3, 40, True, Topology(1, 3, 1)),
        (2, 6, True, Topology(2, 1, 1)),
        (64, 40, True, Topology(2, 4, 8)),
        (1, 6, True, Topology()),
    ],
)
def test_choice_uses_every_rank_without_a_remainder(
    world: int, heads: int, guided: bool, chosen: Topology
) -> None:
    topology = Topology.choose(world, heads=heads, guided=guided)
    assert topology == chosen
    assert topology.world == world
    topology.check(heads=heads, tokens=1000, guided=guided)


@pytest.mark.parametrize(
    ("wanted", "per_node", "chosen"),
    [
        (Degrees(cfg=1), None, Topology(1, 1, 8)),
        (Degrees(ring=8), None, Topology(1, 8, 1)),
        (Degrees(ulysses=3, ring=2), None, None),
        (Degrees(), 4, Topology(2, 1, 4)),
        (Degrees(cfg=1), 4, Topology(1, 2, 4)),  # Ulysses within a node, the ring across
        (Degrees(cfg=1), 2, Topology(1, 4, 2)),
    ],
)
def test_wishes_and_nodes_are_minded(wanted: Degrees, per_node: int | None, chosen: Topology | None) -> None:
    if chosen is None:
        with pytest.raises(BadRequestError, match="8 given; ring 2, ulysses 3 cannot make that number"):
            Topology.choose(8, heads=40, guided=True, wanted=wanted, per_node=per_node)
    else:
        assert Topology.choose(8, heads=40, guided=True, wanted=wanted, per_node=per_node) == chosen


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        (Topology(cfg=2), "cfg: 2 given; without guidance"),
        (Topology(ulysses=7), "ulysses: 7 given; the model has 6 heads"),
        (Topology(ring=11), "11 would share 10 tokens"),
        (Topology(ring=0), "ring: 0 given; must be at least 1"),
    ],
)
def test_what_does_not_fit_is_explained(topology: Topology, said: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        topology.check(heads=6, tokens=10, guided=False)
    assert said in str(caught.value)


def test_very_many_ranks_are_arranged_or_refused_at_once() -> None:
    """A degree of 65536 is what options allow at most; pairs of numbers up to it would take hours."""
    chosen = Topology.choose(65536, heads=12, guided=True)
    assert (chosen.world, chosen.cfg) == (65536, 2)
    wanted = Degrees(cfg=2, ring=65536, ulysses=65536)
    assert Topology.choose(wanted.product, heads=12, guided=True, wanted=wanted).world == 2**33
    with pytest.raises(BadRequestError, match=r"ranks: 65536 given; ring 3 cannot make that number"):
        Topology.choose(65536, heads=12, guided=True, wanted=Degrees(ring=3))


@pytest.mark.parametrize("world", range(1, 41))
def test_of_all_arrangements_the_best_is_chosen(world: int) -> None:
    every = [
        Topology(cfg, ring, ulysses)
        for cfg in (1, 2)
        for ring in range(1, world + 1)
        for ulysses in range(1, world + 1)
        if cfg * ring * ulysses == world
    ]
    best = max(every, key=lambda one: (world % one.ulysses == 0, 12 % one.ulysses == 0, one.cfg, one.ulysses))
    assert Topology.choose(world, heads=12, guided=True) == best


@pytest.mark.parametrize(
    ("hosts", "most"),
    [("aaaaaaaabbbbcccc", 4), ("aaab", 1), ("aaabbb", 3), ("abab", 1), ("aaaa", 4), ("a", 1)],
)
def test_neighbours_that_never_span_two_machines(hosts: str, most: int) -> None:
    """By where the ranks are, not by how many there are: alternating ones have no neighbours."""
    assert neighbours(hosts) == most


@pytest.mark.parametrize(
    ("hosts", "topology", "axes"),
    [
        ("aaaabbbb", Topology(cfg=2, ulysses=4), []),
        ("aaaabbbb", Topology(ring=2, ulysses=4), []),  # as meant: the ring joins the machines
        ("aabb", Topology(ring=4), []),
        ("aaaa", Topology(ring=2, ulysses=2), []),
        ("aaab", Topology(cfg=2, ring=2), ["ring"]),  # one ring is within a machine, the other is not
        ("aaab", Topology(ring=4), ["ring"]),
        ("aaab", Topology(ulysses=4), ["ulysses"]),
        ("aabb", Topology(ulysses=4), ["ulysses"]),
        ("abab", Topology(cfg=2, ulysses=2), ["ulysses"]),
        ("aaab", Topology(ring=2, ulysses=2), ["ulysses", "ring"]),
    ],
)
def test_axes_that_wait_for_the_network_without_need_are_warned_of(
    hosts: str, topology: Topology, axes: list[str]
) -> None:
    warnings = topology.crossings([f"host-{host}:boot" for host in hosts])
    assert [one.partition(":")[0] for one in warnings] == axes
    assert all("Ranks by machine: host-a (" in one for one in warnings)
