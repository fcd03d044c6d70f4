"""Blocks of the transformers whose features can be forecast: where they are, and what they return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

IMAGE = ("hidden_states", "x")
"""Names of the argument that holds the image's or video's tokens."""
_ALONE = ("hidden_states",)
_IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")

FAMILIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "CogVideoXTransformer3DModel": {"transformer_blocks": _IMAGE_FIRST},
    "FluxTransformer2DModel": {"transformer_blocks": _TEXT_FIRST, "single_transformer_blocks": _TEXT_FIRST},
    "HunyuanVideoTransformer3DModel": {
        "transformer_blocks": _IMAGE_FIRST,
        "single_transformer_blocks": _IMAGE_FIRST,
    },
    "HunyuanVideo15Transformer3DModel": {"transformer_blocks": _IMAGE_FIRST},
    "LTXVideoTransformer3DModel": {"transformer_blocks": _ALONE},
    "MochiTransformer3DModel": {"transformer_blocks": _IMAGE_FIRST},
    "QwenImageTransformer2DModel": {"transformer_blocks": _TEXT_FIRST},
    "SD3Transformer2DModel": {"transformer_blocks": _TEXT_FIRST},
    "WanTransformer3DModel": {"blocks": _ALONE},
    "ZImageTransformer2DModel": {"layers": ("x",)},
}
"""Class of a transformer → its lists of blocks, in the order in which they run → what a block returns.

What a block returns is named like the argument whose new value it is.
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a transformer.

    Attributes:
        module: the block.
        returns: names of the arguments whose new values it returns: a tuple of several, or one tensor.
        last: whether what it returns is the feature.
    """

    module: nn.Module
    returns: tuple[str, ...]
    last: bool

    @property
    def image(self) -> int:
        """Place of the image's tokens in what it returns."""
        return next(place for place, name in enumerate(self.returns) if name in IMAGE)

    def places(self) -> tuple[int, ...]:
        """Places of the returned arguments in the block's signature."""
        names = list(inspect.signature(type(self.module).forward).parameters)[1:]
        return tuple(names.index(name) for name in self.returns)


def blocks_of(transformer: nn.Module) -> list[Block]:
    """Return the blocks of a transformer, in the order in which they run.

    Raises:
        ValueError: its blocks are not known.
    """
    known = next((kind.__name__ for kind in type(transformer).__mro__ if kind.__name__ in FAMILIES), None)
    if known is None:
        raise ValueError(
            f"stream feature: the blocks of {type(transformer).__name__} are not known, those of "
            f"{', '.join(sorted(FAMILIES))} are; call enable(..., stream='velocity'), which forecasts the "
            f"output of any transformer"
        )
    found = [
        (module, returns)
        for name, returns in FAMILIES[known].items()
        for module in getattr(transformer, name)
    ]
    return [Block(module, returns, place == len(found) - 1) for place, (module, returns) in enumerate(found)]
