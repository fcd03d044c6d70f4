"""Samplers as tables of coefficients: each state is a weighted sum of the noise and the velocities."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin

from runtime.errors import BadRequestError, named
from spectrum.solver import Multistep, traced

_PROBES = 16  # numbers on which the table is tried
_CLOSE = 1e-5  # relative difference that rounding in float32 may cause


def coefficients(sampler: SchedulerMixin) -> Multistep:
    """Find the coefficients of a sampler: it runs once, on the CPU, on unit vectors.

    Args:
        sampler: the sampler, at its first step, with its tables on the CPU; it is at its end afterwards.

    Raises:
        BadRequestError: the sampler is not linear in what it is given, number by number.
    """
    steps = len(sampler.timesteps)
    numbers = torch.Generator().manual_seed(0)
    given = torch.randn((steps + 1, _PROBES), generator=numbers, dtype=torch.float64)
    probe = given[:1]  # the noise; then what the sampler makes of it and of the velocities after it

    def step(index: int, velocity: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal probe
        timestep, rows = sampler.timesteps[index], given[index + 1 : index + 2]
        both = torch.cat([velocity, rows], dim=1), torch.cat([state, probe], dim=1)
        moved: torch.Tensor = sampler.step(both[0], timestep, both[1], return_dict=False)[0]
        probe = moved[:, steps + 1 :].double()
        return moved[:, : steps + 1]

    try:
        table = traced(step, steps)
    except Exception as error:  # as of `load_sampler`: a sampler may raise anything on what is no image
        raise _refusal(sampler, f"cannot run on single numbers ({named(error)})") from None
    expected = torch.from_numpy(table.rows[-1]) @ given
    if not float((probe[0] - expected).norm()) <= _CLOSE * float(expected.norm()):
        raise _refusal(sampler, "is not linear")
    return table


def _refusal(sampler: SchedulerMixin, problem: str) -> BadRequestError:
    return BadRequestError(
        f"fuse_forecasts: the sampler {type(sampler).__name__} {problem}, so its steps cannot be fused with "
        "forecasts; write fuse_forecasts: false"
    )
