"""LoRA weights, against the sum worked out by hand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.folder import find_model
from runtime.models.wan.loading import load_transformer
from runtime.models.wan.lora import read_lora
from runtime.models.wan.lora_switch import open_loras
from runtime.parallel.ranks import Ranks
from runtime.request.config import EMBEDDED_MODELS, Config, Lora, load_config
from runtime.request.video_request import VideoRequest
from tests.ranks import run_ranks

Make = Callable[..., VideoRequest]
TARGET = "blocks.0.attn1.to_q"
RANK, WIDTH = 4, 192


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA for one projection of wan-tiny."""
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "style.safetensors"
    down, up = (torch.randn(shape, generator=generator) * 0.3 for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    save_file({f"transformer.{TARGET}.lora_A.weight": down, f"transformer.{TARGET}.lora_B.weight": up}, path)
    return path


def with_lora(config: Config, file: Path, scale: float = 1.0) -> Config:
    return config.model_copy(update={"lora": (Lora(file=str(file), scale=scale),)})


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    folder, alone = find_model(config), Ranks.alone(torch.device("cpu"))
    return load_transformer(folder, config, alone, loras=open_loras(folder, alone)).model.state_dict()


def test_scale_times_the_product_is_added_to_its_weight_and_to_no_other(config: Config, file: Path) -> None:
    from safetensors.torch import load_file

    plain, merged = weights_of(config), weights_of(with_lora(config, file, 0.5))
    assert plain.keys() == merged.keys()
    down, up = load_file(file).values()
    changed = f"{TARGET}.weight"
    torch.testing.assert_close(merged[changed], plain[changed] + 0.5 * up @ down)
    assert [name for name in plain if not torch.equal(plain[name], merged[name])] == [changed]


def on_ranks(ranks: Ranks, file: str) -> Frames | None:
    config = with_lora(load_config("wan-tiny"), Path(file))
    engine = Engine(config, ranks)
    sink = FrameBuffer()
    request = config.request("a red circle", width=64, height=48, frames=5, steps=3, spectrum="off")
    engine.generate(request, [sink] if ranks.is_leader else [])
    return sink.frames if ranks.is_leader else None


@pytest.mark.timeout(120)
def test_every_rank_has_it(file: Path) -> None:
    alone = on_ranks(Ranks.alone(torch.device("cpu")), str(file))
    together = run_ranks(2, on_ranks, str(file))[0]
    assert alone is not None
    assert np.abs(alone.astype(int) - together).max() <= 1


def test_it_is_part_of_the_revision(config: Config, file: Path) -> None:
    revisions = {find_model(one).revision for one in (config, with_lora(config, file))}
    revisions.add(find_model(with_lora(config, file, 0.5)).revision)
    assert len(revisions) == 3


def test_a_calibration_of_the_model_without_it_is_refused(config: Config, file: Path, small: Make) -> None:
    engine = Engine(with_lora(config, file))
    with pytest.raises(BadRequestError, match="revision"):
        engine.plan(config.request("a red circle", spectrum="planned-14"))


WIDE, BLOCKS = 768, 8
ORIGINAL = {  # Wan's own names of a block's projections: inputs, outputs
    **{f"{kind}_attn.{part}": (WIDTH, WIDTH) for kind in ("self", "cross") for part in "qkvo"},
    "ffn.0": (WIDTH, WIDE),
    "ffn.2": (WIDE, WIDTH),
}
OTHERS = {  # those outside the blocks
    "text_embedding.0": (64, WIDTH), "text_embedding.2": (WIDTH, WIDTH), "time_embedding.0": (128, WIDTH),
    "time_embedding.2": (WIDTH, WIDTH), "time_projection.1": (WIDTH, 6 * WIDTH), "head.head": (WIDTH, 64),
}  # fmt: skip
Weights = dict[str, torch.Tensor]


def original(prefix: str = "diffusion_model.", up_down: tuple[str, str] = ("lora_A", "lora_B")) -> Weights:
    """A LoRA for every projection, under the names that others than diffusers write."""
    generator = torch.Generator().manual_seed(1)
    found, separator = {}, "_" if prefix == "lora_unet_" else "."
    for block in range(BLOCKS):
        for name, (inputs, outputs) in ORIGINAL.items():
            module = f"blocks.{block}.{name}".replace(".", separator)
            for part, shape in zip(up_down, ((RANK, inputs), (outputs, RANK)), strict=True):
                found[f"{prefix}{module}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.05
    return found


def kohya() -> Weights:
    weights = original("lora_unet_", ("lora_down", "lora_up"))
    return weights | {name.split(".")[0] + ".alpha": torch.tensor(2.0) for name in weights}


def lightx2v() -> Weights:
    """Differences of biases, and of norms that are zero; and what lies outside the blocks."""
    weights = original(up_down=("lora_down", "lora_up"))
    for block in range(BLOCKS):
        for name, (_, outputs) in ORIGINAL.items():
            weights[f"diffusion_model.blocks.{block}.{name}.diff_b"] = torch.full((outputs,), 0.01)
        weights[f"diffusion_model.blocks.{block}.norm3.diff"] = torch.zeros(WIDTH)
    for name, (inputs, outputs) in OTHERS.items():
        weights[f"diffusion_model.{name}.lora_down.weight"] = torch.full((RANK, inputs), 0.01)
        weights[f"diffusion_model.{name}.lora_up.weight"] = torch.full((outputs, RANK), 0.01)
        weights[f"diffusion_model.{name}.diff_b"] = torch.full((outputs,), 0.01)
    return weights


def peft(prefix: str = "transformer.", adapter: str = "") -> Weights:
    generator = torch.Generator().manual_seed(2)
    shapes = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    return {
        f"{prefix}blocks.{block}.attn1.{name}.{part}{adapter}.weight": torch.randn(shape, generator=generator)
        for block in range(BLOCKS)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
        for part, shape in shapes.items()
    }


TOLD = {"r": RANK, "lora_alpha": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def metadata_of(**told: object) -> dict[str, str]:
    """Metadata of a file, as diffusers' trainers write it."""
    named = {f"transformer.{name}": value for name, value in (TOLD | told).items()}
    return {"lora_adapter_metadata": json.dumps(named)}


@pytest.mark.parametrize(
    ("weights", "metadata"),
    [
        (original, None),
        (partial(original, up_down=("lora_down", "lora_up")), None),
        (kohya, None),
        (lightx2v, None),
        (peft, None),
        (peft, metadata_of()),
        (lambda: {name: value.half() for name, value in peft().items()}, None),
    ],
)
def test_merged_weights_are_those_of_diffusers(
    config: Config, tmp_path: Path, weights: Callable[[], Weights], metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "it.safetensors"
    save_file(weights(), path, metadata=metadata)
    pipeline = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", torch_dtype=torch.float32)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    theirs, ours = pipeline.transformer.state_dict(), weights_of(with_lora(config, path, 0.7))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], before[name]) for name in ours)


def test_names_of_pefts_own_files_are_read(config: Config, tmp_path: Path) -> None:
    """diffusers applies none of them, and says so in a warning alone."""
    plain, named = tmp_path / "plain.safetensors", tmp_path / "named.safetensors"
    save_file(peft(), plain)
    save_file(peft(adapter=".default"), named)
    ours, theirs = weights_of(with_lora(config, named)), weights_of(with_lora(config, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_differences_of_whole_weights_are_added(config: Config, tmp_path: Path, dtype: str) -> None:
    """diffusers drops them with a line in its log."""
    added = {
        "blocks.0.norm3.diff": ("blocks.0.norm2.weight", (WIDTH,)),
        "blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", (WIDTH,)),
        "blocks.2.cross_attn.norm_k.diff": ("blocks.2.attn2.norm_k.weight", (WIDTH,)),
        "blocks.3.diff_m": ("blocks.3.scale_shift_table", (1, 6, WIDTH)),
        "head.diff_m": ("scale_shift_table", (1, 2, WIDTH)),
        "patch_embedding.diff": ("patch_embedding.weight", (WIDTH, 16, 1, 2, 2)),
        "time_projection.1.diff_b": ("condition_embedder.time_proj.bias", (6 * WIDTH,)),
    }
    generator = torch.Generator().manual_seed(3)
    extra = {
        f"diffusion_model.{name}": torch.randn(shape, generator=generator)
        for name, (_, shape) in added.items()
    }
    plain, whole = tmp_path / "plain.safetensors", tmp_path / "whole.safetensors"
    save_file(original(), plain)
    save_file(original() | extra, whole)
    config = config.model_copy(update={"dtype": config.dtype.model_copy(update={"transformer": dtype})})
    before, after = weights_of(with_lora(config, plain, 0.7)), weights_of(with_lora(config, whole, 0.7))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {target for target, _ in added.values()}
    for name, (target, _) in added.items():
        wanted = before[target].float() + 0.7 * extra[f"diffusion_model.{name}"]
        assert after[target].dtype == before[target].dtype
        assert torch.equal(after[target], wanted.to(after[target].dtype))


@pytest.mark.parametrize(
    ("bare", "prefixed"),
    [
        (peft(""), peft()),
        (peft("base_model.model."), peft()),
        (peft("base_model.model.", ".default"), peft()),
        (original(""), original()),
        (original("model.diffusion_model."), original()),
        ({name.replace(".weight", ".default.weight"): one for name, one in original("").items()}, original()),
    ],
    ids=["diffusers", "peft", "adapter", "own", "comfyui", "diffsynth"],
)
def test_a_prefix_may_be_missing(config: Config, tmp_path: Path, bare: Weights, prefixed: Weights) -> None:
    for name, weights in (("bare", bare), ("prefixed", prefixed)):
        save_file(weights, tmp_path / name)
    ours, theirs = (weights_of(with_lora(config, tmp_path / name)) for name in ("bare", "prefixed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_several_are_applied_in_order_and_all_are_in_the_revision(
    config: Config, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file(peft(), other)
    both = config.model_copy(update={"lora": (Lora(file=str(file)), Lora(file=str(other), scale=0.5))})
    plain, merged = weights_of(config), weights_of(both)
    first, second = weights_of(with_lora(config, file)), weights_of(with_lora(config, other, 0.5))
    for name in plain:
        torch.testing.assert_close(merged[name], first[name] + second[name] - plain[name])
    revision = find_model(both).revision
    assert revision.count("+lora:") == 2 and revision.endswith("×0.5")
    one, many = ({**config.model_dump(), "lora": given} for given in ({"file": "a"}, [{"file": "a"}]))
    assert Config.model_validate(one) == Config.model_validate(many)
    assert Config.model_validate({**one, "lora": None}).lora == ()


def test_a_file_that_changes_while_the_model_loads_is_refused(config: Config, file: Path) -> None:
    own = with_lora(config, file)
    folder = find_model(own)
    save_file(peft(), file)
    with pytest.raises(BadRequestError, match="changed since it was checked"):
        open_loras(folder, Ranks.alone(torch.device("cpu")))


def without(weights: Weights, name: str) -> Weights:
    return {key: value for key, value in weights.items() if key != name}


A, B = (f"transformer.{TARGET}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"vae.weight": torch.ones(2, 2)}, "holds no LoRA weights, but vae.weight"),
        ({A.replace(".0.", ".99."): torch.ones(4, WIDTH)}, "which has no blocks.99.attn1.to_q (1 of its 1"),
        ({A: torch.ones(4, 7), B: torch.ones(WIDTH, 4)}, "to_q has shape [192, 192], its lora_A [4, 7]"),
        ({A: torch.ones(4, WIDTH), B: torch.ones(WIDTH, 8)}, "its lora_B [192, 8]"),
        (without(peft(), B), "blocks.0.attn1.to_q.lora_B.weight is missing"),
        (
            without(original(), "diffusion_model.blocks.3.ffn.0.lora_B.weight"),
            "lora_B.weight is missing",
        ),
        (peft() | {A: torch.full((4, WIDTH), float("nan"))}, "lora_A.weight has values that are not finite"),
        (peft() | {B: torch.full((WIDTH, 4), float("inf"))}, "lora_B.weight has values that are not finite"),
        (
            peft() | {A: torch.ones(4, WIDTH, dtype=torch.int8)},
            "lora_A.weight is stored as int8, which is not",
        ),
        (peft("dit."), "all names must begin with `transformer.`"),
        (peft() | original(), "all names must begin with `transformer.`"),
        (peft("transformer_2."), "all names must begin with `transformer.`"),
        (peft(adapter=".a") | peft(adapter=".b"), "it holds 2 adapters (a, b)"),
        (peft() | {"transformer.x.lora_magnitude_vector": torch.ones(4)}, "it is a DoRA"),
        (original() | {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(4)}, "it is a DoRA"),
        (
            original() | {f"diffusion_model.blocks.{n}.norm9.diff": torch.ones(WIDTH) for n in range(8)},
            "8 of its weights would not be used: diffusion_model.blocks.0.norm9.diff",
        ),
        (
            original() | {"diffusion_model.patch_embedding.diff": torch.ones(WIDTH, 36, 1, 2, 2)},
            "patch_embedding.diff of shape [192, 36, 1, 2, 2] is for a weight of which the model has one of",
        ),
        (
            original() | {"diffusion_model.blocks.0.norm1.diff": torch.ones(WIDTH)},
            "would not be used: diffusion_model.blocks.0.norm1.diff",
        ),
        (
            original() | {"diffusion_model.blocks.9.diff_m": torch.ones(1, 6, WIDTH)},
            "blocks.9.diff_m of shape [1, 6, 192] is for a weight of which the model has none",
        ),
        (peft("") | {"x.lora_A.weight": torch.ones(4, 4)}, "all names must begin with `transformer.`"),
        (original() | {"diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(4, 4)}, "cannot read it"),
        (original() | {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(4, 4)}, "k_img"),
        (peft() | {f"transformer.{TARGET}.alpha": torch.tensor(2.0)}, "to_q.alpha is not a LoRA weight"),
    ],
)
def test_what_would_not_count_whole_is_refused(
    config: Config, tmp_path: Path, content: Weights, said: str
) -> None:
    path = tmp_path / "it.safetensors"
    save_file(content, path)
    with pytest.raises(BadRequestError, match="lora: ") as caught:
        find_model(with_lora(config, path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "it cannot be read: No such file"),
        (lambda path: path.write_bytes(b""), "it is not a safetensors file"),
        (lambda path: torch.save(peft(), path), "it is not a safetensors file"),
        (os.mkfifo, "it is not a regular file"),
        (
            lambda path: [path.mkdir(), save_file(peft(), path / "a.safetensors")],
            "it is a folder; name the file in it: a.safetensors",
        ),
        (
            lambda path: save_file(peft(), path, metadata={"lora_adapter_metadata": "["}),
            "its metadata cannot be read",
        ),
    ],
)
def test_what_is_no_file_of_weights_is_refused(
    config: Config, tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(BadRequestError, match=re.escape(f"lora: {str(path)!r} given; ")) as caught:
        find_model(with_lora(config, path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("told", [{"r": 8}, {"lora_alpha": "x"}, {"nonsense": 1}])
def test_metadata_that_does_not_fit_its_weights_is_refused(
    config: Config, tmp_path: Path, told: dict[str, object]
) -> None:
    path = tmp_path / "it.safetensors"
    save_file(peft(), path, metadata=metadata_of(**told))
    with pytest.raises(BadRequestError, match="lora: "):
        weights_of(with_lora(config, path))


def test_scales_that_differ_at_all_are_different_models(config: Config, file: Path) -> None:
    found = {find_model(with_lora(config, file, scale)).revision for scale in (0.1234567, 0.1234568)}
    assert len(found) == 2


def in_header(**told: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": one for name, one in told.items()})}


def test_metadata_needs_only_what_counts(config: Config, tmp_path: Path) -> None:
    """Target modules are those that there are weights for; settings of other parts say nothing."""
    whole, bare, other, none = (tmp_path / name for name in ("whole", "bare", "other", "none"))
    save_file(peft(), whole, metadata=metadata_of())
    save_file(peft(), bare, metadata=in_header(r=RANK, lora_alpha=16, lora_dropout=0.1, use_dora=False))
    save_file(peft(), none)
    save_file(peft(), other, metadata={"lora_adapter_metadata": json.dumps({"text_encoder.r": 4})})
    for one, same in ((bare, whole), (other, none)):
        ours, theirs = weights_of(with_lora(config, one)), weights_of(with_lora(config, same))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (in_header(target_modules=["to_q"]), "lora_adapter_metadata: r: missing; lora_alpha: missing"),
        ({"lora_adapter_metadata": json.dumps(TOLD)}, "has 'r'; its names must begin with transformer."),
        (metadata_of(r="4"), "r: '4' given; should be a valid integer"),
        (metadata_of(r=0), "r: 0 given; should be greater than or equal to 1"),
        (metadata_of(lora_alpha=float("nan")), "lora_alpha: nan given; should be a finite number"),
        (metadata_of(lora_alpha=10**400), "lora_alpha: a number with very many digits given"),
        (metadata_of(rank_pattern=[1]), "rank_pattern: a list given; should be a mapping"),
        (metadata_of(alpha_pattern={"(": 4}), "'(' is not a regular expression"),
        (metadata_of(use_dora=True), "has use_dora: True, which is not supported"),
        (metadata_of(init_lora_weights="pissa"), "has init_lora_weights: 'pissa', which is not supported"),
        (metadata_of(alora_invocation_tokens=[1]), "has alora_invocation_tokens: a list, which is not"),
        (metadata_of(nonsense=1), "has nonsense: 1, which is not supported"),
        (metadata_of(peft_type="LOHA"), "has peft_type: 'LOHA', which is not supported"),
    ],
)
def test_odd_metadata_is_refused_before_a_model_is_loaded(
    tmp_path: Path, metadata: dict[str, str], said: str
) -> None:
    path = tmp_path / "it.safetensors"
    save_file(peft(), path, metadata=metadata)
    with pytest.raises(
        BadRequestError, match=re.escape(f"lora: {str(path)!r} given; its metadata")
    ) as caught:
        read_lora(Lora(file=str(path)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_checked_once_while_it_stays_as_it_is(file: Path) -> None:
    first, again = (read_lora(Lora(file=str(file), scale=scale)) for scale in (1.0, 0.5))
    assert first.modules is again.modules
    save_file(peft(), file)
    assert len(read_lora(Lora(file=str(file))).modules) > len(first.modules)
