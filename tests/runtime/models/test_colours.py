"""The linear map from latents to colours: exact where there is one, and read back or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from runtime.models.clips import draw_clips
from runtime.models.colours import LatentColours, areas, fit_colours


def pixels(colours_BFHW3: torch.Tensor, temporal: int, spatial: int) -> torch.Tensor:
    """Frames in which each area has its colour: one for the first latent frame, several for each other."""
    frames = colours_BFHW3.repeat_interleave(spatial, 2).repeat_interleave(spatial, 3)
    return torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(temporal, 1)], dim=1)


def test_a_map_that_is_linear_is_found() -> None:
    numbers = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 5, 3, 8, 6, generator=numbers)
    true = LatentColours(torch.randn(5, 3, generator=numbers) * 0.04, torch.tensor([0.5, 0.4, 0.6]))
    frames = pixels(torch.einsum("bcfhw,cd->bfhwd", latents, true.weights_C3) + true.bias_3, 4, 8)
    found = fit_colours(latents, frames)
    assert torch.allclose(found.weights_C3, true.weights_C3, rtol=0.01, atol=2e-4)
    assert torch.allclose(found.bias_3, true.bias_3, atol=1e-4)
    torch.testing.assert_close(found.rgb(latents), true.rgb(latents), atol=1e-3, rtol=0)


def test_an_area_is_the_mean_of_its_pixels() -> None:
    frames = torch.rand(2, 9, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    found = areas(frames, (3, 2, 3))
    assert found.shape == (2, 3, 2, 3, 3)
    for latent, own in ((0, slice(0, 1)), (1, slice(1, 5)), (2, slice(5, 9))):
        expected = frames[1, own, 8:16, 16:24].numpy().mean((0, 1, 2))
        assert np.allclose(found[1, latent, 1, 2], expected, atol=1e-6)
    assert areas(frames[:, :1], (1, 2, 3)).shape == (2, 1, 2, 3, 3)


def test_far_out_places_do_not_decide() -> None:
    """A VAE is not linear far from what it has seen: a map is for latents as they are."""
    numbers = torch.Generator().manual_seed(0)
    usual, odd = torch.randn(1, 4, 1, 16, 16, generator=numbers), torch.full((1, 4, 1, 16, 16), 6.0)
    colours = pixels((0.5 + 0.1 * usual[:, :3]).movedim(1, -1), 1, 2)
    latents, frames = torch.cat([usual, odd]), torch.cat([colours, torch.zeros_like(colours)])
    inputs = torch.cat([latents.movedim(1, -1).reshape(-1, 4), torch.ones(512, 1)], dim=1)
    solved = torch.linalg.lstsq(inputs, areas(frames, (1, 16, 16)).reshape(-1, 3)).solution
    alone = fit_colours(usual, colours).rgb(usual)
    weighted, plain = fit_colours(latents, frames), LatentColours(solved[:4], solved[4])
    assert (weighted.rgb(usual) - alone).abs().mean() < (plain.rgb(usual) - alone).abs().mean() / 2


def test_it_is_read_as_it_was_written() -> None:
    one = LatentColours(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), torch.rand(3))
    again = LatentColours.from_json(one.to_json(), 16)
    assert again is not None
    assert torch.equal(again.weights_C3, one.weights_C3) and torch.equal(again.bias_3, one.bias_3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("[", "[null,", 1),
        lambda text: json.dumps(json.loads(text) | {"bias": [float("nan")] * 3}),
        lambda text: json.dumps(json.loads(text) | {"bias": [0.5]}),
        lambda text: json.dumps({"weights": json.loads(text)["weights"][1:], "bias": [0.5] * 3}),
    ],
)
def test_a_damaged_one_is_none(damage: object) -> None:
    text = LatentColours(torch.ones(4, 3), torch.ones(3)).to_json()
    assert LatentColours.from_json(text, 4) is not None
    assert LatentColours.from_json(damage(text), 4) is None  # type: ignore[operator]


def test_clips_are_the_same_every_time_and_have_all_kinds_of_colours() -> None:
    clips = draw_clips(16, 5, 32)
    assert clips.shape == (16, 3, 5, 32, 32)
    assert torch.equal(clips, draw_clips(16, 5, 32)) and not torch.equal(clips, draw_clips(16, 5, 32, seed=1))
    assert clips.min() < 0.05 and clips.max() > 0.95
    assert clips.mean((0, 2, 3, 4)).sub(0.5).abs().max() < 0.2
    assert (clips[:, :, 0] != clips[:, :, -1]).flatten(1).any(1).all()  # something moves in each
