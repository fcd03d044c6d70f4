"""Where a job's text encoder and VAE rest on a machine if its config leaves that open (`auto`).

A rehearsal with the memory that the device had free before the model was loaded decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from runtime.errors import BadRequestError
from runtime.files.text import read_json
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.rehearse import Scenario, WeightsDoNotFitError, rehearse_if_weights_fit, ways
from runtime.rehearsal.settings import RehearsedProfile
from runtime.request.config import Config
from runtime.request.memory import Memory

_GIB = 2**30
_ANY = 1.0  # of speeds, which do not matter here
_SAME = {"prompt": "rehearsed", "negative": "", "travel": (), "seed": 0}  # what changes no peak


@dataclass(frozen=True, slots=True)
class Placed:
    """Decided memory options.

    Attributes:
        memory: the options, none of which is `auto`.
        reason: sentence about what was decided, and why.
    """

    memory: Memory
    reason: str


def card_with(free: int, per_node: int = 1) -> Gpu:
    """A GPU of which nothing matters but its free memory, in bytes."""
    return Gpu(
        name="this GPU",
        memory_gib=free / _GIB,
        bfloat16_tflops=_ANY,
        tf32_tflops=_ANY,
        float32_tflops=_ANY,
        fp8_tflops=_ANY,
        memory_gbps=_ANY,
        link_gbps=_ANY,
        network_gbps=_ANY,
        per_node=per_node,
    )


def decide(scenario: Scenario, host: int) -> Placed:
    """Decide the memory options of a job that are `auto`.

    Args:
        scenario: the job, on a GPU with the memory that is free for a rank; see `card_with`.
        host: bytes of host memory that are free.
    """
    memory, why = _decided(
        replace(
            scenario,
            config=scenario.config.model_copy(update={"lora": ()}),
            request=scenario.request.model_copy(update=_SAME),
        )
    )
    open_ones = scenario.config.memory.undecided
    if "text_encoder" in open_ones and memory.text_encoder == "offload":
        size = _text_bytes(scenario.config)
        if size > host:
            memory = memory.model_copy(update={"text_encoder": "free"})
            why += f"; the host has {_gib(host)} for {_gib(size)} of the text encoder"
    said = ", ".join(f"{name}: {getattr(memory, name)}" for name in open_ones)
    return Placed(memory, f"{said} ({why})")


@lru_cache(maxsize=64)
def _decided(scenario: Scenario) -> tuple[Memory, str]:
    """Find the first way that fits, or the last; and why."""
    *others, last = ways(scenario.config.memory)
    free, why = _gib(scenario.gpu.memory), ""
    for memory in others:
        config = scenario.config.model_copy(update={"memory": memory})
        try:
            found = rehearse_if_weights_fit(replace(scenario, config=config))
        except WeightsDoNotFitError:
            why = why or f"otherwise the weights alone do not fit in {free} that are free"
            continue
        except BadRequestError as error:
            return last, f"the job cannot be rehearsed: {error}"
        held, room = _gib(found.peak), _gib(abs(found.room))
        if found.fits:
            told = f"tensors hold at most {held} of {free} that are free; {room} left after losses"
            return memory, f"{told}; {why}" if why else told
        why = why or f"otherwise tensors hold {held} of {free} that are free; {room} missing after losses"
    return last, why


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


@lru_cache(maxsize=16)
def _text_bytes(config: Config) -> int:
    """Bytes of the text encoder; 0 if its settings are unknown."""
    from transformers import UMT5Config, UMT5EncoderModel

    try:
        path = RehearsedProfile(config).folder.path / "text_encoder" / "config.json"
    except BadRequestError:
        return 0
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_dict(read_json(path)))
    count: int = sum(one.numel() for one in encoder.parameters())
    return count * config.dtype.of("text_encoder").itemsize
