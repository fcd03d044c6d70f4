"""Conditions of a calibration: what of a pipeline it depends on, and whether a use of it fits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrum.calibration import differences, sizes_differ

_SAMPLED = 64  # numbers of each weight that its digest is made from
_LEVELS = 0.05  # difference of noise levels up to which two generations are alike; sizes of a class differ so

TRANSFORMERS = ("transformer", "transformer_2", "unet")
"""Names of a pipeline's components that are called once or more in every step."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Conditions that a calibration was made under.

    Attributes:
        source: name of its file.
        values: the conditions of the file.
        levels: σ of the sampler, `[n + 1]`.
    """

    source: str
    values: Mapping[str, Any]
    levels: tuple[float, ...]

    def check_pipeline(self, pipeline: Any) -> None:
        """Refuse another pipeline, other weights, or another scheduler or settings of it.

        Raises:
            ValueError: something differs; the message says what.
        """
        self._refuse(differences(self.values, of_pipeline(pipeline)))

    def check_generation(self, pipeline: Any, steps: int, latents: int) -> None:
        """Refuse a generation with other steps, guidance, scheduler, noise levels or size.

        Args:
            pipeline: the pipeline, which has begun the generation.
            steps: its number of steps.
            latents: numbers in what one image or video gives the transformer.

        Raises:
            ValueError: something differs; the message says what.
        """
        given = {"steps": steps} | of_guidance(pipeline) | of_scheduler(pipeline.scheduler)
        found = differences({name: self.values.get(name) for name in given}, given)
        if sizes_differ(self.values["latents"], latents):
            found.append(f"about {self.values['latents']} numbers of latents, not {latents}")
        if not found:
            levels = noise_levels(pipeline.scheduler)
            off = max(abs(own - other) for own, other in zip(self.levels, levels, strict=False))
            if len(levels) != len(self.levels) or off > _LEVELS * max(self.levels):
                found.append(f"noise levels that differ by up to {off:.3g}")
        self._refuse(found)

    def _refuse(self, found: Iterable[str]) -> None:
        if told := "; for ".join(found):
            raise ValueError(
                f"the calibration {self.source!r} does not fit this pipeline; it is for {told}. "
                "spectrum.diffusers.calibrate(...) makes one that fits"
            )


def of_pipeline(pipeline: Any) -> dict[str, Any]:
    """Conditions that are known before a generation: pipeline, weights and scheduler."""
    found = {
        "pipeline": type(pipeline).__name__,
        "model": str(getattr(pipeline.config, "_name_or_path", None) or type(pipeline).__name__),
        "revision": _digest(transformers_of(pipeline).values()),
    }
    ratio = pipeline.config.get("boundary_ratio")
    if ratio is not None:
        found["boundary"] = float(ratio) * pipeline.scheduler.config.num_train_timesteps
    return found | of_scheduler(pipeline.scheduler)


def of_scheduler(scheduler: Any) -> dict[str, Any]:
    """Class and settings of a scheduler."""
    settings = sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))
    return {"sampler": type(scheduler).__name__, "settings": {name: str(value) for name, value in settings}}


def of_guidance(pipeline: Any) -> dict[str, float]:
    """Scales of guidance of the generation under way; 1 if the pipeline knows none."""
    scale, second = (getattr(pipeline, name, None) for name in ("guidance_scale", "_guidance_scale_2"))
    found = {"guidance": float(scale) if isinstance(scale, int | float) else 1.0}
    return found | ({"guidance_2": float(second)} if isinstance(second, int | float) else {})


def noise_levels(scheduler: Any) -> list[float]:
    """σ of a scheduler, `[n + 1]`; empty if it has none."""
    levels = getattr(scheduler, "sigmas", None)
    return [] if levels is None else [float(level) for level in torch.as_tensor(levels).cpu()]


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """Name → transformer of a pipeline."""
    found = ((name, getattr(pipeline, name, None)) for name in TRANSFORMERS)
    return {name: module for name, module in found if isinstance(module, nn.Module)}


@torch.no_grad()
def _digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 of some numbers of every weight, in bfloat16, so that it hardly depends on their dtype."""
    digest = hashlib.sha256()
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for module in modules:
        for name, weight in module.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
                flat = weight.detach().reshape(-1)
                stride = max(flat.numel() // _SAMPLED, 1)
                parts.setdefault(weight.device, []).append(flat[::stride][:_SAMPLED].float())
    for several in parts.values():  # one transfer from each device
        digest.update(torch.cat(several).bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
