"""The training loop of wan-tiny: resumable stages, averaged weights, learning-rate curves."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

log = logging.getLogger("train")

TRAIN_SEED, HELD_OUT_SEED = 0, 1


def generator(*key: int) -> torch.Generator:
    """Make a generator whose seed is a pure function of `key`."""
    state = 0
    for part in key:
        state = (state * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(state)


@dataclass
class Stage:
    """One stage's files in the work directory: a checkpoint to resume from, a result, and a log."""

    work: Path
    name: str

    @property
    def result(self) -> Path:
        return self.work / f"{self.name}.pt"

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.name}.checkpoint.pt"

    def save(self, path: Path, state: Any) -> None:
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(path)

    def record(self, **values: Any) -> None:
        log.info(
            "%s %s",
            self.name,
            " ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()),
        )
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self.name, **values}) + "\n")


class Average:
    """Exponential moving average of a module's parameters; short at first, to forget the start."""

    def __init__(self, modules: nn.ModuleList, decay: float):
        self.decay = decay
        self.values = [p.detach().clone() for p in modules.parameters()]

    @torch.no_grad()
    def update(self, modules: nn.ModuleList, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in modules.parameters()], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, modules: nn.ModuleList) -> None:
        for parameter, value in zip(modules.parameters(), self.values, strict=True):
            parameter.copy_(value)


def train(
    stage: Stage,
    modules: nn.ModuleList,
    optimisers: list[torch.optim.Optimizer],
    steps: int,
    loss_at: Callable[[int], torch.Tensor],
    rate_at: Callable[[float], float],
    *,
    average_decay: float,
    checkpoint_every: int = 200,
    extra: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Optimise `loss_at(step)`, keep an average of the weights, and leave that average in `modules`.

    Args:
        loss_at: step → loss.
        rate_at: progress in [0, 1] → factor on every learning rate.
        extra: evaluated on the averaged weights at every checkpoint; its values are logged.
    """
    average = Average(modules, average_decay)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimisers]
    first, spent = 0, 0.0
    if stage.checkpoint.exists():
        state = torch.load(stage.checkpoint, weights_only=True, map_location="cpu")
        modules.load_state_dict(state["modules"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        average.values = [
            value.to(own.device) for value, own in zip(state["average"], average.values, strict=True)
        ]
        first, spent = state["step"], state["seconds"]
    started, running = time.monotonic(), 0.0
    for step in range(first, steps):
        for optimiser, rates in zip(optimisers, base_rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * rate_at(step / steps)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update(modules, step)
        running += loss.item()
        if (step + 1) % 50 == 0:
            seconds = spent + time.monotonic() - started
            stage.record(step=step + 1, loss=running / 50, seconds=seconds)
            running = 0.0
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            seconds = spent + time.monotonic() - started
            stage.save(
                stage.checkpoint,
                {
                    "modules": modules.state_dict(),
                    "optimisers": [o.state_dict() for o in optimisers],
                    "average": average.values,
                    "step": step + 1,
                    "seconds": seconds,
                },
            )
            if extra is not None:
                kept = [p.detach().clone() for p in modules.parameters()]
                average.copy_to(modules)
                stage.record(step=step + 1, seconds=seconds, **extra())
                with torch.no_grad():
                    for parameter, value in zip(modules.parameters(), kept, strict=True):
                        parameter.copy_(value)
    average.copy_to(modules)


def cosine(progress: float) -> float:
    return min(1.0, progress * 40 + 0.02) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear_second_half(progress: float) -> float:
    return min(1.0, progress * 40 + 0.02) * min(1.0, 2.0 * (1.0 - progress))
