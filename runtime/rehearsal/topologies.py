"""Every topology of a job's number of ranks, rehearsed side by side."""

from __future__ import annotations

from dataclasses import replace

from runtime.errors import BadRequestError
from runtime.parallel.topology import Degrees
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
    for degrees in _all_degrees(scenario):
        try:
            found.append(rehearse(replace(scenario, degrees=degrees), [0]))
        except BadRequestError:  # more ranks than heads or tokens
            continue
    return sorted(found, key=lambda one: (not one.fits, seconds(one)["denoise"]))


def _all_degrees(scenario: Scenario) -> list[Degrees]:
    wanted = scenario.degrees
    return [
        Degrees(cfg, scenario.ranks // cfg // ulysses, ulysses)
        for cfg in ((1, 2) if scenario.request.guided else (1,))
        if scenario.ranks % cfg == 0 and wanted.cfg in (None, cfg)
        for ulysses in range(1, scenario.ranks // cfg + 1)
        if scenario.ranks // cfg % ulysses == 0 and wanted.ulysses in (None, ulysses)
        if wanted.ring in (None, scenario.ranks // cfg // ulysses)
    ]
