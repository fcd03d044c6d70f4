"""Small random models in the layouts that people have: those of Wan's own repositories, and single files.

Each is made of a model in diffusers layout by the inverse of the published renaming, so a conversion must
give that very model back.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from runtime.files.text import read_json
from runtime.models.folder import ModelFolder
from runtime.models.loading import read_component
from runtime.models.wan.layouts.vae import MEAN_48, STD_48
from runtime.request.config import Config, ModelFiles
from tests.conditioned import write_pipeline

State = dict[str, torch.Tensor]
_PIPELINES = {
    "t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline", "vace": "WanVACEPipeline", "ti2v": "WanPipeline",
}  # fmt: skip
KINDS = tuple(_PIPELINES)
_IMAGE_WIDTH = 80  # of CLIP, a head
_SHAPE = {
    "num_attention_heads": 2, "attention_head_dim": 128, "text_dim": 64, "freq_dim": 32,
    "ffn_dim": 96,
}  # fmt: skip


def write_reference(folder: Path, kind: str) -> Path:
    """Write a random model in diffusers layout, in float32, with Wan2.1's means of latents."""
    torch.manual_seed(0)
    own: dict[str, Any] = {"transformer": random_transformer(kind)}
    own["vae"] = random_residual_vae() if kind == "ti2v" else random_vae()
    if kind == "ti2v":
        own["expand_timesteps"] = True
    if kind == "i2v":
        own["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=_IMAGE_WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=1,
                image_size=32, patch_size=8, hidden_act="gelu", projection_dim=1024,
            )
        )  # fmt: skip
        crop = {"height": 32, "width": 32}
        own["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop)
    write_pipeline(_PIPELINES[kind], folder, **own)
    settings = read_json(folder / "scheduler" / "scheduler_config.json") | {
        "flow_shift": 5.0 if kind == "ti2v" else 3.0
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return folder


def random_transformer(kind: str) -> Any:
    if kind == "vace":
        model: Any = WanVACETransformer3DModel(
            **_SHAPE, num_layers=4, vace_layers=[0, 2], vace_in_channels=96
        )
    elif kind == "i2v":
        model = WanTransformer3DModel(
            **_SHAPE,
            in_channels=36,
            out_channels=16,
            num_layers=2,
            image_dim=_IMAGE_WIDTH,
            added_kv_proj_dim=256,
        )
    elif kind == "i2v-a14b":
        model = WanTransformer3DModel(**_SHAPE, in_channels=36, out_channels=16, num_layers=2)
    else:
        channels = 48 if kind == "ti2v" else 16
        model = WanTransformer3DModel(**_SHAPE, in_channels=channels, out_channels=channels, num_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, so that none can be mixed up
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def random_vae(**changes: Any) -> AutoencoderKLWan:
    model = AutoencoderKLWan(**{"base_dim": 8, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def random_residual_vae() -> AutoencoderKLWan:
    """Make a small VAE of Wan2.2, with the means that every file of it stands for."""
    facts = {"latents_mean": list(MEAN_48), "latents_std": list(STD_48)}
    return random_vae(
        decoder_base_dim=16, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, **facts,
    )  # fmt: skip


def state_of(folder: Path) -> State:
    """All weights of a component in diffusers layout."""
    return {
        name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()
    }


def _replaced(name: str, pairs: Mapping[str, str]) -> str:
    for ours, theirs in pairs.items():
        name = re.sub(ours, theirs, name)
    return name


_TRANSFORMER = {
    r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"^condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"^condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"^condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"^condition_embedder\.image_embedder\.pos_embed": "img_emb.emb_pos",
    r"^scale_shift_table": "head.modulation",
    r"scale_shift_table": "modulation",
    r"^proj_out": "head.head",
    r"(vace_blocks\.\d+)\.proj_in": r"\1.before_proj",
    r"(vace_blocks\.\d+)\.proj_out": r"\1.after_proj",
    r"\.norm2\.": ".norm3.",
    r"\.ffn\.net\.0\.proj": ".ffn.0",
    r"\.ffn\.net\.2": ".ffn.2",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0\.": ".o.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.add_([kv])_proj\.": r".\1_img.",
    r"\.norm_added_k\.": ".norm_k_img.",
}
_TEXT = {
    r"^shared": "token_embedding",
    r"^encoder\.final_layer_norm": "norm",
    r"^encoder\.block": "blocks",
    r"layer\.0\.layer_norm": "norm1",
    r"layer\.1\.layer_norm": "norm2",
    r"layer\.0\.SelfAttention\.relative_attention_bias": "pos_embedding.embedding",
    r"layer\.0\.SelfAttention": "attn",
    r"layer\.1\.DenseReluDense\.wi_0": "ffn.gate.0",
    r"layer\.1\.DenseReluDense\.wi_1": "ffn.fc1",
    r"layer\.1\.DenseReluDense\.wo": "ffn.fc2",
}
_VAE = {
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"conv_in": "conv1",
    r"norm_out": "head.0",
    r"conv_out": "head.2",
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.attentions\.0": "middle.1",
    r"mid_block\.resnets\.1": "middle.2",
    r"\.norm1\.": ".residual.0.",
    r"(downsamples\.\d+|upsamples\.\d+|middle\.\d)\.conv1\.": r"\1.residual.2.",
    r"\.norm2\.": ".residual.3.",
    r"(downsamples\.\d+|upsamples\.\d+|middle\.\d)\.conv2\.": r"\1.residual.6.",
    r"conv_shortcut": "shortcut",
}


def original_transformer(state: State) -> State:
    return {_replaced(name, _TRANSFORMER): value for name, value in state.items()}


def original_text_encoder(state: State) -> State:
    return {_replaced(name, _TEXT): value for name, value in state.items() if "embed_tokens" not in name}


def original_vae(state: State, repeats: int = 2) -> State:
    """Undo the renaming of Wan2.1's VAE: a stage of its decoder has `repeats` + 1 blocks and a sampler."""

    def layer(found: re.Match[str]) -> str:
        block, kind, number = int(found[1]), found[2], int(found[3])
        place = number if kind == "resnets" else repeats + 1
        return f"decoder.upsamples.{block * (repeats + 2) + place}"

    made = {}
    for name, value in state.items():
        flat = re.sub(r"^encoder\.down_blocks", "encoder.downsamples", name)
        flat = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", layer, flat)
        made[_replaced(flat, _VAE)] = value
    return made


def original_residual_vae(state: State, repeats: int = 2) -> State:
    """Undo the renaming of Wan2.2's VAE, whose layers are numbered within their block."""
    ends = {"down": repeats, "up": repeats + 1}
    made = {}
    for name, value in state.items():
        for way in ("down", "up"):
            name = re.sub(  # noqa: PLW2901
                rf"(encoder|decoder)\.{way}_blocks\.(\d+)\.resnets\.(\d+)",
                rf"\1.{way}samples.\2.{way}samples.\3",
                name,
            )
            name = re.sub(  # noqa: PLW2901
                rf"(encoder|decoder)\.{way}_blocks\.(\d+)\.{way}sampler",
                rf"\1.{way}samples.\2.{way}samples.{ends[way]}",
                name,
            )
        made[_replaced(name, _VAE)] = value
    return made


def original_image_encoder(state: State) -> State:
    """Undo the renaming of CLIP's image encoder, with queries, keys and values in one matrix."""
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    made = {
        "visual.cls_embedding": state["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"].unsqueeze(0),
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "visual.head": torch.randn(_IMAGE_WIDTH, 1024),
        "textual.token_embedding.weight": torch.randn(7, 3),
        "log_scale": torch.tensor(1.0),
    }
    for ours, theirs in (("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm")):
        made |= {f"visual.{theirs}.{leaf}": state[f"{ours}.{leaf}"] for leaf in ("weight", "bias")}
    pairs = {
        "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }  # fmt: skip
    for number in range(3):
        ours, theirs = f"encoder.layers.{number}", f"visual.transformer.{number}"
        for leaf in ("weight", "bias"):
            made |= {f"{theirs}.{b}.{leaf}": state[f"{ours}.{a}.{leaf}"] for a, b in pairs.items()}
            joined = [state[f"{ours}.self_attn.{one}_proj.{leaf}"] for one in "qkv"]
            made[f"{theirs}.attn.to_qkv.{leaf}"] = torch.cat(joined)
    return made


def write_original(reference: Path, folder: Path) -> Path:
    """Write the model as Wan's own repository has it: split safetensors, pickled VAE and encoders."""
    folder.mkdir(parents=True)
    _write_original_transformer(reference / "transformer", folder)
    torch.save(*_original_vae(reference / "vae", folder))
    text = original_text_encoder(state_of(reference / "text_encoder"))
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(reference / "tokenizer", folder / "google" / "umt5-xxl")
    if (reference / "image_encoder").is_dir():
        image = original_image_encoder(state_of(reference / "image_encoder"))
        torch.save(image, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
        other = folder / "xlm-roberta-large"  # of CLIP's texts
        other.mkdir()
        (other / "tokenizer.json").write_text("{}")
        (other / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    return folder


def _original_vae(reference: Path, folder: Path) -> tuple[State, Path]:
    if read_json(reference / "config.json")["is_residual"]:
        return original_residual_vae(state_of(reference)), folder / "Wan2.2_VAE.pth"
    return original_vae(state_of(reference)), folder / "Wan2.1_VAE.pth"


def _write_original_transformer(reference: Path, folder: Path) -> None:
    settings = read_json(reference / "config.json")
    heads = settings["num_attention_heads"]
    stated = {
        "_class_name": "WanModel", "dim": heads * settings["attention_head_dim"], "num_heads": heads,
        "eps": settings["eps"], "num_layers": settings["num_layers"],
        "vace_layers": settings.get("vace_layers"),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stated))
    items = list(original_transformer(state_of(reference)).items())
    half = len(items) // 2
    for number, part in enumerate((items[:half], items[half:]), start=1):
        save_file(dict(part), folder / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors")


def write_experts(reference: Path, folder: Path) -> Path:
    """Write a model of two experts as Wan2.2's own repositories have it.

    Args:
        reference: model in diffusers layout, with `transformer` for high noise and `transformer_2`.
        folder: where to.
    """
    write_original(reference, folder)
    for file in [*folder.glob("diffusion_pytorch_model*"), folder / "config.json"]:
        file.unlink()
    _write_original_transformer(reference / "transformer", folder / "high_noise_model")
    _write_original_transformer(reference / "transformer_2", folder / "low_noise_model")
    return folder


def write_single_files(reference: Path, folder: Path, change: Callable[[State], State] = lambda s: s) -> Path:
    """Write the model as ComfyUI has it: one file for each component, found in folders by their kind.

    Args:
        reference: model in diffusers layout.
        folder: where to.
        change: what is done to the transformer's weights, to quantise them.
    """
    transformer = change(original_transformer(state_of(reference / "transformer")))
    prefixed = {f"model.diffusion_model.{name}": value for name, value in transformer.items()}
    text = {
        name: one for name, one in state_of(reference / "text_encoder").items() if "embed_tokens" not in name
    }
    parts = {
        "diffusion_models/wan2.1_t2v_1.3B_bf16": prefixed,
        "vae/wan_2.1_vae": _original_vae(reference / "vae", folder)[0],
        "text_encoders/umt5_xxl_fp16": text,
    }
    if (reference / "image_encoder").is_dir():
        image = state_of(reference / "image_encoder")
        parts["clip_vision/clip_vision_h"] = {
            f"vision_model.{name.removeprefix('vision_model.')}": one for name, one in image.items()
        }
        parts["clip_vision/clip_vision_h"]["visual_projection.weight"] = torch.randn(1024, _IMAGE_WIDTH)
    for name, state in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    shutil.copytree(reference / "tokenizer", folder / "tokenizer")
    return folder


def mapping(folder: Path) -> dict[str, str]:
    """Name the files of `write_single_files` one by one."""
    named = {
        "transformer": "diffusion_models/wan2.1_t2v_1.3B_bf16.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "text_encoder": "text_encoders/umt5_xxl_fp16.safetensors",
        "image_encoder": "clip_vision/clip_vision_h.safetensors",
        "tokenizer": "tokenizer",
    }
    return {name: str(folder / file) for name, file in named.items() if (folder / file).exists()}


def scaled(state: State, *, rows: bool = False) -> State:
    """Quantise the matrices of the blocks to float8, as ComfyUI's `fp8_scaled` files have them."""
    made: State = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if name.startswith("blocks.") and value.ndim == 2:
            largest = value.abs().amax(dim=1, keepdim=True) if rows else value.abs().amax()
            scale = (largest / 448).to(torch.float32)
            made[name] = (value / scale).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".scale_weight")] = scale
            made[name.replace(".weight", ".scale_input")] = torch.tensor(1.0)
        else:
            made[name] = value.to(torch.bfloat16)
    return made


def unscaled(state: State) -> State:
    """The weights that a file of `scaled` stands for."""
    return {
        name: (value.float() * state[name.replace(".weight", ".scale_weight")]).bfloat16()
        if value.dtype == torch.float8_e4m3fn
        else value
        for name, value in state.items()
        if "scale" not in name
    }


def config_for(config: Config, model: str | ModelFiles) -> Config:
    return config.model_copy(update={"model": model, "architecture": None, "window": None})


def components(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "model_index.json")
    return {
        name: getattr({"diffusers": diffusers, "transformers": transformers}[kind[0]], kind[1])
        for name, kind in index.items()
        if isinstance(kind, list) and all(kind) and (folder / name / "config.json").is_file()
    }


def assert_same(folder: ModelFolder, reference: Path, dtype: torch.dtype) -> None:
    """Every component of two models is the same to the bit, loaded in a dtype; buffers, too."""
    kinds = components(reference)
    assert components(folder.path) == kinds
    for name in kinds:
        assert_same_component(folder, reference, name, dtype)


def assert_same_component(folder: ModelFolder, reference: Path, name: str, dtype: torch.dtype) -> None:
    kind = components(reference)[name]
    found = read_component(kind, folder, name, dtype)
    expected = kind.from_pretrained(reference / name, dtype=dtype)
    assert not found.training
    mine, theirs = (dict([*one.named_parameters(), *one.named_buffers()]) for one in (found, expected))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].dtype == value.dtype, key
        assert torch.equal(mine[key], value), key
