"""A pipeline of FLUX.1's architecture that takes prompts: flux-tiny's parts, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from flux_tiny_transformer import Modules, pipeline_of
from flux_tiny_vae import new_vae

CALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 3.5}
"""Arguments of a call: a size of 8 × 8 tokens, and the longest prompt."""


def flux_random() -> FluxPipeline:
    """Make a fresh pipeline; its weights are always the same."""
    modules = Modules.new()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, weight in modules.transformer.named_parameters():
            if weight.ndim == 2 and not weight.any():  # begins as zero for training
                torch.nn.init.normal_(weight, std=0.3 if name.startswith("proj_out") else 0.05)
    pipe = pipeline_of(new_vae(), modules)
    pipe.set_progress_bar_config(disable=True)
    return pipe
