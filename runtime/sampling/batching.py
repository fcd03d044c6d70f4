"""Whether a rank evaluates the two branches of guidance as one batch, or one after the other.

A batch has about half of the launches and the same operations. It saves time while a block of one branch
takes the GPU less time than the host needs to launch it; beyond that it only takes more memory. The choice
follows from shapes alone, so that all ranks make the same one, in every run.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from runtime.parallel.topology import Topology
from runtime.request.config import Architecture
from runtime.request.performance import BatchGuidance
from runtime.request.video_request import VideoRequest

_LAUNCHES = 88  # of one block and branch, as a rehearsal counts for Wan
_LAUNCH = 20e-6  # seconds of the host for a launch, as a rehearsal assumes
_SPEED = 0.8 * 989e12  # operations per second that matrix products in bfloat16 reach on an H100, the same


def batches(
    wanted: BatchGuidance, request: VideoRequest, shape: Architecture, tokens: int, topology: Topology
) -> bool:
    """Return whether the branches are evaluated as one batch.

    Args:
        wanted: `never`, `always`, or `auto`: while launching takes longer than computing.
        request: the request; without guidance there is only one branch.
        shape: shape of the transformer.
        tokens: tokens of one window.
        topology: arrangement of the ranks; with the branches on two ranks, none has both.
    """
    if wanted == "never" or not request.guided or topology.cfg == 2:
        return False
    return wanted == "always" or operations(request, shape, tokens, topology) < _LAUNCHES * _LAUNCH * _SPEED


def operations(request: VideoRequest, shape: Architecture, tokens: int, topology: Topology) -> int:
    """Operations of one block for one branch, on the rank with the most tokens."""
    width, text = shape.heads * shape.head_dim, request.max_sequence_length
    own = request.videos * -(-tokens // topology.sequence)
    products = 12 * own * width**2 + 4 * request.videos * text * width**2 + 4 * own * width * shape.ffn_dim
    return products + 4 * own * (tokens + text) * width


def repeat_batch(value: Any, count: int) -> Any:
    """Repeat a batch `count` times.

    Args:
        value: a tensor whose first axis is the batch, or a dataclass, tuple or list of them; what else it
            holds stays as it is.
        count: how often.
    """
    if isinstance(value, torch.Tensor):
        return value.repeat(count, *[1] * (value.dim() - 1))
    if is_dataclass(value) and not isinstance(value, type):
        named = {one.name: repeat_batch(getattr(value, one.name), count) for one in fields(value)}
        return replace(value, **named)
    if isinstance(value, tuple | list):
        repeated = [repeat_batch(one, count) for one in value]
        return type(value)(*repeated) if hasattr(value, "_fields") else type(value)(repeated)
    return value
