"""Decides memory options of a loaded model that are `auto`, for each generation, the same on all ranks."""

from __future__ import annotations

import logging

from runtime.engine import Engine
from runtime.parallel.topology import Degrees
from runtime.request.memory import Memory
from runtime.sampling.plan import Plan

log = logging.getLogger(__name__)


def place(engine: Engine, plan: Plan) -> None:
    """Decide where idle weights are from this generation on; quick after the first of its size. Collective.

    The first rank, which alone has a text encoder, rehearses the plan with the memory that its device had
    free before the model was loaded. On a CPU there is nothing to decide.

    Args:
        engine: the loaded model.
        plan: what is about to run.
    """
    ranks = engine.ranks
    if engine.places.room is None:
        return
    own = None
    if ranks.is_leader:
        with ranks.busy("deciding where weights rest"):
            own = _decided(engine, plan, engine.places.room).model_dump()
    memory = Memory.model_validate(ranks.control.all_gather_object(own)[0])
    if memory != engine.places.memory:
        engine.loaded.rest(memory)
        engine.places.memory = memory


def _decided(engine: Engine, plan: Plan, room: int) -> Memory:
    from runtime.rehearsal.places import card_with, decide  # which imports what takes a while
    from runtime.rehearsal.rehearse import Scenario

    topology, per_node = plan.topology, engine.ranks.per_node
    degrees = Degrees(topology.cfg, topology.ring, topology.ulysses)
    gpu = card_with(room, per_node)
    scenario = Scenario(engine.config, plan.request, degrees, engine.ranks.size, gpu)
    placed = decide(scenario, engine.places.host)
    log.info("memory: %s", placed.reason)
    return placed.memory
