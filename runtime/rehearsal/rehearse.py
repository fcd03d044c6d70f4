"""A job, rehearsed: each kind of rank once, with what it would compute, hold, send and launch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from runtime.models.wan.folder import ModelKind
from runtime.parallel.sequence import Split
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.engine import RehearsedEngine
from runtime.rehearsal.ledger import Memory
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.made_up import DEVICE
from runtime.rehearsal.peers import MadeUpRanks
from runtime.rehearsal.phases import Phase, Rehearser, Steps
from runtime.rehearsal.settings import RehearsedProfile
from runtime.request.config import Config, Tiles
from runtime.request.video_request import VideoRequest
from runtime.sampling.plan import Plan
from spectrum import StepKind


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be rehearsed.

    Attributes:
        ranks: how many would run it, each on a GPU of its own.
    """

    config: Config
    request: VideoRequest
    degrees: Degrees
    ranks: int
    gpu: Gpu


@dataclass(frozen=True, slots=True)
class RankFindings:
    """One rank, and all that are like it.

    Attributes:
        rank: that was rehearsed.
        alike: all ranks that would do the same, itself included.
        tokens, heads: its share of a branch's sequence, and of the heads within attention.
        load, encode, decode: each as a whole.
    """

    rank: int
    alike: tuple[int, ...]
    tokens: int
    heads: int
    load: Phase
    encode: Phase
    steps: Steps
    decode: Phase

    @property
    def peaks(self) -> dict[str, Memory]:
        """The most that it holds in each phase."""
        return {
            "load": self.load.memory,
            "encode": self.encode.memory,
            "denoise": self.steps.memory,
            "decode": self.decode.memory,
        }

    @property
    def peak(self) -> int:
        """The most that it ever holds, in bytes."""
        return max(memory.peak for memory in self.peaks.values())


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What is known of a job that was not run.

    Attributes:
        source: where the model's settings are from.
        parameters: of the transformer.
        tokens: of a branch's whole sequence in one window.
        windows, segments: of the video, and how often there is something to denoise.
        computed, forecast: steps of each kind in a segment, as far as they are known before the job runs.
        ranks: the kinds of ranks that were rehearsed, the first rank's first.
    """

    asked: Asked
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
        """The most that any rank ever holds, in bytes."""
        return max(one.peak for one in self.ranks)

    @property
    def room(self) -> int:
        """Bytes left on the GPU that has the least; below 0 it does not fit."""
        return self.asked.gpu.room(self.peak)

    @property
    def fits(self) -> bool:
        return self.room >= 0


def rehearse(asked: Asked, ranks: list[int] | None = None) -> Rehearsal:
    """Rehearse a job.

    Args:
        ranks: that are wanted; by default the first, and of the others the one with the most to do.

    Raises:
        BadRequestError: the job would be refused before anything starts, or nothing is known of its model.
    """
    profile = RehearsedProfile(asked.config)
    asked = _with_image(asked, profile)
    engine, plan = _open(asked, profile, 0)
    tokens = engine.sizes.tokens(asked.config.windowed(asked.request))
    kinds = _kinds_of_ranks(plan, tokens, engine.heads, _tiles(engine, asked))
    wanted = _two_of(kinds) if ranks is None else ranks
    found = []
    for rank in wanted:
        if rank != 0:
            engine, plan = _open(asked, profile, rank)
        found.append(_rehearse_one(engine, plan, tokens, next(k for k in kinds if rank in k)))
    decided = plan.preset.expected_kinds(plan.steps)
    return Rehearsal(
        asked=asked,
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


def every_kind(asked: Asked) -> list[int]:
    """The first rank of each kind."""
    profile = RehearsedProfile(asked.config)
    asked = _with_image(asked, profile)
    engine, plan = _open(asked, profile, 0)
    tokens = engine.sizes.tokens(asked.config.windowed(asked.request))
    return [kind[0] for kind in _kinds_of_ranks(plan, tokens, engine.heads, _tiles(engine, asked))]


def _with_image(asked: Asked, profile: RehearsedProfile) -> Asked:
    """With an image where the model needs one: which, makes no difference."""
    if profile.folder.pipeline != ModelKind.IMAGE or asked.request.image is not None:
        return asked
    return replace(asked, request=asked.request.model_copy(update={"image": "made up"}))


def _open(asked: Asked, profile: RehearsedProfile, rank: int) -> tuple[RehearsedEngine, Plan]:
    ranks = MadeUpRanks(DEVICE, rank, asked.ranks, asked.gpu.per_node)
    engine = RehearsedEngine(asked.config, profile, ranks, asked.degrees, asked.gpu)
    return engine, engine.plan(asked.request)


def _rehearse_one(engine: RehearsedEngine, plan: Plan, tokens: int, alike: tuple[int, ...]) -> RankFindings:
    rehearser, place = Rehearser(engine, plan), plan.topology.place(engine.ranks.rank)
    load, encode = rehearser.load(), rehearser.encode()
    run, steps = rehearser.denoise()
    decode = rehearser.decode(run)
    return RankFindings(
        rank=engine.ranks.rank,
        alike=alike,
        tokens=Split.even(tokens, plan.topology.sequence).sizes[place.sequence],
        heads=Split.even(engine.heads, plan.topology.ulysses).sizes[place.ulysses],
        load=load,
        encode=encode,
        steps=steps,
        decode=decode,
    )


def _kinds_of_ranks(plan: Plan, tokens: int, heads: int, tiles: int) -> list[tuple[int, ...]]:
    """Ranks that do the same: equal shares of tokens and heads among equal peers, and as many tiles.

    Those with the most to do come first.
    """
    topology = plan.topology
    shares, of_heads = Split.even(tokens, topology.sequence), Split.even(heads, topology.ulysses)
    ring = shares.merge(topology.ulysses).sizes
    kinds: dict[tuple[int | bool, ...], list[int]] = defaultdict(list)
    for rank in range(topology.world):
        place = topology.place(rank)
        own = (shares.sizes[place.sequence], of_heads.sizes[place.ulysses])
        decoded = tiles // topology.world + (rank < tiles % topology.world)
        following = ring[(place.ring + 1) % topology.ring]  # what this rank does not pass on
        kinds[(*own, decoded, ring[place.ring], following, rank == 0)].append(rank)
    return [tuple(kinds[key]) for key in sorted(kinds, reverse=True)]


def _two_of(kinds: list[tuple[int, ...]]) -> list[int]:
    """The first rank, and of the others one with the most to do."""
    return [0, *[kind[0] for kind in kinds if 0 not in kind][:1]]


def _tiles(engine: RehearsedEngine, asked: Asked) -> int:
    """How many tiles a frame is decoded in; none if it is decoded whole."""
    tiles: Tiles | None = asked.config.tiles
    if tiles is None:
        return 0
    rows, columns = (-(-size // tiles.stride) for size in (asked.request.height, asked.request.width))
    return rows * columns
