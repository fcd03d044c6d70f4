"""Evaluator: what a solver asks of a model at one node, over all windows of a video.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from runtime.request.windows import Windows
from runtime.sampling.blending import Blender
from runtime.sampling.network import Network, Networks


class Evaluation(NamedTuple):
    """What a model gives at one state.

    Attributes:
        values_BCFHW: values for the solver, float32, the same on every rank: the unconditional velocity and
            the conditional one minus it, or the guided velocity alone.
        velocity_BCFHW: guided velocity, float32.
        parts: branch → its projected tokens on this rank; see `StreamOutput`.
    """

    values_BCFHW: list[torch.Tensor]
    velocity_BCFHW: torch.Tensor
    parts: Mapping[str, torch.Tensor]


class Evaluator:
    """Evaluates the networks of all windows, and blends each value where windows overlap.

    Args:
        networks: networks of each window.
        windows: the windows' places in the video.
        apart: whether values are of the two branches apart; otherwise of both joined.
    """

    def __init__(self, networks: Sequence[Networks], windows: Windows, *, apart: bool):
        self._networks, self._windows, self._apart = list(networks), windows, apart
        self._blender = Blender(windows)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each value."""
        return ("uncond", "gap") if self._apart else ("guided",)

    def evaluate(self, step: int, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor) -> Evaluation:
        """Evaluate the model at latents of the whole video."""
        if len(self._networks) == 1:
            values, parts = self._of_window(0, step, latents_BCFHW, timestep_B)
            return Evaluation(values, self.guided(step, values), parts)
        blended: list[torch.Tensor] = []
        everywhere: dict[str, torch.Tensor] = {}
        for number in range(len(self._networks)):
            own = self._windows.slice(number)
            values, parts = self._of_window(number, step, latents_BCFHW[:, :, own].contiguous(), timestep_B)
            blended = blended or [torch.zeros_like(latents_BCFHW, dtype=torch.float32) for _ in values]
            for total, value in zip(blended, values, strict=True):
                self._blender.add(number, value, total)
            everywhere |= {f"{name} of window {number + 1}": part for name, part in parts.items()}
        return Evaluation(blended, self.guided(step, blended), everywhere)

    def guided(self, step: int, values_BCFHW: Sequence[torch.Tensor]) -> torch.Tensor:
        """Guided velocity of the values at `step`."""
        if not self._apart:
            return values_BCFHW[0]
        uncond_BCFHW, gap_BCFHW = values_BCFHW
        combined_BCFHW: torch.Tensor = uncond_BCFHW + self.scale(step) * gap_BCFHW
        return combined_BCFHW

    def scale(self, step: int) -> float:
        """Guidance scale at `step`; 1 without guidance."""
        return self._networks[0].at(step).guidance.scale

    def forgets(self, step: int) -> bool:
        """Return whether velocities before `step` say nothing about later ones; see `Course.forgets`."""
        return self._networks[0].forgets(step, outputs=True)

    def _of_window(
        self, number: int, step: int, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> tuple[list[torch.Tensor], Mapping[str, torch.Tensor]]:
        network = self._networks[number].at(step)
        patches_BSP = _patches(network, latents_BCFHW, timestep_B)
        parts = dict(zip((branch.name for branch in network.branches), patches_BSP, strict=True))
        if not self._apart:
            return [network.velocity(patches_BSP).float()], parts
        cond_BCFHW, uncond_BCFHW = (one.float() for one in network.velocities(patches_BSP))
        return [uncond_BCFHW, cond_BCFHW - uncond_BCFHW], parts


def _patches(network: Network, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor) -> list[torch.Tensor]:
    """Projected tokens of each of this rank's branches."""
    time = network.time(timestep_B)
    features = network.features(network.branches, latents_BCFHW, time)
    return [network.adapter.project(feature_BSD, time) for feature_BSD in features]
