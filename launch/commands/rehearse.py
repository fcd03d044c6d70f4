"""`lockstep rehearse`: shows what a job would compute, hold, send and launch on GPUs that need not exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from runtime.errors import BadRequestError
from runtime.models.configs import open_config
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.account import COUNTED, ESTIMATED, UNMEASURED, seconds
from runtime.rehearsal.estimate import estimate
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.options import Option
from runtime.rehearsal.phases import Phase
from runtime.rehearsal.rehearse import RankFindings, Rehearsal, Scenario
from runtime.request.config import Config
from runtime.request.performance import Profile, Quantization

_GIB = 2**30


def build_scenario(
    *,
    config: str | None,
    model: str | None = None,
    revision: str | None = None,
    gpu: str,
    ranks: int | None,
    ulysses: int | None,
    ring: int | None,
    cfg: int | None,
    attention: str | None,
    performance: Profile | None,
    quantization: Quantization | None,
    shard: bool | None,
    offload: bool,
    size: tuple[int, int] | None,
    **given: Any,
) -> Scenario:
    """Build the scenario to rehearse from options of the command line.

    Raises:
        BadRequestError: a name or value is not valid.
    """
    settings, degrees = open_config(config, model=model, revision=revision), Degrees(cfg, ring, ulysses)
    changes = {"attention": attention, "performance": performance, "quantization": quantization}
    settings = _changed(settings, changes, shard, offload)
    fields = {name: value for name, value in given.items() if value is not None}
    if size is not None:
        fields |= {"width": size[0], "height": size[1]}
    world = degrees.product if ranks is None else ranks
    return Scenario(settings, settings.request("rehearsed", **fields), degrees, world, load_gpu(gpu))


def _changed(config: Config, given: Mapping[str, str | None], shard: bool | None, offload: bool) -> Config:
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes["memory"] = config.memory.moved(shard=shard, offload=offload)
    return config.model_copy(update=changes)


def chosen_ranks(given: str | None, scenario: Scenario) -> list[int] | None:
    """Ranks to rehearse for `--rank`: one rank, or one of each kind for `all`; None for the default.

    Args:
        given: value of the option; None if it was not given.
        scenario: the scenario.

    Raises:
        BadRequestError: there is no such rank.
    """
    if given is None:
        return None
    if given == "all":
        from runtime.rehearsal.rehearse import every_kind

        return every_kind(scenario)
    if not given.isdecimal() or int(given) >= scenario.ranks:
        raise BadRequestError(f"rank: {given!r} given; it must be from 0 to {scenario.ranks - 1}, or all")
    return [int(given)]


def show(
    rehearsal: Rehearsal, name: str, options: Sequence[Option], topologies: Sequence[Rehearsal] = ()
) -> Iterator[str | Table]:
    """Yield the findings as sentences and tables.

    Args:
        rehearsal: the findings.
        name: name of the config.
        options: ways to make the job fit, if it does not.
        topologies: the same job in every topology, if they are to be compared.
    """
    yield from summary(rehearsal, name)
    if not rehearsal.fits:
        yield options_table(options)
    if topologies:
        yield topologies_table(topologies)
    yield from details(rehearsal)
    yield from notes()


def details(rehearsal: Rehearsal) -> Iterator[str | Table]:
    """Yield tables of each rank's memory and work."""
    for found in rehearsal.ranks:
        yield ""
        yield _called(found)
        yield _memory_table(found)
        yield _steps_table(found, rehearsal)


def summary(rehearsal: Rehearsal, name: str) -> list[str]:
    """Write the sentences above the tables: the scenario, whether it fits, and the estimated times."""
    scenario, took = rehearsal.scenario, seconds(rehearsal)
    request, gpu = scenario.request, scenario.gpu
    fits = "fits" if rehearsal.fits else "does NOT fit"
    guided = "both branches" if request.guided else "one branch"
    return [
        f"{name}: {request.width}x{request.height}, {request.frames} frames, {guided} of "
        f"{rehearsal.tokens:,} tokens; {rehearsal.parameters / 1e9:.2f} billion parameters, settings from "
        f"{_SOURCES[rehearsal.source]}",
        f"{arrangement(rehearsal.topology)} on {rehearsal.topology.world} × {gpu.name}, attention "
        f"{rehearsal.attention}, {scenario.config.performs.text}; {request.spectrum}: {rehearsal.computed} "
        f"steps computed, "
        f"{rehearsal.forecast} forecast",
        f"it {fits} in {gpu.memory_gib:g} GiB: tensors hold at most {rehearsal.peak / _GIB:.1f} GiB, and "
        f"after assumed losses {abs(rehearsal.room) / _GIB:.1f} GiB are "
        f"{'left' if rehearsal.fits else 'missing'}",
        *_decided(rehearsal),
        f"estimated, not measured: denoising {_time(took['denoise'])} ({_time(took['computed_step'])} per "
        f"computed step, {_time(took['forecast_step'])} per forecast step), encoding "
        f"{_time(took['encode'])}, decoding {_time(took['decode'])}",
    ]


def _decided(rehearsal: Rehearsal) -> list[str]:
    """Write what became of memory options that are `auto`."""
    found = ", ".join(f"{name}: {place}" for name, place in rehearsal.decided.items())
    return [f"memory options that are auto: {found}"] if found else []


def options_table(options: Sequence[Option]) -> Table | str:
    """Make the table of ways to make the job fit."""
    if not options:
        return "it would not fit on up to 64 such GPUs, even with everything offloaded and sharded"
    table = Table(title="It would fit as follows (seconds are estimated)")
    for column in ("GPUs", "cfg × ring × ulysses", "with", "peak, GiB", "denoising, s"):
        table.add_column(column, justify="left" if column == "with" else "right")
    for one in options:
        found, changes = one.rehearsal, [f"{field}: {value}" for field, value in one.changes.items()]
        table.add_row(
            str(found.topology.world),
            f"{found.topology.cfg} × {found.topology.ring} × {found.topology.ulysses}",
            "\n".join(changes) or "no change",
            f"{found.peak / _GIB:.1f}",
            f"{seconds(found)['denoise']:.3g}",
        )
    return table


def topologies_table(topologies: Sequence[Rehearsal]) -> Table:
    """Make the table that compares topologies."""
    table = Table(title="Topologies of this number of ranks (seconds are estimated)")
    for column in ("cfg × ring × ulysses", "fits", "peak, GiB", "sent, MB", "computed, s", "denoising, s"):
        table.add_column(column, justify="left" if column == "fits" else "right")
    for one in topologies:
        took, sent = seconds(one), sum(one.ranks[0].steps.last.sent.values())
        table.add_row(
            f"{one.topology.cfg} × {one.topology.ring} × {one.topology.ulysses}",
            "yes" if one.fits else "no",
            f"{one.peak / _GIB:.1f}",
            f"{sent / 1e6:,.0f}",
            f"{took['computed_step']:.3g}",
            f"{took['denoise']:.3g}",
        )
    table.caption = "By the first rank, which holds the most; sent, and computed: in one computed step."
    return table


def notes() -> list[str]:
    """Write how far to trust the numbers."""
    return [f"counted: {COUNTED}", f"estimated: {ESTIMATED}", f"unmeasured: {UNMEASURED}"]


_SOURCES = {"folder": "its folder", "cache": "the download cache", "published": "the published model"}


def arrangement(topology: Topology) -> str:
    """Write a topology with the names of its axes."""
    return f"cfg {topology.cfg} × ring {topology.ring} × ulysses {topology.ulysses}"


def _memory_table(found: RankFindings) -> Table:
    table = Table()
    table.add_column("peak memory, GiB")
    for phase in found.peaks:
        table.add_column(phase, justify="right")
    for part in ("peak", "weights", "history", "activations"):
        table.add_row(part, *(f"{getattr(one, part) / _GIB:.2f}" for one in found.peaks.values()))
    return table


def _steps_table(found: RankFindings, rehearsal: Rehearsal) -> Table:
    steps = found.steps
    columns = {"computed step": steps.last, "forecast step": steps.forecast, "decoding": found.decode}
    if found.rank == 0:
        columns = {"encoding": found.encode, **columns}
    there = {name: phase for name, phase in columns.items() if phase is not None}
    table = Table()
    table.add_column("work")
    for name in there:
        table.add_column(name, justify="right")
    for kind in ("attention", "linear", "convolution"):
        table.add_row(f"{kind}, TFLOP", *(_amount(p.work.flops.get(kind, 0) / 1e12) for p in there.values()))
    table.add_row("launches", *(f"{phase.work.launches:,}" for phase in there.values()))
    table.add_row("read and written, GB", *(_amount(p.work.moved / 1e9) for p in there.values()))
    for axis, name in _AXES.items():
        if any(phase.sent.get(axis) for phase in there.values()):
            table.add_row(f"sent, {name}, MB", *(_amount(p.sent.get(axis, 0) / 1e6) for p in there.values()))
    crossed = [p.work.crossed // 10**6 for p in there.values()]  # samplers copy some bytes at each step
    if any(crossed):
        table.add_row("host ↔ GPU, MB", *map(_amount, crossed))
    table.add_row("seconds, estimated", *(_estimated(phase, rehearsal) for phase in there.values()))
    return table


_AXES = {
    "cfg": "cfg",
    "ring": "ring",
    "ulysses": "ulysses",
    "sequence": "output",
    "everyone": "all ranks",
}


def _called(found: RankFindings) -> str:
    others = [str(rank) for rank in found.alike if rank != found.rank]
    alike = f"; the same for ranks {', '.join(others)}" if others else ""
    return f"rank {found.rank}: {found.tokens:,} tokens, {found.heads} heads in attention{alike}"


def _amount(value: float) -> str:
    return "" if not value else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _estimated(phase: Phase, rehearsal: Rehearsal) -> str:
    return f"{estimate(phase, rehearsal.topology, rehearsal.scenario.gpu).total:.3g}"


def _time(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s" if value >= 0.1 else f"{1000 * value:.1f} ms"
