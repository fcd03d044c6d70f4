"""The program of docs/diffusers.md for samplers that call a model themselves, in a plain loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from spectrum import Blend, ChebyshevRidge, FixedSchedule, LinearExtrapolation, Schedule, paper_schedule
from tests.places import ROOT

PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
STEPS = 50
SPREAD = torch.linspace(0.05, 2.0, 8).double()
Model = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def forecasting() -> Any:
    program = re.search(r"^```python\n# sampler.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {}
    exec(program[1], names)
    return names["Forecasting"]


class Denoiser:
    """The exact denoiser of independent normal values with standard deviations of their own."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        self.calls.append(float(sigma[0]))
        return x * SPREAD**2 / (SPREAD**2 + sigma[:, None] ** 2)


def sigmas_of(steps: int) -> torch.Tensor:
    """Noise levels from 14.6 to 0.03 as Karras and others space them, and 0 at the end."""
    ramp = torch.linspace(0, 1, steps).double()
    return torch.cat(
        [(14.6 ** (1 / 7) + ramp * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7, torch.zeros(1).double()]
    )


def euler(model: Model, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The sampler of that name, as it is written everywhere."""
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(len(x)))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def dpm_2m(model: Model, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++(2M): it remembers the denoised estimate of the step before."""
    before, length = None, 0.0
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(len(x)))
        if following == 0:
            return denoised
        h = float((sigma / following).log())
        ratio = length / h
        joined = denoised if before is None else (1 + 0.5 / ratio) * denoised - 0.5 / ratio * before
        x = following / sigma * x - (torch.tensor(-h).expm1()) * joined
        before, length = denoised, h
    return x


def noise() -> torch.Tensor:
    return 14.6 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("sampler", [euler, dpm_2m])
def test_all_steps_computed_is_the_sampler_itself(forecasting: Any, sampler: Callable[..., Any]) -> None:
    sigmas = sigmas_of(STEPS)
    plain = sampler(Denoiser(), noise(), sigmas)
    wrapped = forecasting(Denoiser(), sigmas, FixedSchedule.full(STEPS), LinearExtrapolation())
    assert torch.allclose(sampler(wrapped, noise(), sigmas), plain, rtol=1e-9)


@pytest.mark.parametrize("sampler", [euler, dpm_2m])
@pytest.mark.parametrize("schedule", [paper_schedule(STEPS), paper_schedule(STEPS, alpha=0.2)])
def test_few_steps_are_computed_and_the_others_forecast(
    forecasting: Any, sampler: Callable[..., Any], schedule: Schedule
) -> None:
    assert isinstance(schedule, FixedSchedule)
    sigmas, model = sigmas_of(STEPS), Denoiser()
    full = sampler(Denoiser(), noise(), sigmas)
    predictor = Blend(ChebyshevRidge(horizon=STEPS), LinearExtrapolation(), 0.5)
    result = sampler(forecasting(model, sigmas, schedule, predictor), noise(), sigmas)
    assert model.calls == [float(sigmas[step]) for step in schedule.computed]
    fewer = sampler(Denoiser(), noise(), sigmas_of(schedule.nfe))
    if sampler is euler:  # a sampler of second order is exact enough with few steps of this simple model
        assert float((result - full).norm()) < 0.5 * float((fewer - full).norm())
    assert 0 < float((result - full).norm() / full.norm()) < 0.2


def test_a_call_between_two_steps_is_computed(forecasting: Any) -> None:
    sigmas, model = sigmas_of(STEPS), Denoiser()
    wrapped = forecasting(model, sigmas, FixedSchedule.explicit(STEPS, [0]), LinearExtrapolation())
    between = 0.5 * (sigmas[0] + sigmas[1])
    for sigma in (sigmas[0], between, sigmas[1]):
        wrapped(noise(), sigma * torch.ones(2).double())
    assert model.calls == [float(sigmas[0]), float(between)]
