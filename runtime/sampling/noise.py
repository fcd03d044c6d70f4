"""Initial noise of a video.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor


def draw_noise(shape: Sequence[int], seed: int, device: torch.device) -> torch.Tensor:
    """Draw the noise of the whole batch on the CPU: a seed means the same video on every machine.

    Args:
        shape: `[B, C, F, H, W]`.
        seed: the request's seed.
        device: where the noise is needed.
    """
    noise_BCFHW: torch.Tensor = randn_tensor(
        tuple(shape), generator=torch.Generator("cpu").manual_seed(seed), device=device, dtype=torch.float32
    )
    return noise_BCFHW
