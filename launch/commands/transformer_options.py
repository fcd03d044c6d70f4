"""Options of how the transformer runs, which change its speed and memory. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from runtime.request.performance import Profile, Quantization

_Command = TypeVar("_Command", bound=Callable[..., Any])
_CONFIGS = "[default: the config's]"


def transformer_options() -> list[Callable[[_Command], _Command]]:
    """Make the options."""
    return [
        click.option(
            "--shard/--replicate",
            default=None,
            help="Shard the transformer's weights over the ranks (FSDP2), or give each rank all of them.  "
            f"{_CONFIGS}",
        ),
        click.option(
            "--offload",
            is_flag=True,
            help="Keep the transformer's blocks in host memory; each is copied to the GPU while the one "
            f"before it runs.  {_CONFIGS}",
        ),
        click.option(
            "--performance",
            type=click.Choice(get_args(Profile)),
            help="exact computes the same as diffusers; fast differs by rounding (compiled blocks, fused "
            f"projections, the fastest attention); fastest also quantises to fp8.  {_CONFIGS}",
        ),
        click.option(
            "--quantization",
            type=click.Choice(get_args(Quantization)),
            help="Format of the transformer blocks' linear layers: fp8 for weights and activations, int8 for "
            "weights.  [default: the config's, or as --performance says]",
        ),
    ]
