"""Streaming decode gives what the VAE gives in one piece."""

from __future__ import annotations

import torch

from runtime.decode import decode_frames
from runtime.engine import Engine


@torch.no_grad()
def test_chunks_are_the_whole_decode(engine: Engine) -> None:
    vae = engine._pipeline.vae
    latents = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    expected = engine._pipeline.video_processor.postprocess_video(
        vae.decode(latents / std + mean).sample, output_type="pt"
    )
    chunks = list(decode_frames(vae, latents))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=1), expected.permute(0, 1, 3, 4, 2))


def test_a_decode_given_up_half_way_leaves_the_vae_clean(engine: Engine) -> None:
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = list(decode_frames(engine._pipeline.vae, latents))
    begun = decode_frames(engine._pipeline.vae, latents)
    next(begun)
    del begun
    again = list(decode_frames(engine._pipeline.vae, latents))
    assert torch.equal(torch.cat(whole, 1), torch.cat(again, 1))
