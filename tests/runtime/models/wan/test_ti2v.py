"""Wan2.2's TI2V-5B is one transformer and another VAE: text to video as diffusers' pipeline makes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer
from runtime.request.config import EMBEDDED_MODELS, Config, Tiles
from tests.conditioned import config_of

CHANNELS, PROMPT = 48, "a red circle"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanPipeline, Path]:
    whole = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", torch_dtype=torch.float32)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=64, freq_dim=32, ffn_dim=96, num_layers=2,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.05)
    made = WanPipeline(
        tokenizer=whole.tokenizer, text_encoder=whole.text_encoder, vae=vae, scheduler=whole.scheduler,
        transformer=transformer, expand_timesteps=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("ti2v")
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made, folder


def test_its_frames_are_the_pipelines_within_rounding(
    config: Config, pipeline: tuple[WanPipeline, Path]
) -> None:
    made, folder = pipeline
    own = config_of(config, folder)
    wanted = made(
        prompt=PROMPT, negative_prompt="", height=64, width=64, num_frames=9, num_inference_steps=4,
        guidance_scale=5.0, output_type="np", generator=torch.Generator("cpu").manual_seed(0),
    ).frames[0]  # fmt: skip
    request = own.request(PROMPT, width=64, height=64, frames=9, steps=4, guidance=5.0, spectrum="off")
    sink = FrameBuffer()
    Engine(own).generate(request, [sink])
    difference = np.abs(sink.frames.astype(int) - (wanted * 255).round().astype(int))
    assert difference.max() <= 1  # the pipeline embeds the time once per token, which rounds otherwise


def test_it_makes_no_video_from_an_image_and_none_of_half_a_token(
    config: Config, pipeline: tuple[WanPipeline, Path]
) -> None:
    engine = Engine(config_of(config, pipeline[1]).model_copy(update={"tiles": Tiles(size=64, stride=48)}))
    with pytest.raises(BadRequestError, match="makes videos from text alone"):
        engine.plan(
            engine.config.request(PROMPT, image="a.png", width=64, height=64, frames=9, spectrum="off")
        )
    with pytest.raises(BadRequestError, match=r"width: 48 given; .* needs a multiple of 32"):
        engine.plan(engine.config.request(PROMPT, width=48, height=64, frames=9, spectrum="off"))
