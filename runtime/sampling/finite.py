"""Checks for NaN and infinity: a job ends at the first step whose latents are not finite.

Every rank has all latents, so all of them see it at the same step, without an exchange. The check costs one
norm per step; the branch and the cause are looked for only when it fails.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from runtime.errors import NotFiniteError
from runtime.models.base import Embeddings
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import own_share
from runtime.request.config import Config
from spectrum import StepKind

_LARGEST_HALF = 65504


def size_of(latents_BCFHW: torch.Tensor) -> torch.Tensor:
    """Norm of the latents, 0-dim, still on the device; not finite if any element is not."""
    norm: torch.Tensor = torch.linalg.vector_norm(latents_BCFHW)
    return norm


def check_finite(
    size: torch.Tensor, step: int, kind: StepKind, parts: Mapping[str, torch.Tensor], ranks: Ranks
) -> None:
    """Refuse latents with NaN or infinity; called on every rank, after a synchronisation of the device.

    Args:
        size: `size_of` the step's latents.
        step, kind: the step.
        parts: branch → this rank's part of its output.
        ranks: all ranks of the group.

    Raises:
        NotFiniteError: latents are not finite; the message names the step and branches, equally on all ranks.
    """
    if torch.isfinite(size):
        return
    own = [name for name, part in parts.items() if not torch.isfinite(part).all()]
    named = sorted({name for told in ranks.control.all_gather_object(own) for name in told})
    if named:
        of = f"branch{'es' * (len(named) > 1)} {' and '.join(named)}"
    else:
        of = "the forecast" if kind is StepKind.FORECAST else "the sampler"
    raise NotFiniteError(f"step {step}: {of} produced NaN or infinity")


def likely_cause(transformers: Mapping[str, nn.Module], config: Config, ranks: Ranks) -> str:
    """Explain why a model produces NaN or infinity; called on every rank.

    Args:
        transformers: by the names of the model's experts.
    """
    own = [
        f"{expert}'s weight {name}"
        for expert, module in transformers.items()
        for name, weight in module.named_parameters()
        if not _is_finite(own_share(weight))
    ]
    broken = sorted({name for told in ranks.control.all_gather_object(own) for name in told})
    if broken:
        loras = ", ".join(lora.file for lora in config.lora)
        files = f"the LoRA {loras} or the model's files" if loras else "the model's files"
        others = f", nor are {len(broken) - 1} others" if len(broken) > 1 else ""
        return f"the {broken[0]} is not finite{others}: check {files}"
    if config.dtype.computed is torch.float16:
        field = "transformer" if config.dtype.compute is None else "compute"
        return f"the weights are finite, but float16 ends at {_LARGEST_HALF}: try dtype.{field}: bfloat16"
    scales = "the scales of its LoRA files, " if config.lora else ""
    format_ = "" if config.performs.quantization == "none" else "quantization, "
    return f"the weights are finite: check {scales}{format_}dtype.transformer, the sampler and its shift"


def _is_finite(weight: torch.Tensor) -> bool:
    """Return whether every element is finite; torch has no `isfinite` for 8 bits."""
    return bool(torch.isfinite(weight.float() if weight.element_size() == 1 else weight).all())


def check_frames(frames: torch.Tensor, config: Config) -> None:
    """Refuse decoded frames with NaN, which would become black pixels.

    Raises:
        NotFiniteError: there are some.
    """
    if torch.isfinite(frames).all():
        return
    dtype = config.dtype.vae
    raise NotFiniteError(
        f"the VAE, in {dtype}, produced NaN or infinity from finite latents; {_remedy(dtype)}"
    )


def _remedy(dtype: str) -> str:
    """Say what to do about a component in `dtype` whose output is not finite."""
    if dtype == "float16":
        return f"float16 ends at {_LARGEST_HALF}: use bfloat16"
    return "check the model's files"


def check_prompts(text: Embeddings, config: Config) -> None:
    """Refuse text embeddings with NaN or infinity.

    Raises:
        NotFiniteError: an embedding is not finite.
    """
    negative = [] if text.negative is None else [text.negative]
    if all(bool(torch.isfinite(embedding).all()) for embedding in (*text.prompts, *negative)):
        return
    dtype = config.dtype.text_encoder
    raise NotFiniteError(
        f"the text encoder, in {dtype}, produced NaN or infinity for the prompt; {_remedy(dtype)}"
    )
