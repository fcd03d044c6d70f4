"""Quantised layers stay within the bounds of their number formats, and run wherever whole ones do."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from runtime.engine import Engine
from runtime.errors import BadRequestError, NotFiniteError
from runtime.media.mp4 import FrameBuffer
from runtime.models.quantization import (
    Fp8Linear,
    Int8Linear,
    QuantizedLinear,
    check_quantization,
    exact_product,
    quantize_linears,
    quantize_rows,
    scaled_product,
)
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.request.config import Config, load_config
from runtime.request.memory import Memory
from runtime.sampling.finite import likely_cause
from tests.newer import SCALED_ROWS_ON_CPU
from tests.ranks import run_ranks

FP8 = torch.float8_e4m3fn
PROMPT = "a red circle moving left on a black background"
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": 2, "max_sequence_length": 32, "spectrum": "off"}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, as activations have; every 50th value is an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x *= torch.logspace(-3, 3, shape[-2]).unsqueeze(-1)
    x.flatten()[::50] *= 30
    return x


def error_of_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Most that a value may change by: half the distance between two numbers of the format."""
    scale = x.abs().amax(-1, keepdim=True) / (448 if dtype is FP8 else 127)
    rounding = 2.0**-20 * x.abs()
    if dtype is torch.int8:
        return scale / 2 + rounding
    return torch.maximum(x.abs() / 16, scale * 2.0**-10) + rounding


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_values_change_by_at_most_half_a_step_of_the_format(dtype: torch.dtype) -> None:
    x = drawn(40, 96)
    values, scale = quantize_rows(x, dtype)
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= error_of_rows(x.double(), dtype)).all()
    assert error.max() > 0
    largest = values.float().abs().amax(-1)
    assert (largest == (448 if dtype is FP8 else 127)).all()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_the_error_of_a_layer_is_bounded(kind: type[QuantizedLinear], kept: torch.dtype) -> None:
    """Against float64, output by output: the errors of weights and, in fp8, of activations, and rounding."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, dtype=kept)
    x = drawn(2, 40, 96).to(kept)
    with torch.no_grad():
        output = kind(linear)(x)
    rows, weight, bias = x.double(), linear.weight.detach().double(), linear.bias.detach().double()
    expected = rows @ weight.T + bias
    of_weight = error_of_rows(weight, kind.stored)
    of_rows = error_of_rows(rows, FP8) if kind is Fp8Linear else torch.zeros_like(rows)
    bound = rows.abs() @ of_weight.T + of_rows @ (weight.abs() + of_weight).T
    unit = torch.finfo(kept).eps
    bound += 2 * unit * (rows.abs() @ (weight.abs() + of_weight).T + bias.abs())
    error = (output.double() - expected).abs()
    assert output.dtype == kept and output.shape == (2, 40, 64)
    assert (error <= bound).all()
    assert 1e-4 < error.norm() / expected.norm() < 0.06


@SCALED_ROWS_ON_CPU
def test_tensor_cores_are_given_what_the_cpu_computes() -> None:
    """torch multiplies scaled fp8 on the CPU, too: the same arguments, a result rounded to bfloat16."""
    linear = nn.Linear(96, 64)
    layer, rows = Fp8Linear(linear), quantize_rows(drawn(40, 96), FP8)
    weight = layer.weight.detach(), layer.weight_scale.detach()
    for bias in (linear.bias.detach(), None):
        found, expected = (product(rows, weight, bias) for product in (scaled_product, exact_product))
        assert found.dtype == torch.bfloat16 and expected.dtype == torch.float32
        assert torch.allclose(found.float(), expected, rtol=2.0**-6, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(bad: float) -> None:
    x = drawn(4, 96)
    x[2, 5] = bad
    for kind in (Fp8Linear, Int8Linear):
        with torch.no_grad():
            output = kind(nn.Linear(96, 64))(x)
        assert torch.isfinite(output).all(-1).tolist() == [True, True, False, True]
        assert not torch.isfinite(output[2]).any()


def test_rows_of_zeros_are_zeros() -> None:
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight.zero_()
        for kind in (Fp8Linear, Int8Linear):
            assert torch.equal(kind(linear)(torch.zeros(3, 32)), linear.bias.expand(3, 16))


def test_layers_of_odd_sizes_are_left_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(32, 24), nn.Sequential(nn.Linear(16, 48), nn.LayerNorm(48)))
    quantize_linears(module, "none")
    assert not any(isinstance(one, QuantizedLinear) for one in module.modules())
    quantize_linears(module, "int8")
    assert isinstance(module[0], nn.Linear) and isinstance(module[1][0], Int8Linear)
    with pytest.raises(
        BadRequestError, match="'fp8' given; the model has no linear layers of multiples of 16"
    ):
        quantize_linears(module[0], "fp8")


def test_what_a_device_cannot_multiply_is_refused() -> None:
    check_quantization("fp8", torch.device("cpu"))
    check_quantization("none", torch.device("cuda", 99))
    with pytest.raises(
        BadRequestError, match=r"^quantization: 'fp8' given; it does not run on cuda:99 .*8\.9"
    ):
        check_quantization("fp8", torch.device("cuda", 99))


def tiny(**changes: Any) -> Config:
    return load_config("wan-tiny").model_copy(update=changes)


def video(ranks: Ranks, config: Config, degrees: Degrees) -> tuple[list[str], Any, int]:
    """Digest and, on the first rank, frames of a small video, and bytes of the transformer's weights."""
    engine, sink = Engine(config, ranks, degrees), FrameBuffer()
    result = engine.generate(engine.config.request(PROMPT, **SMALL), [sink] if ranks.is_leader else [])
    return result.frames_sha256, sink.frames if ranks.is_leader else None, engine.loaded.weight_bytes


ALONE = partial(Ranks.alone, torch.device("cpu"))


def test_only_linear_layers_of_blocks_are_quantised() -> None:
    module = Engine(tiny(quantization="fp8")).loaded.experts[0].module
    quantised = {name for name, one in module.named_modules() if isinstance(one, QuantizedLinear)}
    whole = {name for name, one in module.named_modules() if type(one) is nn.Linear}
    assert len(quantised) == 8 * 10 and all(name.startswith("blocks.") for name in quantised)
    assert whole and not any(name.startswith("blocks.") for name in whole)
    kept = {one.dtype for name, one in module.named_parameters() if not name.endswith(("weight", "_scale"))}
    assert kept == {torch.float32}


@pytest.mark.parametrize(("quantization", "most"), [("int8", 30.0), ("fp8", 1500.0)])
def test_a_quantised_video_resembles_the_exact_one(quantization: str, most: float) -> None:
    """Mean squared error of one step's frames; wan-tiny has 192 channels, so errors average out badly."""
    once = SMALL | {"steps": 1}
    frames, sizes = [], []
    for config in (tiny(), tiny(quantization=quantization)):
        engine, sink = Engine(config), FrameBuffer()
        engine.generate(config.request(PROMPT, **once), [sink])
        frames.append(sink.frames.astype(float))
        sizes.append(engine.loaded.weight_bytes)
    assert 0 < np.mean((frames[0] - frames[1]) ** 2) < most
    assert sizes[1] < sizes[0] / 3  # from 32 bits, but for what is in no block


def sharded(ranks: Ranks) -> tuple[list[str], bool]:
    config = tiny(quantization="fp8", memory=Memory(transformer="shard"))
    engine, sink = Engine(config, ranks, Degrees(cfg=2)), FrameBuffer()
    weight = engine.loaded.experts[0].module.blocks[0].ffn.net[2].weight  # type: ignore[index,union-attr]
    result = engine.generate(config.request(PROMPT, **SMALL), [sink] if ranks.is_leader else [])
    return result.frames_sha256, isinstance(weight, DTensor) and weight.dtype == FP8


def split(ranks: Ranks) -> Any:
    return video(ranks, tiny(quantization="fp8"), Degrees(ulysses=2))[1]


def test_ranks_make_the_video_of_one(tmp_path: Any) -> None:
    """Scales are of rows, that is tokens, so it makes no difference which rank has them."""
    digests, frames, _ = video(ALONE(), tiny(quantization="fp8"), Degrees())
    assert run_ranks(2, sharded) == [(digests, True), ([], True)]
    theirs = run_ranks(2, split)[0]
    assert np.mean((theirs.astype(float) - frames) ** 2) < 1.0


def test_weights_may_be_kept_in_one_dtype_and_computed_in_another() -> None:
    dtype = load_config("wan-tiny").dtype.model_copy(update={"compute": "bfloat16"})
    engine, sink = Engine(tiny(quantization="int8", dtype=dtype)), FrameBuffer()
    engine.generate(engine.config.request(PROMPT, **SMALL), [sink])
    layer = engine.loaded.experts[0].module.blocks[0].attn1.to_q  # type: ignore[index,union-attr]
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert sink.frames.std() > 1


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_overflow_is_noticed_and_explained(quantization: str) -> None:
    engine = Engine(tiny(quantization=quantization))
    module = engine.loaded.experts[0].module
    scale = module.blocks[3].ffn.net[2].weight_scale  # type: ignore[index,union-attr]
    scale.mul_(1e38)
    with pytest.raises(NotFiniteError, match=r"step 0: .* the weights are finite: check quantization, dtype"):
        engine.generate(engine.config.request(PROMPT, **SMALL), [FrameBuffer()])
    scale[3] = float("nan")
    cause = likely_cause({"transformer": module}, engine.config, engine.ranks)
    assert cause.startswith("the transformer's weight blocks.3.ffn.net.2.weight_scale is not finite")
