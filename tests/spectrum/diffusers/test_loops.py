"""Transformers that are called by loops of their own: the number of steps is given, and steps are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spectrum import paper_schedule
from spectrum.diffusers import enable, report
from tests.pipelines import noise


class Curve(nn.Module):
    """A transformer as far as a velocity stream needs one."""

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        return (hidden_states * timestep.view(-1, 1).cos() + encoder_hidden_states.mean(),)


def loop(
    model: Curve,
    steps: int,
    *,
    prompt: torch.Tensor,
    negative: torch.Tensor | None = None,
    begin: int = 0,
    stop: int = 99,
    seed: int = 1,
) -> torch.Tensor:
    """An Euler sampler."""
    latents = noise(1, 8, seed=seed)
    for step in range(begin, min(steps, stop)):
        time = torch.tensor([1.0 - step / steps])
        (velocity,) = model(latents, time, prompt)
        if negative is not None:
            velocity = velocity + 2.0 * (velocity - model(latents, time, negative)[0])
        latents = latents - velocity / steps
    return latents


PROMPT, NEGATIVE = noise(1, 3, 4), noise(1, 3, 4, seed=2)


def fresh(steps: int = 12, **arguments: Any) -> torch.Tensor:
    model = Curve()
    enable(model, "paper", stream="velocity", steps=steps)
    return loop(model, steps, **{"prompt": PROMPT, **arguments})


@torch.no_grad()
@pytest.mark.parametrize("stop", [1, 2, 7, 8, 99])
def test_steps_and_branches_are_counted(stop: int) -> None:
    model = Curve()
    enable(model, "paper", stream="velocity", steps=12)
    loop(model, 12, prompt=PROMPT, negative=NEGATIVE, stop=stop, seed=5)
    for prompt in (PROMPT, PROMPT, PROMPT.clone()):
        found = loop(model, 12, prompt=prompt, negative=NEGATIVE)
        assert torch.equal(found, fresh(negative=NEGATIVE))
        told = report(model)["transformer"]
        assert told.computed == paper_schedule(12).computed
        assert (told.evaluations, told.forecasts) == (2 * told.nfe, 2 * (12 - told.nfe))


@torch.no_grad()
def test_a_later_start_begins_a_schedule() -> None:
    model = Curve()
    enable(model, "paper", stream="velocity", steps=12)
    loop(model, 12, prompt=PROMPT)
    loop(model, 12, prompt=PROMPT, begin=4)
    assert report(model)["transformer"].computed == tuple(s for s in paper_schedule(12).computed if s < 8)


@torch.no_grad()
def test_more_steps_than_were_given_are_refused() -> None:
    model = Curve()
    enable(model, "paper", stream="velocity", steps=10)
    with pytest.raises(ValueError, match=r"steps: 10 given to enable\(\)"):
        loop(model, 12, prompt=PROMPT)
    assert torch.equal(loop(model, 10, prompt=PROMPT), fresh(10))


@torch.no_grad()
def test_errors_of_forecasts_make_a_schedule() -> None:
    model, told = Curve(), []
    for tolerance in (1e-9, 1e9):
        preset = {"stream": "velocity", "schedule": {"kind": "error", "tolerance": tolerance}}
        enable(model, preset, steps=30)
        loop(model, 30, prompt=PROMPT, negative=NEGATIVE)
        told.append(report(model)["transformer"])
    assert told[0].nfe == 30
    assert told[1].computed == (0, 1, 2, 3, 4, 6, 10, 18, 26)  # gaps double, up to eight
    assert all(error > 0.0 for error in told[0].errors.values()) and min(told[0].errors) == 1
