"""Samplers by name."""

from __future__ import annotations

import pytest

from runtime.configs import Config, Scheduler
from runtime.sampler import load_scheduler
from runtime.weights import find_model


@pytest.mark.parametrize(
    ("kind", "name"), [("unipc", "UniPC"), ("euler", "FlowMatchEuler"), ("dpm++", "DPMSolver")]
)
def test_samplers_of_one_shift_share_their_sigmas(config: Config, kind: str, name: str) -> None:
    sampler = load_scheduler(find_model(config), Scheduler(kind=kind, shift=5.0))  # type: ignore[arg-type]
    assert type(sampler).__name__.startswith(name)
    sampler.set_timesteps(10)
    assert len(sampler.timesteps) == 10
    assert float(sampler.sigmas[0]) == pytest.approx(1.0, abs=0.01)
    assert float(sampler.sigmas[5]) == pytest.approx(5 * 0.5 / (1 + 4 * 0.5), abs=0.05)
