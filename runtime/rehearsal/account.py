"""A rehearsal as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from runtime.rehearsal.estimate import Estimate, estimate
from runtime.rehearsal.ledger import Memory
from runtime.rehearsal.options import Option
from runtime.rehearsal.phases import Phase
from runtime.rehearsal.rehearse import RankFindings, Rehearsal

SCHEMA = 1
COUNTED = (
    "operations of attention, products of matrices and convolutions; launches, as operators of torch that "
    "compute or copy; bytes sent, by axis, and copied between device and host; bytes held by tensors on the "
    "device"
)
ESTIMATED = (
    "seconds: a roofline with assumed shares of the makers' speeds; whether it fits: 2 GiB and 5 % of what "
    "tensors hold are assumed to be lost to the CUDA context, communicators, workspaces and fragmentation; "
    "reading weights, a switch of experts, encoding mp4 and the host's work other than launching are left out"
)
UNMEASURED = (
    "nothing was run: this tells nothing about hangs, streams or numbers; one H100 confirmed memory within "
    "2 % and a computed step within 3 % (docs/gpu.md), several GPUs nothing; compiled blocks, xfuser's "
    "kernels and FSDP's own copies are not rehearsed"
)


def to_json(
    rehearsal: Rehearsal, options: Sequence[Option] = (), topologies: Sequence[Rehearsal] = ()
) -> dict[str, Any]:
    """Write a rehearsal as plain JSON; sizes in bytes, times in seconds.

    Args:
        rehearsal: the rehearsal.
        options: ways to make the job fit.
        topologies: the same job in other topologies.
    """
    scenario = rehearsal.scenario
    return {
        "schema": SCHEMA,
        "request": scenario.request.model_dump(mode="json", exclude={"prompt", "negative", "seed", "image"}),
        "model": {
            "name": scenario.config.model_name,
            "settings": rehearsal.source,
            "parameters": rehearsal.parameters,
            "dtype": scenario.config.dtype.model_dump(),
        },
        "memory": scenario.config.memory.model_dump(),
        "auto": rehearsal.decided,
        "decode": scenario.config.decoding,
        "tiles": None if scenario.config.tiles is None else scenario.config.tiles.model_dump(),
        "gpu": scenario.gpu.model_dump(),
        "topology": {"world": rehearsal.topology.world, **asdict(rehearsal.topology)},
        "attention": rehearsal.attention,
        "performance": asdict(scenario.config.performs),
        "tokens": rehearsal.tokens,
        "windows": rehearsal.windows,
        "segments": rehearsal.segments,
        "steps": {"computed": rehearsal.computed, "forecast": rehearsal.forecast},
        "fits": rehearsal.fits,
        "peak": rehearsal.peak,
        "room": rehearsal.room,
        "options": [_option(one.rehearsal) | {"changes": one.changes} for one in options],
        "topologies": [_option(one) | {"fits": one.fits} for one in topologies],
        "ranks": [_rank(one, rehearsal) for one in rehearsal.ranks],
        "estimated_seconds": seconds(rehearsal),
        "notes": {"counted": COUNTED, "estimated": ESTIMATED, "unmeasured": UNMEASURED},
    }


def _option(found: Rehearsal) -> dict[str, Any]:
    return {
        "topology": {"world": found.topology.world, **asdict(found.topology)},
        "peak": found.peak,
        "room": found.room,
        "estimated_seconds": seconds(found),
    }


def seconds(rehearsal: Rehearsal) -> dict[str, float]:
    """Estimated seconds of the whole job, for the slowest rank that was rehearsed."""
    first, steps = rehearsal.ranks[0], _slowest(rehearsal)
    found = {"encode": _estimate(first.encode, rehearsal).total, **steps}
    denoise = rehearsal.computed * steps["computed_step"] + rehearsal.forecast * steps["forecast_step"]
    decode = max(_estimate(one.decode, rehearsal).total for one in rehearsal.ranks)
    return found | {"denoise": rehearsal.segments * denoise, "decode": decode}


def _slowest(rehearsal: Rehearsal) -> dict[str, float]:
    computed = max(_estimate(one.steps.last, rehearsal).total for one in rehearsal.ranks)
    forecasts = [one.steps.forecast for one in rehearsal.ranks if one.steps.forecast is not None]
    forecast = max((_estimate(one, rehearsal).total for one in forecasts), default=0.0)
    return {"computed_step": computed, "forecast_step": forecast}


def _rank(found: RankFindings, rehearsal: Rehearsal) -> dict[str, Any]:
    steps = found.steps
    return {
        "rank": found.rank,
        "alike": list(found.alike),
        "tokens": found.tokens,
        "heads": found.heads,
        "memory": {phase: _memory(memory) for phase, memory in found.peaks.items()},
        "peak": found.peak,
        "history": {"bytes": steps.history, "kept": steps.kept},
        "load": {"sent": found.load.sent},
        "encode": _phase(found.encode, rehearsal),
        "first_computed_step": _phase(steps.first, rehearsal),
        "computed_step": _phase(steps.last, rehearsal),
        "forecast_step": None if steps.forecast is None else _phase(steps.forecast, rehearsal),
        "decode": _phase(found.decode, rehearsal),
    }


def _memory(memory: Memory) -> dict[str, int]:
    return {
        "peak": memory.peak,
        "weights": memory.weights,
        "history": memory.history,
        "activations": memory.activations,
    }


def _phase(phase: Phase, rehearsal: Rehearsal) -> dict[str, Any]:
    estimated = _estimate(phase, rehearsal)
    return {
        "flops": phase.work.flops,
        "moved": phase.work.moved,
        "launches": phase.work.launches,
        "bus": phase.work.crossed,
        "sent": phase.sent,
        "estimated_seconds": {**asdict(estimated), "total": estimated.total},
    }


def _estimate(phase: Phase, rehearsal: Rehearsal) -> Estimate:
    return estimate(phase, rehearsal.topology, rehearsal.scenario.gpu)
