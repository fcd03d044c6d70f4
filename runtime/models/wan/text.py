"""Text embeddings of prompts, encoded on the first rank only and broadcast to the others.

Tensor legend: B batch, T text tokens, E text encoder channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from runtime.models.base import Embeddings
from runtime.models.folder import ModelFolder
from runtime.models.wan.loading import load_text_encoder
from runtime.parallel.offloading import Visitor
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest

_SHOWN = 200  # characters of a truncated text's rest
_ROOM = 2**28  # bytes of host memory for embeddings of earlier texts; one of UMT5-XXL has 4 MiB


class PromptEncoder:
    """Text encoder of one rank group; only its first rank loads one.

    A text is encoded once: embeddings of the latest texts, such as a negative prompt that all requests share,
    are kept in host memory. What all ranks got for the last request is kept, too, as a comparison needs it.

    Args:
        folder, config, ranks: the model, its config, and the ranks.
        dtype: dtype of the embeddings, the transformer's compute dtype.

    Attributes:
        warnings: sentences about the part of the last prompt that was truncated, on the first rank.
        encoded: number of texts that were encoded so far.

    Source: `diffusers.WanPipeline.encode_prompt`, which does the encoding.
    """

    def __init__(self, folder: ModelFolder, config: Config, ranks: Ranks, dtype: torch.dtype):
        self._folder, self._config, self._ranks, self._dtype = folder, config, ranks, dtype
        self._encoder: UMT5EncoderModel | None = None
        self._visitor: Visitor | None = None
        self._tokenizer: Any = None
        self._last: tuple[tuple[object, ...], Embeddings] | None = None
        self._known = _Known()
        self.warnings: list[str] = []
        self.encoded = 0
        where: str = config.memory.text_encoder
        self._where = "keep" if where == "auto" and ranks.device.type == "cpu" else where
        if ranks.is_leader and self._where in ("keep", "offload"):
            self._load(ranks.device if self._where == "keep" else torch.device("cpu"))
            self._leave()

    def rest(self, where: str) -> None:
        """Have the encoder rest there from now on while it does not encode; undecided, it is offloaded.

        Args:
            where: value of `memory.text_encoder`.
        """
        self._where = where
        if self._visitor is not None and where == "keep":
            self._visitor.come()
        if self._encoder is not None:
            self._leave()

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
        """Encode each prompt, then the negative one; only texts whose embeddings are not known."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._folder.path / "tokenizer")
        self.warnings = _truncated(self._tokenizer, request)
        texts, length = [request.prompt, *(one.prompt for one in request.travel)], request.max_sequence_length
        if request.guided:
            texts.append(request.negative)
        found = {text: self._known.find(text, length) for text in texts}
        missing = [text for text, known in found.items() if known is None]
        if missing:
            found |= dict(zip(missing, self._encode(missing, length), strict=True))
        embeddings = [found[text] for text in texts]
        device, videos = self._ranks.device, request.videos
        return [one.to(device).repeat(videos, 1, 1) for one in embeddings if one is not None]

    def _encode(self, texts: Sequence[str], length: int) -> list[torch.Tensor]:
        """Encode texts, and remember their embeddings."""
        found = []
        with self._at_work() as encoder:
            pipeline = WanPipeline(tokenizer=self._tokenizer, text_encoder=encoder, vae=None, scheduler=None)
            for text in texts:
                embedding, _ = pipeline.encode_prompt(
                    text,
                    do_classifier_free_guidance=False,
                    max_sequence_length=length,
                    device=self._ranks.device,
                )
                found.append(embedding.to(self._dtype))
        for text, embedding in zip(texts, found, strict=True):
            self._known.keep(text, length, embedding.to("cpu"))
        self.encoded += len(texts)
        return found

    @contextmanager
    def _at_work(self) -> Iterator[UMT5EncoderModel]:
        """Have the encoder on the device within the context."""
        encoder = self._encoder or self._load(self._ranks.device)
        if self._visitor is not None:
            self._visitor.come()
        try:
            yield encoder
        finally:
            del encoder
            self._leave()

    def _leave(self) -> None:
        """Let the encoder go where it rests."""
        if self._where == "free":
            self._encoder = self._visitor = None
        elif self._where != "keep" and self._ranks.device.type != "cpu" and self._encoder is not None:
            self._visitor = self._visitor or Visitor(self._encoder, self._ranks.device)
            self._visitor.leave()

    def _load(self, device: torch.device) -> UMT5EncoderModel:
        self._encoder = load_text_encoder(self._folder, self._config, device)
        return self._encoder


class _Known:
    """Embeddings of the latest texts, in host memory: `[1, T, E]` each, up to `room` bytes."""

    def __init__(self, room: int = _ROOM):
        self._found = OrderedDict[tuple[str, int], torch.Tensor]()
        self._bytes, self._room = 0, room

    def find(self, text: str, length: int) -> torch.Tensor | None:
        """Embedding of a text of at most so many tokens; None if it is not known."""
        found = self._found.get((text, length))
        if found is not None:
            self._found.move_to_end((text, length))
        return found

    def keep(self, text: str, length: int, embedding: torch.Tensor) -> None:
        """Remember a text's embedding, and forget the least recently used if there is no room."""
        self._found[text, length] = embedding
        self._bytes += embedding.nbytes
        while self._bytes > self._room:
            self._bytes -= self._found.popitem(last=False)[1].nbytes


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
