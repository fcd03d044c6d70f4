"""wan-tiny's training: resumable to the bit, and exact where it takes short cuts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from wan_tiny_training import Stage, cosine, generator, train
from wan_tiny_transformer import (
    CAPTION_TOKENS,
    CaptionedFlow,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
)
from wan_tiny_vae import new_vae


def toy(folder: Path, *, stop_at: int | None = None) -> torch.Tensor:
    """Fit a line for 20 steps with checkpoints every 5; perhaps be killed at a step."""
    torch.manual_seed(0)
    modules = nn.ModuleList([nn.Linear(3, 1)])

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator(0, step))
        return (modules[0](x) - x.sum(dim=1, keepdim=True)).square().mean()

    optimiser = torch.optim.AdamW(modules.parameters(), lr=0.1)
    folder.mkdir(exist_ok=True)
    stage = Stage(folder, "toy")
    train(stage, modules, [optimiser], 20, loss_at, cosine, average_decay=0.9, checkpoint_every=5)
    return torch.cat([p.detach().flatten() for p in modules.parameters()])


@pytest.mark.parametrize("stop_at", [3, 12, 19])
def test_a_resumed_training_ends_in_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "resumed", stop_at=stop_at)
    assert torch.equal(toy(tmp_path / "resumed"), toy(tmp_path / "straight"))


@pytest.mark.parametrize("noise", [(0.0, 1.0), (0.875, 1.0), (0.0, 0.875)])
def test_an_expert_is_trained_on_its_own_noise_levels_alone(noise: tuple[float, float]) -> None:
    """Spread over all of them, each batch anew."""
    tokenizer, pad_bias, seen = new_tokenizer(), torch.zeros(()), []
    model, text_encoder = new_transformer(pad_bias), new_text_encoder(len(tokenizer))
    model.register_forward_pre_hook(lambda _, args, named: seen.append(named["timestep"]), with_kwargs=True)
    data = {"latents": torch.randn(16, 16, 1, 4, 4), "captions": ["a red circle"] * 16}
    flow = CaptionedFlow(model, text_encoder, tokenizer, pad_bias, 0, noise)
    with torch.no_grad():
        for step in range(4):
            flow.loss(data, step, 16)
    levels = torch.cat(seen) / 1000
    low, high = noise
    assert len(levels) == len(set(levels.tolist())) == 64
    assert levels.min() >= low and levels.max() <= high
    assert levels.min() < low + 0.1 * (high - low) and levels.max() > high - 0.1 * (high - low)


def test_the_training_attention_is_wans_own() -> None:
    """One key for all padding, with the logarithm of its count, equals attending to every padding token."""
    tokenizer, pad_bias = new_tokenizer(), torch.zeros(())
    fast, text_encoder = new_transformer(pad_bias), new_text_encoder(len(tokenizer))
    nn.init.normal_(fast.proj_out.weight, std=0.1)
    plain = WanTransformer3DModel.from_config(fast.config)
    plain.load_state_dict(fast.state_dict())
    latents, timestep = torch.randn(2, 16, 2, 4, 4, generator=generator(1)), torch.tensor([300.0, 900.0])
    flow = CaptionedFlow(fast, text_encoder, tokenizer, pad_bias, stream=0)
    with torch.no_grad():
        folded = flow.embed(["a red circle growing on a white background", ""], pad_to=64)
        assert float(pad_bias) == pytest.approx(math.log(64 - CAPTION_TOKENS))
        padded = torch.cat([folded[:, :-1], torch.zeros(2, 64 - CAPTION_TOKENS, folded.shape[-1])], dim=1)
        torch.testing.assert_close(
            fast(latents, timestep, folded, return_dict=False)[0],
            plain(latents, timestep, padded, return_dict=False)[0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_untrained_vae_passes_pictures_through() -> None:
    """It starts near the identity on flat pictures, not at their mean."""
    vae = new_vae()
    dark, bright = (torch.full((1, 3, 1, 16, 16), value) for value in (-0.8, 0.8))
    with torch.no_grad():
        outputs = [vae.decode(vae.encode(x).latent_dist.mode()).sample.mean() for x in (dark, bright)]
    assert outputs[1] - outputs[0] > 0.5


def test_unknown_words_are_read_by_letters() -> None:
    tokenizer = new_tokenizer()
    known, unknown = tokenizer("red").input_ids, tokenizer("zebra").input_ids
    assert len(known) == 2
    assert tokenizer.unk_token_id not in unknown and len(unknown) == 7
