"""Weights arrive whole and once on every rank, replicated or sharded, and the video is the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.distributed.tensor import DTensor

from runtime.configs import EMBEDDED_MODELS, Config, Memory, Tiles, load_config
from runtime.engine import Engine
from runtime.loading import load_transformer
from runtime.ranks import Ranks
from runtime.video import FrameBuffer, Frames
from runtime.weights import ModelFolder, find_model
from tests.ranks import run_ranks

PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 6, "max_sequence_length": 32, "spectrum": "paper"}


def with_memory(**memory: Any) -> Config:
    return load_config("wan-tiny").model_copy(update={"memory": Memory(**memory)})


def in_bfloat16() -> Config:
    config = load_config("wan-tiny")
    return config.model_copy(update={"dtype": config.dtype.model_copy(update={"transformer": "bfloat16"})})


def loaded(ranks: Ranks, config: Config, without_weights: ModelFolder) -> dict[str, torch.Tensor]:
    """The transformer's tensors; all ranks but the first are given a folder that has no weights."""
    folder = find_model(config) if ranks.leads else without_weights
    model = load_transformer(folder, config, ranks)
    tensors = dict(model.state_dict()) | dict(model.named_buffers())
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@pytest.mark.parametrize("config", [load_config("wan-tiny"), in_bfloat16(), with_memory(transformer="shard")])
def test_one_rank_reads_and_all_have_the_same_weights(config: Config, tmp_path: Path) -> None:
    path = EMBEDDED_MODELS / "wan-tiny" / "transformer"
    reference = WanTransformer3DModel.from_pretrained(path, dtype=config.dtype.of("transformer"))
    expected = dict(reference.state_dict()) | dict(reference.named_buffers())
    (tmp_path / "transformer").mkdir()
    shutil.copy(path / "config.json", tmp_path / "transformer")
    for tensors in run_ranks(2, loaded, config, ModelFolder("wan-tiny", tmp_path, "")):
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name


def share_held(ranks: Ranks, config: Config) -> float:
    """The part of the transformer's parameters that this rank holds."""
    model = load_transformer(find_model(config), config, ranks)
    whole = sum(parameter.numel() for parameter in model.parameters())
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(parameter.numel() for parameter in held) / whole


def test_shards_are_shares() -> None:
    """What is not in a block stays whole: a quarter of this tiny model, 2 % of Wan2.1 14B."""
    outside = 1 - share_of_blocks()
    for held in run_ranks(2, share_held, with_memory(transformer="shard")):
        assert held == pytest.approx(outside + (1 - outside) / 2, abs=0.01)
    assert run_ranks(2, share_held, load_config("wan-tiny")) == [1.0, 1.0]


def share_of_blocks() -> float:
    model = WanTransformer3DModel.from_pretrained(EMBEDDED_MODELS / "wan-tiny" / "transformer")
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    return blocks / sum(parameter.numel() for parameter in model.parameters())


def video(ranks: Ranks, config: Config) -> tuple[Frames | None, list[int], bool, bool]:
    engine = Engine(config, ranks)
    sink = FrameBuffer()
    generation = engine.generate(engine.config.request(PROMPT, **SMALL), [sink] if ranks.leads else [])
    has_encoder, has_vae = engine._text._pipeline is not None, engine._vae is not None
    return sink.frames if ranks.leads else None, generation.sent, has_encoder, has_vae


@pytest.fixture(scope="module")
def alone() -> Frames:
    frames = video(Ranks.alone(torch.device("cpu")), load_config("wan-tiny"))[0]
    assert frames is not None
    return frames


def test_sharded_weights_make_the_same_video_and_their_traffic_is_counted(alone: Frames) -> None:
    whole = run_ranks(2, video, load_config("wan-tiny"))
    sharded = run_ranks(2, video, with_memory(transformer="shard"))
    for first, *_ in (whole[0], sharded[0]):
        assert np.abs(first.astype(int) - alone).max() <= 1
    model = WanTransformer3DModel.from_pretrained(EMBEDDED_MODELS / "wan-tiny" / "transformer")
    weights = sum(4 * parameter.numel() for parameter in model.blocks.parameters())
    computed, forecast = 0, 5  # steps
    assert sharded[0][1][computed] - whole[0][1][computed] == pytest.approx(weights, rel=0.01)
    assert sharded[0][1][forecast] == whole[0][1][forecast]


def test_only_the_first_rank_has_a_text_encoder_and_a_vae(alone: Frames) -> None:
    first, second = run_ranks(2, video, load_config("wan-tiny"))
    assert (first[2:], second[2:]) == ((True, True), (False, False))
    tiled = load_config("wan-tiny").model_copy(update={"tiles": Tiles(size=32, stride=24)})
    first, second = run_ranks(2, video, tiled)
    assert (first[2:], second[2:]) == ((True, True), (False, True))


def test_the_vae_keeps_its_own_dtype() -> None:
    config = in_bfloat16()
    engine = Engine(config)
    assert isinstance(engine._vae, AutoencoderKLWan)
    assert (engine._vae.dtype, engine._adapter.dtype) == (torch.float32, torch.bfloat16)
