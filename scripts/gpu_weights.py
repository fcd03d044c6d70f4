"""Models of the published shapes with random weights, in diffusers layout: nothing is downloaded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from runtime.rehearsal.published import write_settings
from runtime.request.config import EMBEDDED_MODELS

SHARD = 5 * 10**9  # bytes of a weight file
TIED = "encoder.embed_tokens.weight"  # of the text encoder: the same as its shared.weight
BEGUN, DONE = ".random-weights", ".whole"  # files that are written first and last
_SMALL_TRANSFORMER = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 32,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {  # what makes a model small, for a CPU
    "transformer/config.json": _SMALL_TRANSFORMER,
    "transformer_2/config.json": _SMALL_TRANSFORMER,
    "text_encoder/config.json": {
        "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 512,
    },
    "vae/config.json": {"base_dim": 8},
}  # fmt: skip


def random_model(repository: str, folder: Path, device: torch.device, *, small: bool) -> None:
    """Write a model of a repository's shape with random bfloat16 weights, unless it is there.

    Args:
        repository: one of those whose settings Lockstep knows.
        folder: where to write it.
        device: device that draws the weights.
        small: whether to write a model of two blocks.

    Raises:
        FileExistsError: the folder is there, and is not one that was begun here.
    """
    if (folder / DONE).exists():
        return
    if (folder / BEGUN).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)  # a folder of somebody else's stays: it is an error
    (folder / BEGUN).touch()
    write_settings(repository, folder)
    for name, changes in SMALL.items() if small else ():
        if not (folder / name).exists():
            continue
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(settings | changes), encoding="utf-8")
    generator = torch.Generator(device).manual_seed(0)
    with init_empty_weights():
        text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(folder / "text_encoder"))
    for place in sorted(folder.glob("transformer*")):
        with init_empty_weights():
            transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(place))
        _write(transformer, place, "diffusion_pytorch_model", generator)
    _write(text_encoder, folder / "text_encoder", "model", generator)
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
    vae.save_pretrained(folder / "vae")
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny" / "tokenizer", folder / "tokenizer")
    (folder / DONE).touch()


def _write(model: torch.nn.Module, folder: Path, stem: str, generator: torch.Generator) -> None:
    shards = list(_shards(model))
    names: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: _drawn(name, shape, generator).cpu() for name, shape in shapes.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(model: torch.nn.Module) -> Iterator[dict[str, torch.Size]]:
    """Yield names and shapes of the parameters that one file holds; tied ones come once."""
    shapes: dict[str, torch.Size] = {}
    held = 0
    for name, parameter in model.named_parameters():
        if name == TIED:
            continue
        shapes[name] = parameter.shape
        held += 2 * parameter.numel()
        if held > SHARD:
            yield shapes
            shapes, held = {}, 0
    if shapes:
        yield shapes


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw a weight that keeps activations of about the same size; norms are ones, biases zeros."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    if len(shape) == 1:
        return weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return weight.normal_(0.0, 1 / math.sqrt(math.prod(shape[1:])), generator=generator)
