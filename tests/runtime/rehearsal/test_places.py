"""Memory options that are `auto`: what a rehearsal decides, to the byte, and that no result depends on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from runtime.engine import Engine
from runtime.jobs.run import generate_shown, silent
from runtime.media.mp4 import FrameBuffer
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.rehearsal.account import to_json
from runtime.rehearsal.machine import FRAGMENTED, RESERVE
from runtime.rehearsal.options import first_that_fits
from runtime.rehearsal.places import card_with, decide
from runtime.rehearsal.rehearse import Rehearsal, Scenario, rehearse
from runtime.request.config import Config, load_config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from tests.ranks import WarmRanks

BOTH = Memory(text_encoder="auto", vae="auto")
KEPT, OFFLOADED = Memory(), Memory(text_encoder="offload", vae="offload")
TEXT_OFFLOADED = Memory(text_encoder="offload")
PLENTY = 10**12
LONG, SHORT = 241, 5  # frames


def tiny(memory: Memory) -> Config:
    return load_config("wan-tiny").model_copy(update={"memory": memory, "window": None})


def request_of(config: Config, prompt: str = "a red circle", frames: int = SHORT) -> VideoRequest:
    """A small request; with many frames, denoising needs more memory than decoding."""
    size = {"width": 32, "height": 32, "frames": frames, "steps": 8, "max_sequence_length": 32}
    return config.request(prompt, spectrum="paper", **size)


def scenario(memory: Memory, free: int, ranks: int = 1, frames: int = LONG) -> Scenario:
    config = tiny(memory)
    return Scenario(config, request_of(config, frames=frames), Degrees(), ranks, card_with(free))


def needed(found: Rehearsal) -> int:
    """The least memory in which a job fits."""
    return RESERVE + int(found.peak * (1 + FRAGMENTED))


@cache
def rehearsed(memory: Memory) -> Rehearsal:
    return rehearse(scenario(memory, PLENTY), [0])


def test_each_is_decided_to_the_byte() -> None:
    all_kept, vae_kept = needed(rehearsed(KEPT)), needed(rehearsed(TEXT_OFFLOADED))
    assert needed(rehearsed(OFFLOADED)) < vae_kept < all_kept  # or the cases below say nothing
    cases = [
        (PLENTY, KEPT),
        (all_kept, KEPT),
        (all_kept - 1, TEXT_OFFLOADED),
        (vae_kept, TEXT_OFFLOADED),
        (vae_kept - 1, OFFLOADED),
        (1, OFFLOADED),
    ]
    for free, memory in cases:
        assert decide(scenario(BOTH, free), PLENTY).memory == memory, free


def test_what_is_not_auto_stays() -> None:
    least = scenario(Memory(text_encoder="auto"), 1)
    assert decide(least, PLENTY).memory == TEXT_OFFLOADED
    assert decide(scenario(Memory(vae="auto"), 1), PLENTY).memory == Memory(vae="offload")
    freed = Memory(text_encoder="free", vae="auto", history="offload")
    assert decide(scenario(freed, PLENTY), 0).memory == Memory(text_encoder="free", history="offload")


def test_a_text_encoder_for_which_the_host_has_no_room_is_freed() -> None:
    engine = Engine(tiny(KEPT))
    weights = engine.loaded.text._encoder.parameters()  # type: ignore[attr-defined]
    size = sum(one.nbytes for one in weights)
    assert decide(scenario(BOTH, 1), size).memory == OFFLOADED
    found = decide(scenario(BOTH, 1), size - 1)
    assert found.memory == Memory(text_encoder="free", vae="offload")
    assert "text_encoder: free, vae: offload" in found.reason and "the host has" in found.reason


def test_the_reason_names_what_was_rehearsed() -> None:
    assert "tensors hold at most 0.0 GiB of 931.3 GiB" in decide(scenario(BOTH, PLENTY), PLENTY).reason
    least = needed(rehearsed(KEPT))
    assert "missing after losses" in decide(scenario(BOTH, least - 1), PLENTY).reason
    assert "weights alone do not fit" in decide(scenario(BOTH, 1), PLENTY).reason


def test_a_job_that_cannot_be_rehearsed_offloads() -> None:
    given = scenario(BOTH, PLENTY)
    given = replace(given, config=given.config.model_copy(update={"attention": "xfuser"}))
    found = decide(given, PLENTY)
    assert found.memory == OFFLOADED and "cannot be rehearsed: attention: 'xfuser' given" in found.reason


def test_a_rehearsal_decides_and_says_so() -> None:
    least = needed(rehearsed(KEPT))
    for free, memory in ((least, KEPT), (least - 1, TEXT_OFFLOADED)):
        found, plain = rehearse(scenario(BOTH, free)), rehearse(scenario(memory, free))
        assert found.ranks == plain.ranks and found.fits
        assert to_json(found)["memory"] == to_json(plain)["memory"] == memory.model_dump()
        assert (
            found.decided
            == to_json(found)["auto"]
            == {
                "text_encoder": memory.text_encoder,
                "vae": memory.vae,
            }
        )
        assert plain.decided == to_json(plain)["auto"] == {}
    fitting = first_that_fits(scenario(BOTH, least - 1))
    assert fitting is not None and fitting.changes == {"memory.text_encoder": "offload"}


def test_nothing_is_decided_on_a_cpu() -> None:
    """Weights are where they were by default, and so are the bits."""
    engine, plain = Engine(tiny(BOTH)), Engine(tiny(KEPT))
    assert engine.places.memory == KEPT and engine.places.room is None
    assert engine.loaded.text._encoder is not None  # type: ignore[attr-defined]
    frames = [FrameBuffer(), FrameBuffer()]
    for one, sink in zip((engine, plain), frames, strict=True):
        result = generate_shown(one, one.plan(request_of(one.config)), [sink], silent)
        assert result.memory == KEPT
    assert np.array_equal(frames[0].frames, frames[1].frames)


@dataclass(frozen=True, slots=True)
class Made:
    """What a rank was told for each video, if it has a text encoder afterwards, and digests of frames."""

    memory: list[Memory]
    has_encoder: list[bool]
    digests: list[list[str]]


def made(ranks: Ranks, memory: Memory, rooms: list[int]) -> Made:
    """Make a video, then others after the ranks' devices are said to have had so much room."""
    engine = Engine(tiny(memory), ranks)
    found = Made([], [], [])
    for number, room in enumerate([0, *rooms]):
        if number:
            engine.places.room = room if ranks.is_leader else PLENTY
            engine.places.host = 0 if room == 1 else PLENTY
        plan = engine.plan(request_of(engine.config, f"a circle, {number}"))
        result = generate_shown(engine, plan, [FrameBuffer()] if ranks.is_leader else [], silent)
        found.memory.append(result.memory)
        found.has_encoder.append(engine.loaded.text._encoder is not None)  # type: ignore[attr-defined]
        found.digests.append(result.frames_sha256)
    return found


def test_all_ranks_are_told_what_the_first_decides(warm: WarmRanks) -> None:
    fits = needed(rehearse(scenario(KEPT, PLENTY, ranks=2, frames=SHORT), [0]))
    rooms = [fits - 1, 1, fits]
    first, second = warm.run(2, made, BOTH, rooms)
    freed = Memory(text_encoder="free", vae="offload")
    assert first.memory == second.memory == [KEPT, TEXT_OFFLOADED, freed, KEPT]
    assert first.has_encoder == [True, True, False, True] and not any(second.has_encoder)
    assert first.digests == warm.run(2, made, KEPT, rooms)[0].digests
