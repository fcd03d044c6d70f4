"""Options that would make a job fit: memory options of the config, and more ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.errors import BadRequestError
from runtime.parallel.topology import Degrees
from runtime.rehearsal.ledger import Memory
from runtime.rehearsal.rehearse import (
    Rehearsal,
    Scenario,
    WeightsDoNotFitError,
    rehearse_if_weights_fit,
)
from runtime.request.config import Config

_MOST_RANKS = 64
_ENOUGH = 3  # options that are offered


@dataclass(frozen=True, slots=True)
class Option:
    """A way to make a job fit.

    Attributes:
        changes: field of the config → new value; also what `auto` became, unless that is to keep.
        rehearsal: rehearsal of the changed job, by its first rank, which holds the most.
    """

    changes: dict[str, str]
    rehearsal: Rehearsal


def options(scenario: Scenario) -> Iterator[Option]:
    """Yield ways to make a job fit: first with its own number of ranks, then with more."""
    found, ranks, degrees = 0, scenario.ranks, scenario.degrees
    if scenario.gpu.room(0) < 0:
        return
    while ranks <= max(_MOST_RANKS, scenario.ranks) and found < _ENOUGH:
        option = first_that_fits(replace(scenario, ranks=ranks, degrees=degrees))
        if option is not None:
            found += 1
            yield option
        ranks, degrees = 2 * ranks, Degrees()


@dataclass(frozen=True, slots=True)
class _Needs:
    """What decides whether a remedy could help a job.

    Attributes:
        config, ranks: config of the job, and its number of ranks.
        experts: number of transformers of a rank.
        history: bytes of a rank's history.
    """

    config: Config
    ranks: int
    experts: int
    history: int


@dataclass(frozen=True, slots=True)
class _Remedy:
    """A change of the config that reduces a rank's memory.

    Attributes:
        field, value: field of the config and its new value, as displayed.
        phases: phases in which it helps.
        helps: returns whether it could help a job.
        applied: returns the changed config.
    """

    field: str
    value: str
    phases: tuple[str, ...]
    helps: Callable[[_Needs], bool]
    applied: Callable[[Config], Config]


def _memory(**changes: str) -> Callable[[Config], Config]:
    return lambda config: config.model_copy(update={"memory": config.memory.model_copy(update=changes)})


_REMEDIES = (
    _Remedy(
        "memory.text_encoder",
        "offload",
        ("load", "denoise", "decode"),
        lambda job: job.config.memory.text_encoder == "keep",
        _memory(text_encoder="offload"),
    ),
    _Remedy(
        "memory.vae",
        "offload",
        ("load", "encode", "denoise"),
        lambda job: job.config.memory.vae == "keep",
        _memory(vae="offload"),
    ),
    _Remedy(
        "decode",
        "auto",
        ("decode",),
        lambda job: job.config.decoding == "whole" or (job.config.decoding == "tiles" and job.ranks > 1),
        lambda config: config.model_copy(update={"decode": "auto"}),
    ),
    _Remedy(
        "memory.history",
        "offload",
        ("denoise",),
        lambda job: job.config.memory.history == "keep" and job.history > 0,
        _memory(history="offload"),
    ),
    _Remedy(
        "memory.experts",
        "swap",
        ("load", "encode", "denoise", "decode"),
        lambda job: (
            job.experts > 1
            and job.config.memory.experts == "keep"
            and job.config.memory.transformer == "replicate"
        ),
        _memory(experts="swap"),
    ),
    _Remedy(
        "memory.transformer",
        "shard",
        ("load", "encode", "denoise", "decode"),
        lambda job: job.config.memory.transformer == "replicate" and job.ranks > 1,
        _memory(transformer="shard", experts="keep"),
    ),
    _Remedy(
        "memory.transformer",
        "offload",
        ("load", "encode", "denoise", "decode"),
        lambda job: job.config.memory.transformer != "offload",
        _memory(transformer="offload", experts="keep"),
    ),
)


def first_that_fits(scenario: Scenario) -> Option | None:
    """Apply one memory option after another until a job fits on its number of ranks.

    Args:
        scenario: the job.

    Returns:
        The fewest options that make it fit, none if it fits as it is; None if nothing helps.
    """
    remedies: list[_Remedy] = []
    try:
        while not isinstance(found := _rehearsed(_with(scenario, remedies)), Rehearsal):
            if found is None:
                return None
            remedies.append(found)
    except BadRequestError:  # more ranks than tokens
        return None
    for remedy in remedies[:-1]:  # the last one may make earlier ones unnecessary
        fewer = [one for one in remedies if one is not remedy]
        without = _rehearsed(_with(scenario, fewer))
        if isinstance(without, Rehearsal):
            remedies, found = fewer, without
    kept_off = {f"memory.{name}": place for name, place in found.decided.items() if place != "keep"}
    return Option(kept_off | {remedy.field: remedy.value for remedy in remedies}, found)


def _with(scenario: Scenario, remedies: list[_Remedy]) -> Scenario:
    config = scenario.config
    for remedy in remedies:
        config = remedy.applied(config)
    return replace(scenario, config=config)


def _rehearsed(scenario: Scenario) -> Rehearsal | _Remedy | None:
    """Rehearse a job by its first rank.

    Returns:
        Its rehearsal if it fits; else the least costly remedy that helps in the phase with the highest peak,
        which is the first if not even the weights fit; None if none does.
    """
    try:
        rehearsal = rehearse_if_weights_fit(scenario)
    except WeightsDoNotFitError as error:
        return _remedy(scenario, "load", error.experts, history=0)
    if rehearsal.fits:
        return rehearsal
    found = rehearsal.ranks[0]

    def held(phase: str) -> int:
        memory: Memory = found.peaks[phase]
        return memory.peak

    return _remedy(scenario, max(found.peaks, key=held), found.experts, found.steps.history)


def _remedy(scenario: Scenario, phase: str, experts: int, history: int) -> _Remedy | None:
    """Choose the least costly remedy that helps in a phase; None if none does."""
    needs = _Needs(scenario.config, scenario.ranks, experts, history)
    return next((one for one in _REMEDIES if phase in one.phases and one.helps(needs)), None)
