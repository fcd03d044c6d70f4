"""Text embeddings of prompts, encoded on the first rank only and broadcast to the others.

Tensor legend: B batch, T text tokens, E text encoder channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer

from runtime.models.base import Embeddings
from runtime.models.folder import ModelFolder
from runtime.models.wan.loading import load_text_encoder
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest

_SHOWN = 200  # characters of a truncated text's rest


class PromptEncoder:
    """Text encoder of one rank group; only its first rank loads one.

    The last prompt's embeddings are cached: a comparison needs the same ones again.

    Args:
        folder, config, ranks: the model, its config, and the ranks.
        dtype: dtype of the embeddings, the transformer's compute dtype.

    Attributes:
        warnings: sentences about the part of the last prompt that was truncated, on the first rank.

    Source: `diffusers.WanPipeline.encode_prompt`, which does the encoding.
    """

    def __init__(self, folder: ModelFolder, config: Config, ranks: Ranks, dtype: torch.dtype):
        self._folder, self._config, self._ranks, self._dtype = folder, config, ranks, dtype
        self._pipeline: WanPipeline | None = None
        self._last: tuple[tuple[object, ...], Embeddings] | None = None
        self.warnings: list[str] = []
        if ranks.is_leader and config.memory.text_encoder != "free":
            self._pipeline = self._load(self._resting_place)

    @torch.no_grad()
    def encode(self, request: VideoRequest) -> Embeddings:
        """Encode the prompts; the embeddings are on every rank's device."""
        key = (
            request.prompt,
            request.travel,
            request.negative if request.guided else None,
            request.videos,
            request.max_sequence_length,
        )
        if self._last is None or self._last[0] != key:
            own = self._run(request) if self._ranks.is_leader else []
            received = self._ranks.broadcast_tensors(own, self._dtype)
            prompts = 1 + len(request.travel)
            self._last = key, Embeddings(received[:prompts], received[prompts] if request.guided else None)
        return self._last[1]

    def _run(self, request: VideoRequest) -> list[torch.Tensor]:
        """Encode each prompt, then the negative one."""
        device, policy = self._ranks.device, self._config.memory.text_encoder
        pipeline = self._pipeline or self._load(device)
        self.warnings = _truncated(pipeline.tokenizer, request)
        pipeline.text_encoder.to(device)
        encode = partial(
            pipeline.encode_prompt,
            num_videos_per_prompt=request.videos,
            max_sequence_length=request.max_sequence_length,
            device=device,
        )
        first, negative = encode(request.prompt, request.negative, do_classifier_free_guidance=request.guided)
        later = [encode(p.prompt, do_classifier_free_guidance=False)[0] for p in request.travel]
        if policy == "offload":
            pipeline.text_encoder.to("cpu")
        return [embedding.to(self._dtype) for embedding in (first, *later, negative) if embedding is not None]

    @property
    def _resting_place(self) -> torch.device:
        offload = self._config.memory.text_encoder == "offload"
        return torch.device("cpu") if offload else self._ranks.device

    def _load(self, device: torch.device) -> WanPipeline:
        """Make diffusers' pipeline with only the parts that encode prompts."""
        return WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(self._folder.path / "tokenizer"),
            text_encoder=load_text_encoder(self._folder, self._config, device),
            vae=None,
            scheduler=None,
        )


def _truncated(tokenizer: Any, request: VideoRequest) -> list[str]:
    """Write a sentence for each text that has more tokens than the text encoder takes."""
    texts = [("prompt", request.prompt), *((f"travel at {p.at:g}", p.prompt) for p in request.travel)]
    if request.guided:
        texts.append(("negative", request.negative))
    sentences, room = [], request.max_sequence_length
    for name, text in texts:
        tokens = tokenizer(prompt_clean(text), verbose=False).input_ids
        if len(tokens) > room:  # the last one that is used is the end of the sequence
            words = tokenizer.decode(tokens[room - 1 :], skip_special_tokens=True).strip()
            sentences.append(
                f"{name}: it has {len(tokens)} tokens but max_sequence_length is {room}; the part that is "
                f"ignored begins with {words[:_SHOWN]!r}" + " …" * (len(words) > _SHOWN)
            )
    return sentences
