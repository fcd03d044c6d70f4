"""Spectrum on every family of diffusers: nothing changes when off, and schedules are obeyed when on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from spectrum import paper_schedule
from spectrum.diffusers import disable, enable, report
from spectrum.diffusers.blocks import FAMILIES as KNOWN
from tests.pipelines import FAMILIES, STEPS, Evaluations, Tiny

SCHEDULE = paper_schedule(STEPS)
CALLS = {"hunyuan_video": 1, "flux": 1, "cogvideox": 1, "ltx": 1, "mochi": 1, "sd3": 1, "z_image": 1}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(family: str) -> Tiny:
    return FAMILIES[family]()


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> torch.Tensor:
    """Latents of the pipeline as it comes."""
    latents = tiny.run()
    assert torch.isfinite(latents).all()
    return latents


@pytest.fixture(autouse=True)
def off(tiny: Tiny) -> Iterator[None]:
    yield
    disable(tiny.pipe)


def blocks(tiny: Tiny) -> list[nn.Module]:
    lists = KNOWN[type(tiny.pipe.transformer).__name__]
    return [block for name in lists for block in getattr(tiny.pipe.transformer, name)]


def attentions(tiny: Tiny) -> list[nn.Module]:
    """One module of each block, which runs whenever the block does."""
    return [
        next(part for name, part in block.named_children() if name.startswith("attn") or name == "attention")
        for block in blocks(tiny)
    ]


def test_off_is_the_plain_pipeline_bit_for_bit(tiny: Tiny, plain: torch.Tensor) -> None:
    enable(tiny.pipe, "off")
    assert torch.equal(tiny.run(), plain)
    told = report(tiny.pipe)["transformer"]
    assert (told.computed, told.forecast, told.bytes) == (tuple(range(STEPS)), (), 0)
    disable(tiny.pipe)
    assert torch.equal(tiny.run(), plain)
    registries = [getattr(module, "_diffusers_hook", None) for module in tiny.pipe.transformer.modules()]
    assert not [registry for registry in registries if registry is not None and registry.hooks]


@pytest.mark.parametrize("stream", ["feature", "velocity"])
def test_the_schedule_is_obeyed(tiny: Tiny, plain: torch.Tensor, family: str, stream: str) -> None:
    enable(tiny.pipe, "paper", stream=stream)
    ran = Evaluations(attentions(tiny))
    latents = tiny.run()
    told = report(tiny.pipe)["transformer"]
    assert told.computed == SCHEDULE.computed
    assert sorted(told.computed + told.forecast) == list(range(STEPS))
    calls = CALLS.get(family, 2)
    assert (told.evaluations, told.forecasts) == (calls * SCHEDULE.nfe, calls * (STEPS - SCHEDULE.nfe))
    assert set(ran.counts) == {calls * SCHEDULE.nfe}
    assert (told.restarts, told.unknown) == (0, 0)
    assert torch.isfinite(latents).all()
    assert 0.0 < (latents - plain).norm() / plain.norm() < 0.5
    assert torch.equal(tiny.run(), latents)  # nothing is left of the generation before


@pytest.mark.parametrize("stream", ["feature", "velocity"])
def test_memory_is_told(tiny: Tiny, stream: str) -> None:
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        values = output[place(tiny)] if isinstance(output, tuple) and stream == "feature" else output
        sizes.append(sum(v.numel() * v.element_size() for v in flat(values)))

    module = blocks(tiny)[-1] if stream == "feature" else tiny.pipe.transformer
    handle = module.register_forward_hook(note)
    enable(tiny.pipe, "paper", stream=stream)
    tiny.run()
    handle.remove()
    told = report(tiny.pipe)["transformer"]
    kept = len([step for step in told.computed if step < max(told.forecast)])
    assert told.bytes == kept * sizes[0] * told.evaluations // told.nfe


def place(tiny: Tiny) -> int:
    """Place of the image's tokens in what the last block returns."""
    names = KNOWN[type(tiny.pipe.transformer).__name__]
    return next(iter(reversed(names.values()))).index("hidden_states")


def flat(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]
