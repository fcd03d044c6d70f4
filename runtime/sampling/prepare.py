"""Preparation: builds the networks of a plan on one rank, one per window, with text and conditioning.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width, I image tokens, E
channels of an image encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.models.base import Condition, Embeddings, Expert
from runtime.parallel.attention import Attend, LocalAttention, SplitAttention
from runtime.parallel.kernels import USP, find_kernel
from runtime.parallel.ranks import RankGroup
from runtime.request.video_request import BRANCHES
from runtime.sampling.network import Branch, ExpertNetworks, Network, Networks
from runtime.sampling.plan import Plan
from runtime.sampling.travel import window_embeddings


def build_networks(
    plan: Plan,
    experts: Sequence[Expert],
    group: RankGroup,
    heads: int,
    window_BCFHW: torch.Tensor,
    text: Embeddings,
    image: Condition | None,
) -> list[Networks]:
    """Build the networks of each window, which differ in their text alone.

    All ranks call it at the same time. It also sets the experts' attention to the plan's kernel.

    Args:
        group: this rank's groups in the plan's topology.
        heads: attention heads of the transformers.
        window_BCFHW: latents of one window.
        text: embeddings of all prompts.
        image: conditioning of the first window; None for a video from text alone.
    """
    texts = window_embeddings(plan.request, plan.windows, text)
    own = [_of_expert(expert, plan, group, heads, window_BCFHW, texts, image) for expert in experts]
    if len(own) == 1:
        return [*own[0]]
    return [ExpertNetworks(of_window, plan.course) for of_window in zip(*own, strict=True)]


def _of_expert(
    expert: Expert,
    plan: Plan,
    group: RankGroup,
    heads: int,
    window_BCFHW: torch.Tensor,
    texts: Sequence[Sequence[torch.Tensor]],
    image: Condition | None,
) -> list[Network]:
    """Build one expert's network for each window."""
    adapter, request = expert.adapter, plan.request
    geometry = adapter.geometry(window_BCFHW)
    _use_attention(expert, plan, group, heads, geometry.grid.tokens, window_BCFHW.device)
    scale = expert.settings.guidance(request)
    guidance = group.guidance(scale if request.guided else None)
    sequence = group.sequence(geometry.grid.tokens)
    tokens_BIE = None if image is None else image.tokens_BIE
    embedded = scale if request.embedded else None
    networks = []
    known: dict[int, torch.Tensor] = {}  # windows that share a prompt share its projection
    for embeddings in texts:
        for embedding in embeddings:
            if id(embedding) not in known:
                known[id(embedding)] = adapter.text(embedding, tokens_BIE)
        branches = tuple(
            Branch(name, known[id(embedding)]) for name, embedding in zip(BRANCHES, embeddings, strict=False)
        )
        own = group.branches(branches)
        networks.append(
            Network(adapter, geometry, own, guidance, sequence, image, embedded, batched=plan.batched)
        )
    return networks


def _use_attention(
    expert: Expert, plan: Plan, group: RankGroup, heads: int, tokens: int, device: torch.device
) -> None:
    """Set an expert's self-attention to the plan's kernel, with its tokens split over the ranks.

    Whole sequences with torch's own choice of kernel keep the model's own attention.
    """
    whole = plan.topology.sequence == 1
    if whole and plan.attention == "sdpa":
        expert.attention.restore()
        return
    place = group.attention(tokens, heads)
    split: Attend
    if plan.attention == USP:
        from runtime.parallel.usp import UspAttention, choose_backend

        split = UspAttention(place, choose_backend(device, expert.adapter.dtype))
    elif whole:
        split = LocalAttention(find_kernel(plan.attention))
    else:
        split = SplitAttention(place, find_kernel(plan.attention))
    expert.attention.split(split)
