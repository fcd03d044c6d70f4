"""Weights of other layouts get the names that diffusers' own converters give them, and the settings fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import save_file

from runtime.models.layouts.stored import stored_in
from runtime.models.layouts.weights import Component, made
from runtime.models.wan.layouts.transformer import find_transformer
from runtime.models.wan.layouts.vae import find_vae
from tests.originals import (
    KINDS,
    State,
    original_residual_vae,
    original_transformer,
    original_vae,
    random_residual_vae,
    random_transformer,
    random_vae,
)


def stored(state: State, folder: Path) -> Any:
    file = folder / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return stored_in(file)


def check(component: Component | None, expected: State, model: Any) -> None:
    assert component is not None
    found = dict(made(component.weights))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rebuilt = type(model).from_config(component.settings)
    assert {name: one.shape for name, one in rebuilt.state_dict().items()} == {
        name: one.shape for name, one in model.state_dict().items()
    }
    stated = [name for name in component.settings if name != "_class_name"]
    mine, theirs = ({name: one.config[name] for name in stated} for one in (rebuilt, model))
    assert json.dumps(mine) == json.dumps(theirs)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_is_renamed_as_by_diffusers(kind: str, prefix: str, tmp_path: Path) -> None:
    model = random_transformer(kind)
    original = original_transformer(model.state_dict())
    assert original.keys().isdisjoint(name for name in model.state_dict() if name.startswith("blocks.0.attn"))
    converted = convert_wan_transformer_to_diffusers(dict(original))
    given = stored({prefix + name: value for name, value in original.items()}, tmp_path)
    check(find_transformer(given, {}), converted, model)


def test_the_vae_of_wan21_is_renamed_as_by_diffusers(tmp_path: Path) -> None:
    model = random_vae()
    original = original_vae(model.state_dict())
    check(find_vae(stored(original, tmp_path)), convert_wan_vae_to_diffusers(dict(original)), model)


def test_the_vae_of_wan22_is_renamed_back(tmp_path: Path) -> None:
    model = random_residual_vae()
    original = original_residual_vae(model.state_dict())
    check(find_vae(stored(original, tmp_path)), model.state_dict(), model)


def test_published_sizes_are_recognised_by_their_shapes() -> None:
    """diffusers takes TI2V-5B for I2V-14B, and every VAE for Wan2.1's."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )  # fmt: skip
    state = original_residual_vae(vae.state_dict())
    component = find_vae(listed(state))
    assert component is not None
    told = {
        name: component.settings[name] for name in ("base_dim", "decoder_base_dim", "scale_factor_spatial")
    }
    assert told == {"base_dim": 160, "decoder_base_dim": 256, "scale_factor_spatial": 16}
    assert component.settings["temperal_downsample"] == [False, True, True]


def listed(state: State) -> Any:
    from runtime.models.layouts.stored import Stored

    return {
        name: Stored(Path("x"), name, tuple(one.shape), str(one.dtype).removeprefix("torch."))
        for name, one in state.items()
    }
