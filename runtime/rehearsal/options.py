"""What would make a job fit that does not: memory options of the config, and more ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.errors import BadRequestError
from runtime.parallel.topology import Degrees
from runtime.rehearsal.ledger import Memory
from runtime.rehearsal.rehearse import Asked, RankFindings, Rehearsal, rehearse
from runtime.request.config import Config, Tiles

_MOST_RANKS = 64
_ENOUGH = 3  # ways that are offered
_TILES = Tiles(size=256, stride=192)


@dataclass(frozen=True, slots=True)
class Option:
    """A way to make a job fit.

    Attributes:
        changes: field of the config → its value.
        rehearsal: of the job as it would be then, by its first rank, which holds the most.
    """

    changes: dict[str, str]
    rehearsal: Rehearsal


def options(asked: Asked) -> Iterator[Option]:
    """Ways to make a job fit that does not: first with its own number of ranks, then with more."""
    found, ranks, degrees = 0, asked.ranks, asked.degrees
    if asked.gpu.room(0) < 0:
        return
    while ranks <= max(_MOST_RANKS, asked.ranks) and found < _ENOUGH:
        option = _first_that_fits(replace(asked, ranks=ranks, degrees=degrees))
        if option is not None:
            found += 1
            yield option
        ranks, degrees = 2 * ranks, Degrees()


@dataclass(frozen=True, slots=True)
class _Remedy:
    """Something that lets a rank hold less.

    Attributes:
        field, value: of the config, as it is said.
        phases: in which it helps.
        helps: whether it could, with so many ranks and what was found so far.
        applied: the config with it.
    """

    field: str
    value: str
    phases: tuple[str, ...]
    helps: Callable[[Config, int, RankFindings], bool]
    applied: Callable[[Config], Config]


def _memory(**changes: str) -> Callable[[Config], Config]:
    return lambda config: config.model_copy(update={"memory": config.memory.model_copy(update=changes)})


_REMEDIES = (
    _Remedy(
        "memory.text_encoder",
        "offload",
        ("load", "denoise", "decode"),
        lambda config, *_: config.memory.text_encoder == "keep",
        _memory(text_encoder="offload"),
    ),
    _Remedy(
        "tiles",
        f"{{size: {_TILES.size}, stride: {_TILES.stride}}}",
        ("decode",),
        lambda config, *_: config.tiles is None,
        lambda config: config.model_copy(update={"tiles": _TILES}),
    ),
    _Remedy(
        "memory.history",
        "offload",
        ("denoise",),
        lambda config, _, found: config.memory.history == "keep" and found.steps.history > 0,
        _memory(history="offload"),
    ),
    _Remedy(
        "memory.transformer",
        "shard",
        ("load", "encode", "denoise", "decode"),
        lambda config, ranks, _: config.memory.transformer == "replicate" and ranks > 1,
        _memory(transformer="shard"),
    ),
)


def _first_that_fits(asked: Asked) -> Option | None:
    """As asked, with one remedy after the other for what does not fit; None if nothing helps."""
    remedies: list[_Remedy] = []
    try:
        found = rehearse(asked, [0])
        while not found.fits:
            remedy = _remedy(found)
            if remedy is None:
                return None
            remedies.append(remedy)
            found = rehearse(_with(asked, remedies), [0])
    except BadRequestError:  # so many ranks have no token each
        return None
    for remedy in remedies[:-1]:  # the last one may do without those before
        fewer = [one for one in remedies if one is not remedy]
        without = rehearse(_with(asked, fewer), [0])
        if without.fits:
            remedies, found = fewer, without
    return Option({remedy.field: remedy.value for remedy in remedies}, found)


def _with(asked: Asked, remedies: list[_Remedy]) -> Asked:
    config = asked.config
    for remedy in remedies:
        config = remedy.applied(config)
    return replace(asked, config=config)


def _remedy(rehearsal: Rehearsal) -> _Remedy | None:
    """The least costly that helps in the phase that holds the most."""
    asked, found = rehearsal.asked, rehearsal.ranks[0]

    def held(phase: str) -> int:
        memory: Memory = found.peaks[phase]
        return memory.peak

    worst = max(found.peaks, key=held)
    for remedy in _REMEDIES:
        if worst in remedy.phases and remedy.helps(asked.config, asked.ranks, found):
            return remedy
    return None
