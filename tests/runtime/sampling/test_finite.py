"""What is not a number ends a job at the first step that has it, on every rank alike, with its origin."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from launch import cli
from runtime.engine import Engine
from runtime.errors import NotFiniteError
from runtime.media.mp4 import FrameBuffer
from runtime.models.base import Embeddings
from runtime.models.loading import is_finite
from runtime.models.wan.adapter import WanAdapter
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees, Topology
from runtime.request.config import EMBEDDED_MODELS, Config, Dtypes, load_config
from runtime.sampling.coordinator import Coordinator
from runtime.sampling.denoise import Denoising, denoise
from runtime.sampling.finite import check_prompts, likely_cause
from runtime.sampling.network import Branch, Network
from runtime.sampling.streams import STREAMS
from spectrum import ChebyshevRidge, FixedSchedule
from tests.ranks import Outcome, watch_ranks

PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 6, "max_sequence_length": 32}
WEIGHT = "blocks.3.ffn.net.0.proj.weight"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """wan-tiny with weights that are finite, and far too large."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", folder)
    path = next((folder / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    weights[WEIGHT] = weights[WEIGHT].float()
    weights[WEIGHT][5] = 3e38
    save_file(weights, path, metadata={"format": "pt"})
    return load_config("wan-tiny").model_copy(update={"model": str(folder)})


def generate(ranks: Ranks, config: Config, spectrum: str, degrees: Degrees) -> None:
    engine = Engine(config, ranks, degrees)
    request = engine.config.request(PROMPT, **SMALL, spectrum=spectrum)
    engine.generate(request, [FrameBuffer()] if ranks.is_leader else [])


def said(outcomes: list[Outcome]) -> str:
    """What all ranks said, each that a step is not finite."""
    assert [outcome.code for outcome in outcomes] == [3] * len(outcomes), outcomes
    errors = {outcome.error for outcome in outcomes}
    assert len(errors) == 1, errors
    ((kind, _, _, message),) = errors
    assert kind == "NotFiniteError"
    return message


@pytest.mark.parametrize("spectrum", ["off", "paper"])
def test_what_overflows_fails_the_first_step(broken: Config, spectrum: str) -> None:
    with pytest.raises(NotFiniteError) as caught:
        generate(Ranks.alone(torch.device("cpu")), broken, spectrum, Degrees())
    message = str(caught.value)
    assert message.startswith("step 0: branches cond and uncond produced NaN or infinity")
    assert message.endswith("the weights are finite: check dtype.transformer, the sampler and its shift")
    assert "\n" not in message


@pytest.mark.parametrize("degrees", [Degrees(cfg=2), Degrees(cfg=1, ulysses=2)], ids=["cfg", "ulysses"])
@pytest.mark.parametrize("memory", ["replicate", "shard"])
def test_all_ranks_fail_alike(broken: Config, degrees: Degrees, memory: str) -> None:
    config = broken.model_copy(update={"memory": broken.memory.model_copy(update={"transformer": memory})})
    message = said(watch_ranks(2, generate, config, "paper", degrees, timeout=60))
    assert message.startswith("step 0: branches cond and uncond produced NaN or infinity")


def test_weights_that_are_no_numbers_are_the_cause(engine: Engine) -> None:
    """They are refused when they are loaded; here one goes bad later."""
    transformer = engine.loaded.experts[0].module
    weight = dict(transformer.named_parameters())[WEIGHT]
    kept = float(weight[5, 7])
    weight[5, 7] = float("nan")
    try:
        cause = likely_cause({"transformer": transformer}, engine.config, engine.ranks)
    finally:
        weight[5, 7] = kept
    assert cause == f"the transformer's weight {WEIGHT} is not finite: check the model's files"


class FarFetched(ChebyshevRidge):
    """Forecasts of step 3 are infinite."""

    def weights(self, history: Sequence[int], target: int) -> NDArray[np.float64]:
        weights = super().weights(history, target)
        return weights * np.inf if target == 3 else weights


@torch.no_grad()
def denoise_on_rank(ranks: Ranks, topology: Topology, stream: str, *, text: float) -> None:
    """Computes steps 0 and 1 of 5; the unconditional branch attends to `text`."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=16
    ).eval()
    group, adapter = ranks.group(topology), WanAdapter(model)
    noise_BCFHW = torch.randn(1, 16, 2, 4, 4)
    geometry = adapter.geometry(noise_BCFHW)
    embeddings = {"cond": torch.randn(1, 5, 16), "uncond": torch.full((1, 5, 16), text)}
    both = tuple(Branch(name, adapter.text(embedding)) for name, embedding in embeddings.items())
    network = Network(
        adapter, geometry, group.branches(both), group.guidance(4.0), group.sequence(geometry.grid.tokens)
    )
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler.set_timesteps(5)
    schedule = FixedSchedule(5, (0, 1))
    coordinator = Coordinator({"cond": schedule, "uncond": schedule}, "", ranks)
    forecasting = STREAMS[stream](network, FarFetched(horizon=5))
    for _ in denoise(Denoising(noise_BCFHW, sampler, forecasting, coordinator), ranks):
        pass


def denoise_nan(ranks: Ranks, topology: Topology) -> None:
    denoise_on_rank(ranks, topology, "feature", text=float("nan"))


def denoise_far(ranks: Ranks, topology: Topology, stream: str) -> None:
    denoise_on_rank(ranks, topology, stream, text=0.5)


def test_the_branch_is_named_by_ranks_that_do_not_have_it() -> None:
    message = said(watch_ranks(2, denoise_nan, Topology(cfg=2), timeout=60))
    assert message.startswith("step 0: branch uncond produced NaN or infinity")


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        ("feature", "branches cond and uncond"),
        ("velocity", "branches cond and uncond"),
        ("guided", "the forecast"),
    ],
)
def test_forecasts_are_looked_at_as_well(stream: str, named: str) -> None:
    with pytest.raises(NotFiniteError, match=f"^step 3: {named} produced NaN or infinity"):
        denoise_far(Ranks.alone(torch.device("cpu")), Topology(), stream)
    assert said(watch_ranks(2, denoise_far, Topology(cfg=2), stream, timeout=60)).startswith(
        f"step 3: {named}"
    )


def test_a_text_encoder_that_gives_no_numbers_is_named() -> None:
    config = load_config("wan-tiny").model_copy(update={"dtype": Dtypes(text_encoder="float16")})
    good, bad = torch.zeros(1, 3, 4), torch.full((1, 3, 4), float("inf"))
    check_prompts(Embeddings([good], None), config)
    with pytest.raises(NotFiniteError, match=r"the text encoder, in float16, produced .* use bfloat16"):
        check_prompts(Embeddings([good], bad), config)


def test_frames_that_are_no_numbers_are_not_written(engine: Engine) -> None:
    """A VAE that overflows; without a check they would be black where they are NaN."""
    bias = engine.loaded.decoder.vae.decoder.conv_out.bias  # type: ignore[attr-defined]
    kept, sink = float(bias[0]), FrameBuffer()
    bias[0] = float("nan")
    try:
        with pytest.raises(NotFiniteError, match=r"the VAE, in float32, produced NaN .*; check the model's"):
            engine.generate(engine.config.request(PROMPT, **SMALL), [sink])
    finally:
        bias[0] = kept


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([], id="one"),
        pytest.param(["--ranks", "2", "--launcher", "torchrun"], id="two", marks=pytest.mark.slow),
    ],
)
def test_the_command_fails_with_one_line(
    broken: Config, ranks: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "broken.yaml", tmp_path / "a.mp4"
    config.write_text(broken.model_dump_json(exclude_none=True))
    size = ["--size", "64x48", "--frames", "5", "--steps", "6", "--max-sequence-length", "32"]
    assert cli.run(["generate", PROMPT, "--config", str(config), *size, *ranks, "--out", str(out)]) == 3
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.count("NaN or infinity") == 1
    assert "lockstep: step 0: branches cond and uncond produced NaN or infinity" in told.err
    assert "Traceback" not in told.err
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_a_number_is_found(dtype: torch.dtype) -> None:
    assert (
        is_finite(torch.ones(99, dtype=dtype)) and is_finite(torch.ones(0)) and is_finite(torch.ones(1).int())
    )
    for bad in ("nan", "inf", "-inf"):
        tensor = torch.ones(99, dtype=dtype)
        tensor[50] = float(bad)
        assert not is_finite(tensor)
