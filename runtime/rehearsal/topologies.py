"""Every topology of a job's number of ranks, rehearsed side by side."""

from __future__ import annotations

from dataclasses import replace

from runtime.errors import BadRequestError
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.account import seconds
from runtime.rehearsal.rehearse import Rehearsal, Scenario, rehearse


def topologies(scenario: Scenario) -> list[Rehearsal]:
    """Rehearse a job in every topology of its number of ranks that has the requested degrees.

    Args:
        scenario: the job.

    Returns:
        One rehearsal per topology, by its first rank, which holds the most; those that fit come first, the
        one with the shortest estimated denoising before the others.
    """
    found = []
    for one in Topology.every(scenario.ranks, guided=scenario.request.guided, wanted=scenario.degrees):
        degrees = Degrees(one.cfg, one.ring, one.ulysses)
        try:
            found.append(rehearse(replace(scenario, degrees=degrees), [0]))
        except BadRequestError:  # more ranks than heads or tokens
            continue
    return sorted(found, key=lambda one: (not one.fits, seconds(one)["denoise"]))
