"""wan-tiny's transformer, text encoder and tokenizer, trained together by flow matching.

Tensor legend: B batch, L text tokens, D text channels. Latents are `[B, 16, 5, 12, 12]`, normalised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
from wan_tiny_data import vocabulary
from wan_tiny_training import HELD_OUT_SEED, TRAIN_SEED, Stage, generator, linear_second_half, train

STEPS, BATCH = 2400, 32
FLOW_SHIFT = 3.0
EMPTY_CAPTION_RATE = 0.1
CAPTION_TOKENS = 16  # no caption is longer


def new_tokenizer(words: Sequence[str] = tuple(vocabulary())) -> T5Tokenizer:
    """Make a tokenizer: words of captions are tokens; other words are split into characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in words]
    pieces += [("▁", -5.0)]
    pieces += [(chr(code), -9.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def write_pipeline(
    out: Path, vae: AutoencoderKLWan, text_encoder: UMT5EncoderModel, flow_shift: float, **parts: Any
) -> None:
    """Write a diffusers folder in float16; `parts` are the transformers, and whatever else they need."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=flow_shift,
    )
    pipeline = WanPipeline(
        tokenizer=new_tokenizer(), text_encoder=text_encoder, vae=vae, scheduler=scheduler, **parts
    )
    save_half(pipeline, out)


def save_half(pipeline: DiffusionPipeline, out: Path) -> None:
    """Write a pipeline's diffusers folder in float16."""
    pipeline.to(torch.float16)
    pipeline.save_pretrained(out, safe_serialization=True)
    for path in out.glob("*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # the folder that weights came from says nothing to others
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def new_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    torch.manual_seed(1)
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def new_transformer(pad_bias: torch.Tensor) -> WanTransformer3DModel:
    """Make an untrained transformer whose output is zero and whose gates are small."""
    torch.manual_seed(2)
    model = WanTransformer3DModel(
        num_attention_heads=6, attention_head_dim=32, num_layers=8, ffn_dim=768, text_dim=64, freq_dim=128
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.mul_(0.3)
            block.attn1.set_processor(ExplicitAttention(pad_bias))
            block.attn2.set_processor(ExplicitAttention(pad_bias))
    return model


class ExplicitAttention:
    """Wan's attention as plain matrix products, at 180 tokens faster on a CPU than the fused kernel.

    In cross-attention the last key stands for all padding. Wan does not mask padding, and every padding token
    has the same embedding (zero), so one key with log(count) added to its score is exactly `count` of them.
    """

    def __init__(self, pad_bias: torch.Tensor):
        self.pad_bias = pad_bias

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        # type: ignore[no-untyped-def]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key = (
            F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)
            for x, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if rotary_emb is not None:
            cos, sin = (part.transpose(1, 2).to(query.dtype) for part in rotary_emb)
            query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        if encoder_hidden_states is not None:
            scores = torch.cat((scores[..., :-1], scores[..., -1:] + self.pad_bias), dim=-1)
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[..., 0::2], sin[..., 1::2]
        return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)


@dataclass
class CaptionedFlow:
    """The flow-matching objective on stored latents: x = (1 − σ) x₀ + σ ε, target ε − x₀, timestep 1000 σ.

    Attributes:
        noise: lowest and highest σ, for a transformer that is for a part of them.

    Random numbers are drawn on the CPU, so they are the same on every device.
    """

    transformer: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: T5Tokenizer
    pad_bias: torch.Tensor
    stream: int
    noise: tuple[float, float] = (0.0, 1.0)

    @property
    def device(self) -> torch.device:
        """Device of everything that is trained."""
        return self.pad_bias.device

    def embed(self, captions: Iterable[str], pad_to: int) -> torch.Tensor:
        """Caption embeddings `[B, L + 1, D]`; padding is zero, the last token stands for all that is left."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
        )
        ids, mask = (part.to(self.device) for part in (tokens.input_ids, tokens.attention_mask))
        hidden = self.text_encoder(ids, mask).last_hidden_state
        hidden = hidden * mask.unsqueeze(-1)
        self.pad_bias.fill_(math.log(pad_to - CAPTION_TOKENS))
        return F.pad(hidden, (0, 0, 0, 1))

    def loss(self, data: dict[str, Any], step: int, batch: int) -> torch.Tensor:
        g = generator(self.stream, 21, step)
        size = len(data["captions"])
        epoch, offset = divmod(step * batch, size)
        order = torch.cat(
            [torch.randperm(size, generator=generator(self.stream, 22, e)) for e in (epoch, epoch + 1)]
        )
        chosen = order[offset : offset + batch]
        clean = data["latents"][chosen]
        drop = torch.rand(batch, generator=g) < EMPTY_CAPTION_RATE
        captions = [
            "" if dropped else data["captions"][int(i)] for i, dropped in zip(chosen, drop, strict=True)
        ]
        pad_to = 512 if step % 2 else int(torch.randint(20, 513, (), generator=g))
        uniform = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
        low, high = (level / (FLOW_SHIFT - (FLOW_SHIFT - 1) * level) for level in self.noise)
        uniform = low + (high - low) * uniform
        sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
        noise = torch.randn(clean.shape, generator=g)
        clean, noise, sigma = (x.to(self.device) for x in (clean, noise, sigma))
        mix = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.transformer(
                hidden_states=(1 - mix) * clean + mix * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=self.embed(captions, pad_to),
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - clean)


def new_optimisers(modules: nn.ModuleList, rate: float = 1.0) -> list[torch.optim.Optimizer]:
    """Make the optimisers of modules the first of which is the transformer; `rate` scales learning rates."""
    matrices = [p for p in modules[0].blocks.parameters() if p.ndim == 2]
    held = {id(p) for p in matrices}
    others = [p for p in modules.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=2.5e-3 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3 * rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_transformer(stage: Stage, data: dict[str, Any], compiled: bool) -> nn.ModuleList:
    tokenizer, pad_bias = new_tokenizer(), torch.zeros(())
    transformer, text_encoder = new_transformer(pad_bias), new_text_encoder(len(tokenizer))
    modules = nn.ModuleList([transformer, text_encoder])
    if stage.result.exists():
        modules.load_state_dict(torch.load(stage.result, weights_only=True))
        return modules
    if compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    optimisers = new_optimisers(modules)
    flow = CaptionedFlow(transformer, text_encoder, tokenizer, pad_bias, TRAIN_SEED)
    held_out_flow = CaptionedFlow(transformer, text_encoder, tokenizer, pad_bias, HELD_OUT_SEED)

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        losses = [held_out_flow.loss(data["held_out"], step, 32).item() for step in range(6)]
        return {"held_out_loss": sum(losses) / len(losses)}

    train(
        stage, modules, optimisers, STEPS,
        lambda step: flow.loss(data["train"], step, BATCH), linear_second_half,
        average_decay=0.998, checkpoint_every=250, extra=held_out,
    )  # fmt: skip
    stage.save(stage.result, modules.state_dict())
    return modules
