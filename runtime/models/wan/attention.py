"""Wan's self-attention over tokens that are split over ranks: attention processors for diffusers' blocks.

Tensor legend: B batch, S tokens on this rank, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention

from runtime.models.base import Rotary
from runtime.models.wan.adapter import Transformer, every_block
from runtime.models.wan.projections import project, projections
from runtime.parallel.attention import Attend, LocalAttention, SplitAttention


class SplitSelfAttention:
    """Wan's self-attention for one shard of the tokens, as an attention processor of diffusers.

    Only the attention itself communicates, if tokens are split at all; a compiled block breaks its graph
    there, and nowhere else. Projections, norms and the rotary embedding act on each token alone. Where the
    attention overlaps its exchanges with them, they run in it, and a compiled block leaves them out.

    Args:
        attend: attention over the tokens of all ranks.
        overlaps: whether its exchanges run beside the projections that follow, where tokens are split.

    Source: `diffusers.models.transformers.transformer_wan.WanAttnProcessor`.
    """

    def __init__(self, attend: Attend, *, overlaps: bool = False):
        local = isinstance(attend, LocalAttention)
        self._attend: Attend = attend if local else torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
        self._overlaps = attend if overlaps and isinstance(attend, SplitAttention) else None

    def __call__(
        self,
        attention: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary_emb: Rotary,
    ) -> torch.Tensor:
        if self._overlaps is not None:
            output_BSHD = _overlapped(self._overlaps, attention, hidden_states, rotary_emb)
        else:
            query, key, value = project(attention, hidden_states)
            query, key = attention.norm_q(query), attention.norm_k(key)
            query, key, value = (x.unflatten(2, (attention.heads, -1)) for x in (query, key, value))
            output_BSHD = self._attend(rotate(query, rotary_emb), rotate(key, rotary_emb), value)
            output_BSHD = output_BSHD.type_as(query)
        projected: torch.Tensor = attention.to_out[0](output_BSHD.flatten(2))
        return projected


class SelfAttention:
    """Switch of the processor in every block's self-attention; cross-attention is local and unchanged.

    Args:
        overlaps: as of `SplitSelfAttention`.
    """

    joint = False

    def __init__(self, model: Transformer, *, overlaps: bool = False):
        self._overlaps = overlaps
        self._modules: list[WanAttention] = [block.attn1 for block in every_block(model)]
        self._own = [module.processor for module in self._modules]
        self._processors: dict[Attend, SplitSelfAttention] = {}

    def split(self, attend: Attend) -> None:
        """Run self-attention with `attend` from now on.

        All blocks share one processor, and an equal `attend` gets the same processor again, so compiled code
        stays valid.
        """
        if attend not in self._processors:
            self._processors[attend] = SplitSelfAttention(attend, overlaps=self._overlaps)
        for module in self._modules:
            module.set_processor(self._processors[attend])

    def restore(self) -> None:
        """Run the model's own attention from now on."""
        for module, processor in zip(self._modules, self._own, strict=True):
            module.set_processor(processor)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _overlapped(
    attend: SplitAttention, attention: WanAttention, hidden_BSD: torch.Tensor, rotary: Rotary
) -> torch.Tensor:
    """What a rank's tokens see in the whole sequence, with each exchange beside what is computed next."""
    query, key, value = projections(attention, hidden_BSD)

    def heads(x_BSD: torch.Tensor) -> torch.Tensor:
        return x_BSD.view(*x_BSD.shape[:2], attention.heads, -1)

    return attend.overlapped(
        lambda: rotate(heads(attention.norm_q(query())), rotary),
        lambda: rotate(heads(attention.norm_k(key())), rotary),
        lambda: heads(value()),
    )


def rotate(x_BSHD: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Apply the rotary embedding: rotate each pair of channels by its token's angle.

    Args:
        x_BSHD: queries or keys.
        rotary: cosines and sines `[1, S, 1, D]`.
    """
    even, odd = x_BSHD[..., 0::2], x_BSHD[..., 1::2]
    cosines, sines = rotary[0][..., 0::2], rotary[1][..., 1::2]
    turned = torch.empty_like(x_BSHD)
    turned[..., 0::2] = even * cosines - odd * sines
    turned[..., 1::2] = even * sines + odd * cosines
    return turned
