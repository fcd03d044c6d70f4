"""Both branches of guidance in one batch, against one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from runtime.engine import Engine
from runtime.models.wan.adapter import WanAdapter, open_adapter
from runtime.parallel.guidance import LocalGuidance
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees, Topology
from runtime.rehearsal.account import seconds
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.rehearse import Rehearsal, Scenario, rehearse
from runtime.request.config import Config, load_config
from runtime.request.performance import BatchGuidance
from runtime.request.video_request import VideoRequest
from runtime.sampling.batching import batches, repeat_batch
from runtime.sampling.network import Branch, Network
from runtime.sampling.result import Result
from runtime.sampling.segments import denoise_segments
from spectrum import StepKind
from tests.launches import Launches
from tests.ranks import WarmRanks
from tests.runtime.sampling.test_fused import off, perturbed, prepared
from tests.runtime.sampling.test_streams import meta_network

Make = Callable[..., VideoRequest]
STEPS = 10
PRESETS = {
    "feature": "stream: feature\nschedule: {kind: paper, warmup: 3, window: 2, alpha: 1.0}\n",
    "apart": (
        "stream: velocity\nschedule: {kind: explicit, computed: [0, 1, 2, 4, 6, 8]}\n"
        "uncond: {kind: explicit, computed: [0, 1, 2, 6]}\n"
    ),
    "guided": "stream: guided\nschedule: {kind: paper, warmup: 3, window: 2, alpha: 1.0}\n",
}


def batching(config: Config, wanted: BatchGuidance = "always") -> Config:
    return config.model_copy(update={"batch_guidance": wanted})


@pytest.fixture(scope="module")
def batched(config: Config) -> Engine:
    return Engine(batching(config))


def write(folder: Path, name: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(PRESETS[name])
    return str(path)


SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 32,
    "text_dim": 16,
    "freq_dim": 16,
}


def networks(kind: str, videos: int) -> tuple[Network, torch.Tensor, torch.Tensor]:
    """A small network, latents, and timesteps that differ from video to video."""
    torch.manual_seed(0)
    if kind == "vace":
        model = WanVACETransformer3DModel(**SMALL, vace_layers=[0], vace_in_channels=96).eval()
    else:
        model = WanTransformer3DModel(**SMALL).eval()
    adapter: WanAdapter = open_adapter(model, by_token=kind == "frames")
    latents = torch.randn(videos, 16, 2, 4, 4)
    branches = tuple(Branch(name, adapter.text(torch.randn(videos, 5, 16))) for name in ("cond", "uncond"))
    network = Network(adapter, adapter.geometry(latents), branches, guidance=LocalGuidance(4.0))
    return network, latents, torch.linspace(900.0, 500.0, videos)


@torch.no_grad()
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "frames", "vace"])
def test_features_are_those_of_branches_one_after_the_other(kind: str, videos: int) -> None:
    network, latents, timesteps = networks(kind, videos)
    adapter = network.adapter
    condition = torch.randn(videos, 96, 2, 4, 4) if kind == "vace" else None
    tokens = adapter.embed(latents, condition)
    known = torch.arange(tokens[0].shape[1]).view(1, -1, 1) < 4 if kind == "frames" else None
    time = adapter.time(timesteps, None, known)
    texts = [branch.text_BTD for branch in network.branches]
    apart = adapter.branches(tokens, texts, time, network.geometry.rotary)
    together = network._in_one_batch(tokens, texts, time, network.geometry.rotary)
    assert len(together) == len(apart) == 2 and off(apart[0], apart[1]) > 1e-3
    for one, other in zip(together, apart, strict=True):
        assert one.shape == other.shape and off(one, other) < 1e-6
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


def test_repeating_a_batch_leaves_everything_else() -> None:
    tensor = torch.arange(6).view(2, 3)
    named = repeat_batch((tensor, [tensor, None], 3.0), 2)
    assert torch.equal(named[0], torch.cat([tensor, tensor])) and torch.equal(named[1][0], named[0])
    assert named[1][1] is None and named[2] == 3.0


@pytest.mark.parametrize("name", PRESETS)
def test_results_decisions_and_forecasters_are_the_same(
    engine: Engine, batched: Engine, small: Make, tmp_path: Path, name: str
) -> None:
    """Also where the branches have schedules of their own, and are not always computed together."""
    request = small(steps=STEPS, spectrum=write(tmp_path, name), videos=2)
    found = []
    for one in (engine, batched):
        run = prepared(one, request)
        result = Result(run.plan)
        found.append((denoise_segments(one.ranks, run, result), result, run.plan.batched))
    (expected, usual, _), (latents, result, is_batched) = found
    assert is_batched and result.computed == usual.computed
    assert (result.forecaster_bytes, result.features_kept) == (usual.forecaster_bytes, usual.features_kept)
    assert result.errors.keys() == usual.errors.keys()
    assert all(result.errors[step] == pytest.approx(error, rel=1e-3) for step, error in usual.errors.items())
    run = prepared(engine, request)
    nudged = denoise_segments(engine.ranks, perturbed(run), Result(run.plan))
    assert off(latents, expected) < 4 * off(nudged, expected)


@torch.no_grad()
def test_a_batch_takes_about_half_of_the_launches() -> None:
    latents, timestep = torch.empty(1, 16, 8, 32, 32, device="meta"), torch.empty(1, device="meta")
    counts = []
    for layers in (2, 6):
        network = meta_network(layers)
        for one in (network, replace(network, batched=True)):
            with Launches() as launches:
                one.compute(latents, one.time(timestep))
            assert launches.waits == []
            counts.append(len(launches.names))
    few, few_batched, many, many_batched = counts
    assert 0.5 <= (many_batched - few_batched) / (many - few) < 0.55  # of four blocks


def at(config: str, sequence: int, cfg: int = 1, wanted: BatchGuidance = "auto", **given: Any) -> bool:
    from runtime.profile import ModelProfile
    from runtime.rehearsal.settings import RehearsedProfile

    settings = load_config(config)
    profile: ModelProfile = RehearsedProfile(settings)
    request = settings.request("x", **given)
    topology = Topology(cfg=cfg, ring=1, ulysses=sequence)
    return batches(wanted, request, profile.sizes.architecture, profile.sizes.tokens(request), topology)


def test_small_shares_are_batched_and_large_ones_are_not() -> None:
    assert at("wan-tiny", 1)
    assert not at("wan2.1-t2v-14b-480p", 1) and not at("wan2.1-t2v-14b-720p", 8)
    assert not at("wan2.1-t2v-1.3b-480p", 1)
    assert at("wan2.1-t2v-1.3b-480p", 12) and not at("wan2.1-t2v-1.3b-480p", 4)
    assert at("wan2.1-t2v-1.3b-480p", 1, frames=5, width=320, height=192)
    assert not at("wan-tiny", 1, guidance=1.0) and not at("wan-tiny", 1, cfg=2)
    assert not at("wan-tiny", 1, wanted="never") and at("wan2.1-t2v-14b-720p", 1, wanted="always")


def rehearsed(name: str, wanted: BatchGuidance, ranks: int, **given: Any) -> Rehearsal:
    config = batching(load_config(name), wanted)
    request = config.request("x", spectrum="off", **given)
    return rehearse(Scenario(config, request, Degrees(cfg=1), ranks, load_gpu("h100")), [0])


@pytest.mark.parametrize(
    ("ranks", "given", "better"),
    [(1, {"width": 320, "height": 192, "frames": 17}, True), (1, {}, False), (12, {}, True)],
)
def test_the_choice_is_what_a_rehearsal_would_choose(ranks: int, given: dict[str, int], better: bool) -> None:
    """Half of the launches and the same operations; less time where launches take longer than those."""
    name = "wan2.1-t2v-1.3b-480p"
    apart, together, chosen = (
        rehearsed(name, wanted, ranks, **given) for wanted in ("never", "always", "auto")
    )
    usual, batched, auto = (one.ranks[0].steps.last for one in (apart, together, chosen))
    assert batched.work.flops == usual.work.flops and batched.sent == usual.sent
    assert 0.49 < batched.work.launches / usual.work.launches < 0.52
    assert auto.work.launches == (batched if better else usual).work.launches
    gain = seconds(apart)["computed_step"] / seconds(together)["computed_step"]
    assert gain > 1.02 if better else gain < 1.02
    assert together.ranks[0].steps.memory.peak > apart.ranks[0].steps.memory.peak


def on_ranks(ranks: Ranks, degrees: Degrees, request: VideoRequest) -> tuple[torch.Tensor, Result]:
    engine = Engine(batching(load_config("wan-tiny")), ranks, degrees)
    run = prepared(engine, request)
    assert run.plan.batched == (run.plan.topology.cfg == 1)
    result = Result(run.plan)
    return denoise_segments(ranks, run, result), result


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "degrees", [Degrees(cfg=2), Degrees(cfg=1, ulysses=2), Degrees(cfg=1, ring=2)], ids=str
)
def test_ranks_do_the_same(
    engine: Engine, small: Make, tmp_path: Path, warm: WarmRanks, degrees: Degrees
) -> None:
    request = small(steps=STEPS, spectrum=write(tmp_path, "feature"))
    run = prepared(engine, request)
    usual = Result(run.plan)
    alone = denoise_segments(engine.ranks, run, usual)
    for latents, result in warm.run(2, on_ranks, degrees, request):
        assert off(latents, alone) < 1e-4
        assert result.computed == usual.computed and len(set(result.digests)) == 1
        assert {step.kind for step in result.steps} == {*StepKind}
