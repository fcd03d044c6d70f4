"""Pipelines of diffusers with tiny random transformers, called with embeddings instead of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

STEPS = 12
TEXT = 5  # tokens of a prompt


class Tiny:
    """A pipeline of one family.

    Attributes:
        pipe: the pipeline.
        inputs: arguments of a call; embeddings, sizes and guidance.
        stream: the stream that a test has chosen.
    """

    stream = "feature"

    def __init__(self, pipe: Any, inputs: dict[str, Any]):
        self.pipe, self.inputs = pipe, inputs
        pipe.set_progress_bar_config(disable=True)

    def run(self, steps: int = STEPS, seed: int = 0, **changes: Any) -> torch.Tensor:
        """Latents of a generation."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {**self.inputs, "num_inference_steps": steps, "generator": generator, **changes}
        latents = self.pipe(**arguments, output_type="latent", return_dict=False)[0]
        return torch.stack(list(latents)) if isinstance(latents, list) else latents


class Evaluations:
    """Counts how often modules are really run, whatever hooks they have."""

    def __init__(self, modules: list[nn.Module]):
        self.counts = [0] * len(modules)
        for place, module in enumerate(modules):
            module.register_forward_pre_hook(self._counting(place))

    def _counting(self, place: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.counts[place] += 1

        return count


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux(**changes: Any) -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        **changes,
    )
    pipe = diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, transformer
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "pooled_prompt_embeds": noise(1, 32),
        "height": 64,
        "width": 64,
        "guidance_scale": 3.5,
    }
    return Tiny(pipe, inputs)


def wan_transformer(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        **changes,
    )


def wan(**components: Any) -> Tiny:
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=wan_transformer(),
        **components,
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 4.0,
    }
    return Tiny(pipe, inputs)


def sd3() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "pooled_prompt_embeds": noise(1, 64),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 64, seed=2),
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, inputs)


def hunyuan_video() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    pipe = diffusers.HunyuanVideoPipeline(
        None, None, transformer, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 16),
        "pooled_prompt_embeds": noise(1, 8),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }
    return Tiny(pipe, inputs)


def ltx() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=32,
    )
    pipe = diffusers.LTXPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, transformer
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }
    return Tiny(pipe, inputs)


def qwen_image() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = diffusers.QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, transformer
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 16),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds": noise(1, TEXT, 16, seed=2),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "true_cfg_scale": 2.0,
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, inputs)


def cogvideox() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TEXT,
    )
    pipe = diffusers.CogVideoXPipeline(None, None, None, transformer, diffusers.CogVideoXDDIMScheduler())
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }
    return Tiny(pipe, inputs)


def mochi() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    pipe = diffusers.MochiPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "height": 32,
        "width": 32,
        "num_frames": 7,
    }
    return Tiny(pipe, inputs)


def z_image() -> Tiny:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # made with torch.empty
        nn.init.normal_(getattr(transformer, name))
    pipe = diffusers.ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    inputs = {
        "prompt_embeds": [noise(TEXT, 16)],
        "negative_prompt_embeds": [noise(TEXT, 16, seed=2)],
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, inputs)


def stable_diffusion() -> Tiny:
    """A pipeline with a UNet, whose scheduler does not count."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        None, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    inputs = {
        "prompt_embeds": noise(1, TEXT, 32),
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, inputs)


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "cogvideox": cogvideox,
    "flux": flux,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "mochi": mochi,
    "qwen_image": qwen_image,
    "sd3": sd3,
    "wan": wan,
    "z_image": z_image,
}
