"""flux-tiny's transformer, text encoders and tokenizers: trained by flow matching, then distilled.

FLUX.1-dev takes the strength of guidance as an input. It learned that from a teacher with real guidance, and
so does flux-tiny: the teacher is the model as flow matching leaves it, with captions left out now and then.

Tensor legend: B batch, S image tokens (8 × 8), L text tokens, C channels of a token (2 × 2 latents of 8).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from flux_tiny_data import vocabulary
from tokenizers import models, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from wan_tiny_training import HELD_OUT_SEED, TRAIN_SEED, Stage, cosine, generator, linear_second_half, train
from wan_tiny_transformer import EMPTY_CAPTION_RATE, new_tokenizer

STEPS, DISTIL_STEPS, BATCH = 3000, 300, 24
CAPTION_TOKENS = 16
LEAST_GUIDANCE, MOST_GUIDANCE = 1.0, 5.0
SHIFT = float(np.exp(1.15))  # of 64 tokens, as of FLUX.1's 4096


def new_clip_tokenizer() -> CLIPTokenizer:
    """Make a byte-pair tokenizer in which every word of a caption is one token."""
    empty = CLIPTokenizer(model_max_length=CAPTION_TOKENS)
    backend = empty.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=[chr(code) for code in range(ord("!"), ord("~") + 1)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.model = models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    backend.train_from_iterator([word for word in vocabulary() for _ in range(2)], trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=CAPTION_TOKENS)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(3)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=CAPTION_TOKENS, projection_dim=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def new_transformer() -> FluxTransformer2DModel:
    """Make an untrained transformer whose blocks do nothing yet and whose output is zero."""
    torch.manual_seed(2)
    model = FluxTransformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    modulations = [
        name for name, _ in model.named_modules() if name.endswith((".norm1.linear", ".norm.linear"))
    ]
    modulations += [name for name, _ in model.named_modules() if name.endswith(".norm1_context.linear")]
    for name in (*modulations, "norm_out.linear", "proj_out"):
        layer = model.get_submodule(name)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


@dataclass
class Modules:
    """What is trained, and the tokenizers."""

    transformer: FluxTransformer2DModel
    t5: T5EncoderModel
    clip: CLIPTextModel
    t5_tokenizer: T5Tokenizer
    clip_tokenizer: CLIPTokenizer

    @classmethod
    def new(cls) -> Modules:
        t5_tokenizer, clip_tokenizer = new_tokenizer(vocabulary()), new_clip_tokenizer()
        t5, clip = new_t5(t5_tokenizer), new_clip(clip_tokenizer)
        return cls(new_transformer(), t5, clip, t5_tokenizer, clip_tokenizer)

    @property
    def trained(self) -> nn.ModuleList:
        """The modules with weights, the transformer first."""
        return nn.ModuleList([self.transformer, self.t5, self.clip])

    def velocity(
        self,
        noisy_BSC: torch.Tensor,
        sigma_B: torch.Tensor,
        guidance_B: torch.Tensor,
        captions: Sequence[str],
    ) -> torch.Tensor:
        """Velocity `[B, S, C]`, with the captions embedded as `FluxPipeline` embeds them."""
        long, short = (
            tokenizer(
                list(captions), padding="max_length", max_length=CAPTION_TOKENS, truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in (self.t5_tokenizer, self.clip_tokenizer)
        )  # fmt: skip
        side = int(noisy_BSC.shape[1] ** 0.5)
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1)
        return self.transformer(
            hidden_states=noisy_BSC,
            timestep=sigma_B,
            guidance=guidance_B,
            pooled_projections=self.clip(short).pooler_output,
            encoder_hidden_states=self.t5(long)[0],
            txt_ids=torch.zeros(CAPTION_TOKENS, 3),
            img_ids=F.pad(places.reshape(-1, 2), (1, 0)).float(),
            return_dict=False,
        )[0]


@dataclass
class Batch:
    """Stills on their way to noise: x = (1 − σ) x₀ + σ ε, with the velocity ε − x₀."""

    noisy_BSC: torch.Tensor
    target_BSC: torch.Tensor
    sigma_B: torch.Tensor
    guidance_B: torch.Tensor
    captions: list[str]

    @classmethod
    def draw(cls, data: dict[str, Any], stream: int, step: int) -> Batch:
        g = generator(stream, 21, step)
        size = len(data["captions"])
        epoch, offset = divmod(step * BATCH, size)
        order = torch.cat(
            [torch.randperm(size, generator=generator(stream, 22, e)) for e in (epoch, epoch + 1)]
        )
        chosen = order[offset : offset + BATCH]
        clean_BSC = packed(data["latents"][chosen])
        uniform_B = (torch.arange(BATCH) + torch.rand(BATCH, generator=g)) / BATCH
        sigma_B = SHIFT * uniform_B / (1 + (SHIFT - 1) * uniform_B)
        noise_BSC = torch.randn(clean_BSC.shape, generator=g)
        mix = sigma_B.view(-1, 1, 1)
        guidance_B = LEAST_GUIDANCE + (MOST_GUIDANCE - LEAST_GUIDANCE) * torch.rand(BATCH, generator=g)
        return cls(
            (1 - mix) * clean_BSC + mix * noise_BSC,
            noise_BSC - clean_BSC,
            sigma_B,
            guidance_B,
            [data["captions"][int(i)] for i in chosen],
        )


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Join 2 × 2 latents to a token: `[B, c, h, w]` → `[B, S, C]`, as `FluxPipeline` does."""
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


def new_optimisers(modules: nn.ModuleList, rate: float) -> list[torch.optim.Optimizer]:
    """Make the optimisers: Muon for the matrices of blocks except modulations, AdamW for the rest."""
    matrices = [
        parameter
        for name, parameter in modules[0].named_parameters()
        if "transformer_blocks" in name and parameter.ndim == 2 and ".linear." not in name
    ]
    held = {id(p) for p in matrices}
    others = [p for p in modules.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=2.5e-3 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3 * rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_transformer(stage: Stage, data: dict[str, Any]) -> Modules:
    modules = Modules.new()
    trained = modules.trained
    if stage.result.exists():
        trained.load_state_dict(torch.load(stage.result, weights_only=True))
        return modules

    def loss(part: str, stream: int, step: int) -> torch.Tensor:
        batch = Batch.draw(data[part], stream, step)
        drop = torch.rand(BATCH, generator=generator(stream, 23, step)) < EMPTY_CAPTION_RATE
        captions = ["" if dropped else text for text, dropped in zip(batch.captions, drop, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = modules.velocity(batch.noisy_BSC, batch.sigma_B, torch.ones(BATCH), captions)
        return F.mse_loss(velocity.float(), batch.target_BSC)

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        return {"held_out_loss": sum(loss("held_out", HELD_OUT_SEED, step).item() for step in range(3)) / 3}

    train(
        stage, trained, new_optimisers(trained, 1.0), STEPS, lambda step: loss("train", TRAIN_SEED, step),
        linear_second_half, average_decay=0.998, checkpoint_every=250, extra=held_out,
    )  # fmt: skip
    stage.save(stage.result, trained.state_dict())
    return modules


def distil(stage: Stage, data: dict[str, Any], modules: Modules) -> None:
    """Teach the model guidance of any strength from itself: v(g) = v(∅) + g (v(caption) − v(∅))."""
    trained = modules.trained
    if stage.result.exists():
        trained.load_state_dict(torch.load(stage.result, weights_only=True))
        return
    teacher = copy.deepcopy(modules)
    teacher.trained.requires_grad_(False)

    def loss_at(step: int) -> torch.Tensor:
        batch = Batch.draw(data["train"], TRAIN_SEED + 2, step)
        ones = torch.ones(BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                told = teacher.velocity(batch.noisy_BSC, batch.sigma_B, ones, batch.captions)
                untold = teacher.velocity(batch.noisy_BSC, batch.sigma_B, ones, [""] * BATCH)
            velocity = modules.velocity(batch.noisy_BSC, batch.sigma_B, batch.guidance_B, batch.captions)
        target = untold + batch.guidance_B.view(-1, 1, 1) * (told - untold)
        return F.mse_loss(velocity.float(), target.float())

    train(
        stage, trained, new_optimisers(trained, 0.4), DISTIL_STEPS, loss_at, cosine,
        average_decay=0.99, checkpoint_every=250,
    )  # fmt: skip
    stage.save(stage.result, trained.state_dict())


def pipeline_of(vae: AutoencoderKL, modules: Modules) -> FluxPipeline:
    """Put a pipeline together; its scheduler shifts 64 tokens as FLUX.1's shifts 4096."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=16, max_image_seq_len=64
    )
    return FluxPipeline(
        scheduler, vae, modules.clip, modules.clip_tokenizer, modules.t5, modules.t5_tokenizer,
        modules.transformer,
    )  # fmt: skip
