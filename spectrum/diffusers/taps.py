"""Tap: sees what a pipeline's transformers return and what its scheduler is given, and can alter both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook

from spectrum.calibration import norm, nudge
from spectrum.diffusers.attach import attach, detach
from spectrum.diffusers.conditions import transformers_of
from spectrum.diffusers.outputs import Layout, pack

_NAME = "spectrum-calibration"


@dataclass(slots=True)
class Step:
    """What was seen of one step, on the host.

    Attributes:
        outputs: what each call of a transformer returned, as one tensor, and how it is put together.
        latents: latents that the scheduler was given.
        velocity: what it was given as the model's output, guided.
        seconds: duration since the step before.
    """

    outputs: list[tuple[torch.Tensor, Layout]] = field(default_factory=list)
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    velocity: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0


@dataclass(slots=True)
class Tap:
    """One generation, as it is seen.

    Attributes:
        replayed: steps of an earlier generation that began in the same way; their outputs are returned again
            up to the step `nudged`, and nothing is computed.
        nudged: step whose velocity is nudged.
        keeps_outputs: whether what transformers return is kept.
        steps: what was seen.
        final: latents at the end.
        moved: norm of the nudge.
    """

    replayed: list[Step] = field(default_factory=list)
    nudged: int = -1
    keeps_outputs: bool = False
    steps: list[Step] = field(default_factory=list)
    final: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    moved: float = 0.0
    _calls: int = 0
    _open: Step = field(default_factory=Step)
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def on(self, pipeline: Any) -> Iterator[None]:
        """See a generation of `pipeline`, which is as before afterwards."""
        modules, scheduler = transformers_of(pipeline).values(), pipeline.scheduler
        original, before = scheduler.step, vars(scheduler).get("step")

        def step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._stepped(original, model_output, args, kwargs)

        for module in modules:
            attach(module, _TapHook(self), _NAME)
        scheduler.step = step  # an attribute of this one scheduler, until the generation ends
        try:
            yield
        finally:
            del scheduler.step
            if before is not None:  # another's
                scheduler.step = before
            for module in modules:
                detach(module, _NAME)

    def called(self, compute: Any, device: torch.device) -> Any:
        """Return what a transformer returns: as before, or computed."""
        index, call = len(self.steps), self._calls
        self._calls += 1
        if index <= self.nudged and call < len(self.replayed[index].outputs):
            packed, layout = self.replayed[index].outputs[call]
            return layout.output(packed.to(device))
        output = compute()
        if self.keeps_outputs:
            packed, layout = pack(output)
            self._open.outputs.append((packed.detach().to("cpu", copy=True), layout))
        return output

    def _stepped(self, original: Any, velocity: torch.Tensor, args: Any, kwargs: Any) -> Any:
        index = len(self.steps)
        latents = kwargs["sample"] if "sample" in kwargs else args[1]
        if index == self.nudged:
            change = nudge(velocity, self.steps[-1].velocity.to(velocity))
            velocity, self.moved = velocity + change, norm(change)
        self._open.velocity = velocity.detach().to("cpu", copy=True)
        self._open.latents = latents.detach().to("cpu", copy=True)
        result = original(velocity, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        self.final = after.detach().to("cpu", copy=True)
        now = time.perf_counter()
        self._open.seconds, self._since = now - self._since, now
        self.steps.append(self._open)
        self._open, self._calls = Step(), 0
        return result


class _TapHook(ModelHook):  # type: ignore[misc]  # diffusers has no types
    """Hook of a transformer that asks the tap what it returns."""

    def __init__(self, tap: Tap):
        super().__init__()
        self._tap = tap

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute or replay one call."""
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return self._tap.called(lambda: self.fn_ref.original_forward(*args, **kwargs), device)
