"""Rehearsal of a job: what one rank of each kind would compute, hold, send and launch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from runtime.models.wan.folder import ModelKind, knows_frames
from runtime.models.wan.parts import HALO
from runtime.parallel.sequence import Split
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.engine import RehearsedEngine
from runtime.rehearsal.fake import DEVICE
from runtime.rehearsal.ledger import Memory
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.peers import FakeRanks
from runtime.rehearsal.phases import Phase, Rehearser, Steps
from runtime.rehearsal.settings import RehearsedProfile
from runtime.request.config import Config
from runtime.request.memory import Memory as MemoryOptions
from runtime.request.video_request import VideoRequest
from runtime.sampling.plan import Plan
from spectrum import StepKind

OnLoaded: TypeAlias = Callable[[RehearsedEngine, Phase], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A job to rehearse.

    Attributes:
        config, request: the job's config and request.
        degrees: requested topology.
        ranks: number of ranks, each on a GPU of its own.
        gpu: the GPU.
        auto: memory options that were `auto` before they were decided.
    """

    config: Config
    request: VideoRequest
    degrees: Degrees
    ranks: int
    gpu: Gpu
    auto: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankFindings:
    """Findings of one rank, which hold for all ranks of its kind.

    Attributes:
        rank: rank that was rehearsed.
        alike: all ranks that would do the same, itself included.
        experts: number of transformers that it has.
        tokens, heads: its shares of a branch's tokens, and of the heads within attention.
        load, encode, decode: these phases as a whole.
        steps: its denoising steps.
    """

    rank: int
    alike: tuple[int, ...]
    experts: int
    tokens: int
    heads: int
    load: Phase
    encode: Phase
    steps: Steps
    decode: Phase

    @property
    def peaks(self) -> dict[str, Memory]:
        """Peak memory of each phase."""
        return {
            "load": self.load.memory,
            "encode": self.encode.memory,
            "denoise": self.steps.memory,
            "decode": self.decode.memory,
        }

    @property
    def peak(self) -> int:
        """Peak memory of all phases, in bytes."""
        return max(memory.peak for memory in self.peaks.values())


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Findings of a rehearsal.

    Attributes:
        scenario: the job.
        source: origin of the model's settings.
        parameters: number of the transformers' parameters.
        topology, attention: topology and attention kernel that the job would choose.
        tokens: tokens of a branch in one window.
        windows, segments: number of the video's windows, and of the segments that are denoised one by one.
        computed, forecast: steps of each kind in a segment, as far as they are known before the job runs.
        ranks: findings of the ranks that were rehearsed, the first rank's first.
    """

    scenario: Scenario
    source: str
    parameters: int
    topology: Topology
    attention: str
    tokens: int
    windows: int
    segments: int
    computed: int
    forecast: int
    ranks: tuple[RankFindings, ...]

    @property
    def peak(self) -> int:
        """Peak memory of all ranks, in bytes."""
        return max(one.peak for one in self.ranks)

    @property
    def room(self) -> int:
        """Bytes left on the fullest GPU; negative if the job does not fit."""
        return self.scenario.gpu.room(self.peak)

    @property
    def fits(self) -> bool:
        """True if the job fits on every GPU."""
        return self.room >= 0

    @property
    def decided(self) -> dict[str, str]:
        """Memory options that were `auto` → what was decided."""
        return {name: getattr(self.scenario.config.memory, name) for name in self.scenario.auto}


class WeightsDoNotFitError(Exception):
    """The weights alone do not fit on a rank's GPU.

    Attributes:
        experts: number of transformers that the rank has.
    """

    def __init__(self, experts: int):
        super().__init__(experts)
        self.experts = experts


def rehearse(scenario: Scenario, ranks: list[int] | None = None) -> Rehearsal:
    """Rehearse a job. Memory options that are `auto` are decided by its first rank, which holds the most.

    Args:
        scenario: the job.
        ranks: ranks to rehearse; by default the first, and of the others the one with the most work.

    Raises:
        BadRequestError: the job would be refused before anything starts, or its model's settings are unknown.
    """
    if scenario.config.memory.undecided:
        found = _rehearse_decided(scenario, lambda *_: None)
        return found if ranks == [0] else _rehearse(found.scenario, ranks, lambda *_: None)
    return _rehearse(scenario, ranks, lambda *_: None)


def rehearse_if_weights_fit(scenario: Scenario) -> Rehearsal:
    """Rehearse a job by its first rank, which holds the most.

    Raises:
        BadRequestError: as of `rehearse`.
        WeightsDoNotFitError: its weights alone do not fit; nothing more was rehearsed.
    """

    return _rehearse_decided(scenario, _check_weights(scenario.gpu))


def _check_weights(gpu: Gpu) -> OnLoaded:
    def check(engine: RehearsedEngine, load: Phase) -> None:
        if gpu.room(load.memory.peak) < 0:
            raise WeightsDoNotFitError(len(engine.loaded.experts))

    return check


def _rehearse_decided(scenario: Scenario, on_loaded: OnLoaded) -> Rehearsal:
    """Rehearse a job by its first rank, in the first of the `ways` in which it fits, else in the last."""
    *others, last = ways(scenario.config.memory)
    auto = scenario.config.memory.undecided

    def having(memory: MemoryOptions) -> Scenario:
        return replace(scenario, config=scenario.config.model_copy(update={"memory": memory}), auto=auto)

    for memory in others:
        with suppress(WeightsDoNotFitError):
            found = _rehearse(having(memory), [0], _check_weights(scenario.gpu))
            if found.fits:
                return found
    return _rehearse(having(last), [0], on_loaded)


def ways(memory: MemoryOptions) -> list[MemoryOptions]:
    """Ways to decide the memory options that are `auto`, the one that costs the least time first.

    The VAE is smaller than the text encoder, so that it leaves the device later.
    """
    found = [memory.decided(text_encoder="keep", vae="keep")]
    for place in ({"text_encoder": "offload", "vae": "keep"}, {"text_encoder": "offload", "vae": "offload"}):
        decided = memory.decided(**place)
        found += [decided] if decided != found[-1] else []
    return found


def _rehearse(scenario: Scenario, ranks: list[int] | None, on_loaded: OnLoaded) -> Rehearsal:
    profile = RehearsedProfile(scenario.config)
    scenario = _completed(scenario, profile)
    engine, plan = _open(scenario, profile, 0)
    tokens = engine.sizes.tokens(scenario.config.windowed(scenario.request))
    kinds = _kinds_of_ranks(plan, tokens, engine.heads, _decoded(engine, scenario))
    wanted = _two_of(kinds) if ranks is None else ranks
    found = []
    for rank in wanted:
        if rank != 0:
            engine, plan = _open(scenario, profile, rank)
        rehearser = Rehearser(engine, plan)
        load = rehearser.load()
        on_loaded(engine, load)
        alike = next(kind for kind in kinds if rank in kind)
        found.append(_after(load, rehearser, engine, plan, tokens, alike))
    decided = plan.kinds[: plan.steps]
    return Rehearsal(
        scenario=scenario,
        source=profile.source,
        parameters=engine.parameters,
        topology=plan.topology,
        attention=plan.attention,
        tokens=tokens,
        windows=len(plan.windows),
        segments=plan.segments,
        computed=decided.count(StepKind.COMPUTE),
        forecast=decided.count(StepKind.FORECAST),
        ranks=tuple(found),
    )


def every_kind(scenario: Scenario) -> list[int]:
    """List the first rank of each kind; ranks of one kind do the same work."""
    profile = RehearsedProfile(scenario.config)
    scenario = _completed(scenario, profile)
    engine, plan = _open(scenario, profile, 0)
    tokens = engine.sizes.tokens(scenario.config.windowed(scenario.request))
    return [kind[0] for kind in _kinds_of_ranks(plan, tokens, engine.heads, _decoded(engine, scenario))]


def _completed(scenario: Scenario, profile: RehearsedProfile) -> Scenario:
    """Decide the request's preset, and add an image if the model needs one; any gives the same findings."""
    scenario = replace(scenario, request=profile.decided(scenario.request)[0])
    given = scenario.request.image is not None
    if given or profile.folder.pipeline != ModelKind.IMAGE or knows_frames(profile.folder.path):
        return scenario
    return replace(scenario, request=scenario.request.model_copy(update={"image": "made up"}))


def _open(scenario: Scenario, profile: RehearsedProfile, rank: int) -> tuple[RehearsedEngine, Plan]:
    ranks = FakeRanks(DEVICE, rank, scenario.ranks, scenario.gpu.per_node)
    engine = RehearsedEngine(scenario.config, profile, ranks, scenario.degrees, scenario.gpu)
    return engine, engine.plan(scenario.request)


def _after(
    load: Phase,
    rehearser: Rehearser,
    engine: RehearsedEngine,
    plan: Plan,
    tokens: int,
    alike: tuple[int, ...],
) -> RankFindings:
    """Rehearse what follows loading on one rank; findings of all phases."""
    place = plan.topology.place(engine.ranks.rank)
    encode = rehearser.encode()
    run, steps = rehearser.denoise()
    decode = rehearser.decode(run)
    return RankFindings(
        rank=engine.ranks.rank,
        alike=alike,
        experts=len(engine.loaded.experts),
        tokens=Split.even(tokens, plan.topology.sequence).sizes[place.sequence],
        heads=Split.even(engine.heads, plan.topology.ulysses).sizes[place.ulysses],
        load=load,
        encode=encode,
        steps=steps,
        decode=decode,
    )


def _kinds_of_ranks(plan: Plan, tokens: int, heads: int, decoded: list[Any]) -> list[tuple[int, ...]]:
    """Group ranks by the work that they do: their shares of tokens and heads, and their neighbours'.

    Groups with the most work come first.

    Args:
        plan: the plan.
        tokens, heads: numbers of all tokens and heads.
        decoded: each rank's share of a frame that is decoded, in any form that can be compared.
    """
    topology = plan.topology
    shares, of_heads = Split.even(tokens, topology.sequence), Split.even(heads, topology.ulysses)
    ring = shares.merge(topology.ulysses).sizes
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank in range(topology.world):
        place = topology.place(rank)
        own = (shares.sizes[place.sequence], of_heads.sizes[place.ulysses])
        following = ring[(place.ring + 1) % topology.ring]  # the one share that this rank does not pass on
        kinds[(*own, decoded[rank], ring[place.ring], following, rank == 0)].append(rank)
    return [tuple(kinds[key]) for key in sorted(kinds, reverse=True)]


def _two_of(kinds: list[tuple[int, ...]]) -> list[int]:
    """Choose the first rank, and of the others one with the most work."""
    return [0, *[kind[0] for kind in kinds if 0 not in kind][:1]]


def _decoded(engine: RehearsedEngine, scenario: Scenario) -> list[tuple[int, ...]]:
    """Each rank's share of a frame that is decoded: tiles, or rows and how many neighbours they have."""
    world, request = scenario.ranks, scenario.request
    rows, columns = engine.sizes.shape(request)[3:]
    parts = engine.parts(None, torch.empty((1, 1, 1, rows, columns), device="meta"))
    if parts is None:
        return [(0,)] * world
    if parts == HALO:
        strips = Split.even(rows, min(world, rows)).sizes
        ends = (0, len(strips) - 1)
        of_rank = [(size, 2 - (rank in ends)) for rank, size in enumerate(strips)]
        return [*of_rank, *[(0,)] * (world - len(strips))]
    down, across = (-(-size // parts.stride) for size in (request.height, request.width))
    tiles = down * across
    return [(tiles // world + (rank < tiles % world),) for rank in range(world)]
