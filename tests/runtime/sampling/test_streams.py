"""Streams against the same thing done by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from runtime.models.wan.adapter import WanAdapter
from runtime.parallel.guidance import LocalGuidance, NoGuidance
from runtime.parallel.ranks import Ranks
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, denoise
from runtime.sampling.network import Branch, Network
from runtime.sampling.streams import STREAMS, ComputedStream, FeatureStream, Stream
from spectrum import ChebyshevRidge, FixedSchedule, StepKind, paper_schedule
from tests.launches import Launches

PREDICTOR = ChebyshevRidge(horizon=12)
ALONE = Ranks.alone(torch.device("cpu"))
COMPUTED = {"cond": StepKind.COMPUTE, "uncond": StepKind.COMPUTE}
FORECAST = {"cond": StepKind.FORECAST, "uncond": StepKind.FORECAST}


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    adapter = WanAdapter(
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=16
        ).eval()
    )
    with torch.no_grad():
        branches = tuple(Branch(name, adapter.text(torch.randn(1, 5, 16))) for name in ("cond", "uncond"))
        return Network(
            adapter, adapter.geometry(torch.empty(1, 16, 2, 4, 4)), branches, guidance=LocalGuidance(4.0)
        )


def sampler(steps: int = 12) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    return scheduler


def noise() -> torch.Tensor:
    return torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(5))


def run(stream: Stream, schedule: FixedSchedule) -> Denoising:
    coordinator = Coordinator({"cond": schedule, "uncond": schedule}, "", ALONE)
    state = Denoising(noise(), sampler(), stream, coordinator)
    assert list(denoise(state, ALONE)) == state.steps
    return state


@torch.no_grad()
def test_guidance_joins_the_branches(network: Network) -> None:
    latents, timestep = noise(), torch.tensor([500.0])
    guided = ComputedStream(network).advance(0, COMPUTED, latents, timestep).velocity_BCFHW
    alone = [
        ComputedStream(Network(network.adapter, network.geometry, (branch,), NoGuidance())).advance(
            0, COMPUTED, latents, timestep
        )
        for branch in network.branches
    ]
    cond, uncond = (output.velocity_BCFHW for output in alone)
    assert torch.equal(guided, uncond + 4.0 * (cond - uncond))


def test_a_schedule_that_computes_all_gives_the_bits_of_no_forecasting(network: Network) -> None:
    streams = (ComputedStream(network), *(make(network, PREDICTOR) for make in STREAMS.values()))
    results = [run(stream, FixedSchedule.full(12)).latents_BCFHW for stream in streams]
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_forecast_is_the_head_of_the_weighted_features(network: Network) -> None:
    stream, timesteps = FeatureStream(network, PREDICTOR), torch.linspace(1000, 100, 8)
    adapter, remembered = network.adapter, []
    for step in (0, 1, 3):
        latents = noise() * (1 + step)
        stream.advance(step, COMPUTED, latents, timesteps[step : step + 1])
        time = adapter.time(timesteps[step : step + 1])
        remembered.append(
            [
                adapter.blocks(adapter.embed(latents), b.text_BTD, time, network.geometry.rotary)  # type: ignore[attr-defined]
                for b in network.branches
            ]
        )
    weights = PREDICTOR.weights([0, 1, 3], 5)
    time = adapter.time(timesteps[5:6])
    cond, uncond = (
        adapter.unpatchify(
            adapter.project(
                sum(w * features[branch] for w, features in zip(weights.tolist(), remembered, strict=True)),
                time,
            ),
            network.geometry.grid,
        )
        for branch in (0, 1)
    )
    forecast = stream.advance(5, FORECAST, noise(), timesteps[5:6]).velocity_BCFHW
    torch.testing.assert_close(forecast, uncond + 4.0 * (cond - uncond), rtol=1e-4, atol=1e-5)
    assert stream.kept == 3
    assert stream.bytes == 2 * 3 * remembered[0][0].numel() * 4


@torch.no_grad()
def test_error_is_that_of_the_forecast_that_was_not_needed(network: Network) -> None:
    stream, timestep = FeatureStream(network, PREDICTOR), torch.tensor([800.0])
    adapter = network.adapter
    assert stream.advance(0, COMPUTED, noise(), timestep).squares is None
    time, second = adapter.time(timestep), noise() * 2
    features = [
        [
            adapter.blocks(adapter.embed(x), b.text_BTD, time, network.geometry.rotary)  # type: ignore[attr-defined]
            for x in (noise(), second)
        ]
        for b in network.branches
    ]
    weight = float(PREDICTOR.weights([0], 1)[0])
    error = sum(float((weight * old - new).square().sum()) for old, new in features)
    truth = sum(float(new.square().sum()) for _, new in features)
    squares = stream.advance(1, COMPUTED, second, timestep).squares
    assert squares is not None
    assert squares.read() == (pytest.approx(error, rel=1e-4), pytest.approx(truth, rel=1e-4))


@torch.no_grad()
def test_one_branch_may_be_computed_while_the_other_is_forecast(network: Network) -> None:
    mixed = {"cond": StepKind.COMPUTE, "uncond": StepKind.FORECAST}
    stream, timestep = FeatureStream(network, PREDICTOR), torch.tensor([800.0])
    stream.advance(0, COMPUTED, noise(), timestep)
    adapter, time = network.adapter, network.adapter.time(timestep)
    cond, uncond = (
        adapter.blocks(adapter.embed(x), branch.text_BTD, time, network.geometry.rotary)  # type: ignore[attr-defined]
        for x, branch in zip((noise() * 2, noise()), network.branches, strict=True)
    )
    forecast = uncond * float(PREDICTOR.weights([0], 1)[0])
    expected = network.velocity([adapter.project(feature, time) for feature in (cond, forecast)])
    torch.testing.assert_close(
        stream.advance(1, mixed, noise() * 2, timestep).velocity_BCFHW, expected, rtol=1e-4, atol=1e-5
    )


def test_forecast_steps_run_no_block(network: Network) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = network.adapter._model.blocks[0].register_forward_hook(count)  # type: ignore[attr-defined]
    try:
        schedule = paper_schedule(12, warmup=2)
        stream = FeatureStream(network, PREDICTOR)
        kinds = [record.kind for record in run(stream, schedule).steps]
    finally:
        hook.remove()
    assert calls == 2 * schedule.nfe == 2 * kinds.count(StepKind.COMPUTE)
    assert schedule.nfe < 12


def test_a_stream_that_remembers_nothing_cannot_forecast(network: Network) -> None:
    with pytest.raises(RuntimeError, match="step 3"):
        ComputedStream(network).advance(3, FORECAST, noise(), torch.tensor([1.0]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["velocity", "guided"])
def test_outputs_are_forecast_by_their_weights(network: Network, name: str) -> None:
    """Guidance and the weights are linear: both streams forecast the weighted sum of the guided outputs."""
    stream, remembered = STREAMS[name](network, PREDICTOR), []
    timesteps = torch.linspace(1000, 100, 8)
    for step in (0, 1, 3):
        latents = noise() * (1 + step)
        remembered.append(stream.advance(step, COMPUTED, latents, timesteps[step : step + 1]).velocity_BCFHW)
    weights = PREDICTOR.weights([0, 1, 3], 5).tolist()
    expected = sum(w * velocity for w, velocity in zip(weights, remembered, strict=True))
    forecast = stream.advance(5, FORECAST, noise(), timesteps[5:6]).velocity_BCFHW
    torch.testing.assert_close(forecast, expected, rtol=1e-4, atol=1e-5)
    assert stream.kept == 3
    assert stream.bytes == 3 * noise().numel() * 4 * (2 if name == "velocity" else 1)


@torch.no_grad()
def test_forecasts_of_outputs_run_nothing_of_the_model(network: Network) -> None:
    for name in ("velocity", "guided"):
        stream = STREAMS[name](network, PREDICTOR)
        stream.advance(0, COMPUTED, noise(), torch.tensor([900.0]))
        hook = network.adapter._model.proj_out.register_forward_hook(lambda *_: pytest.fail("it ran"))  # type: ignore[attr-defined]
        try:
            stream.advance(1, FORECAST, noise(), torch.tensor([800.0]))
        finally:
            hook.remove()


@torch.no_grad()
def test_a_guided_stream_cannot_tell_branches_apart(network: Network) -> None:
    stream = STREAMS["guided"](network, PREDICTOR)
    stream.advance(0, COMPUTED, noise(), torch.tensor([900.0]))
    with pytest.raises(RuntimeError, match="step 1: the branches"):
        mixed = {"cond": StepKind.COMPUTE, "uncond": StepKind.FORECAST}
        stream.advance(1, mixed, noise(), torch.tensor([800.0]))


def meta_network(layers: int) -> Network:
    """A network that an accelerator could have, with nothing in it."""
    with torch.device("meta"):
        adapter = WanAdapter(
            WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=layers, ffn_dim=32)
        )
        branches = tuple(Branch(name, torch.empty(1, 5, 24)) for name in ("cond", "uncond"))
        latents = torch.empty(1, 16, 8, 32, 32)
    return Network(adapter, adapter.geometry(latents), branches, guidance=LocalGuidance(4.0))


@torch.no_grad()
@pytest.mark.parametrize(("name", "beside"), [("feature", 45), ("velocity", 25), ("guided", 3)])
def test_forecasts_take_few_launches(name: str, beside: int) -> None:
    """One for each remembered value of each thing that is forecast and a few beside, for any size and number
    of layers; and no step waits for the device before it is settled."""
    latents, timestep = torch.empty(1, 16, 8, 32, 32, device="meta"), torch.empty(1, device="meta")
    counts = []
    for layers in (1, 3):
        stream = STREAMS[name](meta_network(layers), PREDICTOR)
        with Launches() as computing:
            for step in range(6):
                stream.advance(step, COMPUTED, latents, timestep)
        with Launches() as forecasting:
            stream.advance(6, FORECAST, latents, timestep)
        assert computing.waits == forecasting.waits == []
        things = 1 if name == "guided" else 2
        assert forecasting.names.count("add_") == 6 * things
        counts.append(len(forecasting.names) - 6 * things)
    assert counts[0] == counts[1] <= beside, forecasting.names
