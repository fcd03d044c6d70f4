"""What is forecast, derived anew: features and outputs of real transformers, extrapolated by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import nn

from spectrum import FixedSchedule, LinearExtrapolation
from spectrum.diffusers import Preset, disable, enable, report
from tests.pipelines import TEXT, flux, noise, wan_transformer

TIMES = [1.0, 0.8, 0.5, 0.3]
COMPUTED = (0, 1)


def flux_call(transformer: nn.Module, step: int) -> torch.Tensor:
    ids = torch.zeros(TEXT, 3), torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return transformer(
        noise(1, 16, 4, seed=step),
        encoder_hidden_states=PROMPT,
        pooled_projections=POOLED,
        timestep=torch.tensor([TIMES[step]]),
        txt_ids=ids[0],
        img_ids=ids[1],
    ).sample


def wan_call(transformer: nn.Module, step: int) -> torch.Tensor:
    return transformer(
        noise(1, 4, 2, 4, 4, seed=step), torch.tensor([1000 * TIMES[step]]), PROMPT, return_dict=False
    )[0]


PROMPT, POOLED = noise(1, TEXT, 32), noise(1, 32)
BYTES = noise(1, 3, 16)


def hunyuan_video15() -> nn.Module:
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        in_channels=9,
        out_channels=4,
    )


def hunyuan_video15_call(transformer: nn.Module, step: int) -> torch.Tensor:
    return transformer(
        noise(1, 9, 2, 4, 4, seed=step),
        timestep=torch.tensor([1000 * TIMES[step]]),
        encoder_hidden_states=PROMPT,
        encoder_attention_mask=torch.ones(1, TEXT),
        encoder_hidden_states_2=BYTES,
        encoder_attention_mask_2=torch.ones(1, 3),
        image_embeds=torch.zeros(1, 4, 12),
    ).sample


@dataclass(frozen=True)
class Model:
    """A transformer; `place` is that of the image's tokens in what its last block returns."""

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, int], torch.Tensor]
    blocks: str
    place: int


MODELS = {
    "flux": Model(lambda: flux().pipe.transformer, flux_call, "single_transformer_blocks", 1),
    "hunyuan_video15": Model(hunyuan_video15, hunyuan_video15_call, "transformer_blocks", 0),
    "wan": Model(wan_transformer, wan_call, "blocks", 0),
}


def preset(stream: str) -> Preset:
    return Preset(
        "by hand", lambda steps: FixedSchedule(steps, COMPUTED), lambda steps: LinearExtrapolation(), stream
    )


def straight(values: list[torch.Tensor], step: int) -> torch.Tensor:
    """The line through steps 0 and 1, in float64."""
    first, second = values[0].double(), values[1].double()
    return (first + step * (second - first)).float()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_outputs_are_extrapolated(name: str) -> None:
    call, model = MODELS[name].call, MODELS[name].make()
    outputs = [call(model, step) for step in range(4)]
    enable(model, preset("velocity"), steps=4)
    found = [call(model, step) for step in range(4)]
    assert all(torch.equal(found[step], outputs[step]) for step in COMPUTED)
    for step in (2, 3):
        torch.testing.assert_close(found[step], straight(outputs, step), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[step], outputs[step], rtol=1e-2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_are_extrapolated_and_the_head_sees_the_current_timestep(name: str) -> None:
    call, model, place = MODELS[name].call, MODELS[name].make(), MODELS[name].place
    last = getattr(model, MODELS[name].blocks)[-1]
    features: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        features.append((output[place] if isinstance(output, tuple) else output).clone())

    handle = last.register_forward_hook(keep)
    outputs = [call(model, step) for step in range(4)]
    handle.remove()
    expected = []
    for step in (2, 3):

        def put(_module: nn.Module, _inputs: Any, output: Any, step: int = step) -> Any:
            forecast = straight(features, step)
            if not isinstance(output, tuple):
                return forecast
            return tuple(forecast if at == place else value for at, value in enumerate(output))

        handle = last.register_forward_hook(put)
        expected.append(call(model, step))
        handle.remove()
    enable(model, preset("feature"), steps=4)
    found = [call(model, step) for step in range(4)]
    assert all(torch.equal(found[step], outputs[step]) for step in COMPUTED)
    for step, value in zip((2, 3), expected, strict=True):
        torch.testing.assert_close(found[step], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[step], outputs[step], rtol=1e-2)
    assert report(model)["transformer"].bytes == 2 * features[0].numel() * 4
    disable(model)
    assert torch.equal(call(model, 3), outputs[3])


class Two(nn.Module):
    """A transformer with two outputs, which no table knows."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        return {"video": hidden_states * timestep, "audio": [hidden_states[:1] + timestep], "text": None}


@torch.no_grad()
def test_any_transformer_of_tensors_has_a_velocity_stream() -> None:
    model = Two()
    enable(model, preset("velocity"), steps=4)
    sample = noise(3, 2)
    outputs = [model(sample, torch.tensor(4.0 - step)) for step in range(4)]
    torch.testing.assert_close(outputs[3]["video"], sample * 1.0)  # linear in the timestep, so exact
    torch.testing.assert_close(outputs[3]["audio"][0], sample[:1] + 1.0)
    assert outputs[3]["text"] is None and report(model)["transformer"].forecast == (2, 3)


@torch.no_grad()
def test_what_a_pipeline_does_to_an_output_does_not_reach_the_history() -> None:
    model = Two()
    enable(model, preset("velocity"), steps=4)
    for step in range(3):
        output = model(noise(3, 2), torch.tensor(4.0 - step))["video"]
        if step == 2:
            torch.testing.assert_close(output, noise(3, 2) * 2.0)
        output.zero_()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_transformers_forecast_as_well() -> None:
    call, model = wan_call, wan_transformer()
    enable(model, preset("feature"), steps=4)
    expected = [call(model, step) for step in range(4)]
    disable(model)
    enable(model, preset("feature"), steps=4)
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    found = [call(compiled, step) for step in range(4)]
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another)
    assert report(compiled)["transformer"].computed == COMPUTED
    assert len(graphs) <= 3  # one of all blocks, one of none; no block begins another


@pytest.mark.slow
@torch.no_grad()
def test_blocks_are_compiled_without_a_break() -> None:
    model = wan_transformer()
    enable(model, preset("feature"), steps=4)
    expected = [wan_call(model, step) for step in range(4)]
    disable(model)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    enable(model, preset("feature"), steps=4)
    for step in range(4):
        torch.testing.assert_close(wan_call(model, step), expected[step])
    assert report(model)["transformer"].forecast == (2, 3)
