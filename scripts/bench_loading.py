"""Seconds to load a large checkpoint on the ranks of a node: each reads a share, or one of them reads all.

    python scripts/bench_loading.py --gigabytes 4 --ranks 2

Writes wan-tiny with another transformer, of random float32 weights with blocks as wide as Wan2.1-14B's, in
files of 5 GB as the hub has them, and loads it in bfloat16 on all ranks, in alternating rounds; all must load
the same bits. A third way loads the copy that `lockstep convert --dtype bfloat16` makes, of half the bytes.
With --cold the files are dropped from the kernel's cache before each round, so that the disk is read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_scaling import on_ranks
from diffusers import WanTransformer3DModel

from runtime.files.text import read_json
from runtime.models.folder import ModelFolder
from runtime.models.layouts.convert import plan_conversion
from runtime.models.loading import distribute, is_finite, load_component, replace
from runtime.models.wan.adapter import every_block
from runtime.parallel.ranks import Ranks
from runtime.request.config import EMBEDDED_MODELS

WIDTH = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}  # of Wan2.1-14B
BLOCK_BYTES = 4 * 352e6  # of one of its blocks, in float32


def write_transformer(folder: Path, gigabytes: float, **settings: Any) -> float:
    """Write a random transformer of a model in `folder`; returns its gigabytes.

    Args:
        settings: arguments of the transformer beside its width and number of blocks.
    """
    blocks = max(1, round(gigabytes * 1e9 / BLOCK_BYTES))
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=blocks, **WIDTH, **settings)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=generator)
    model.save_pretrained(folder / "transformer", max_shard_size="5GB")
    return sum(weight.numel() for weight in model.parameters()) * 4 / 1e9


def write_model(folder: Path, gigabytes: float) -> float:
    """Write wan-tiny with such a transformer in place of its own; returns the transformer's gigabytes."""
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "transformer")
    own = read_json(EMBEDDED_MODELS / "wan-tiny" / "transformer" / "config.json")
    return write_transformer(folder, gigabytes, text_dim=own["text_dim"])


def convert(folder: Path) -> float:
    """Convert the model to bfloat16 in another folder beside it; returns the seconds."""
    began = time.perf_counter()
    plan_conversion(str(folder), converted(folder), dtype="bfloat16").run()
    return time.perf_counter() - began


def converted(folder: Path) -> Path:
    """Folder of the converted model."""
    return folder.with_name(f"{folder.name}-bfloat16")


def drop(folder: Path) -> None:
    """Drop all files of a folder from the kernel's cache; no process may have mapped them."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_in_shares(ranks: Ranks, folder: ModelFolder) -> torch.nn.Module:
    """Load as Lockstep does."""
    arriving = load_component(WanTransformer3DModel, folder, "transformer", torch.bfloat16, ranks.node)
    distribute(arriving, ranks, folder.name, every_block(arriving.model))
    return arriving.model


def load_on_the_first(ranks: Ranks, folder: ModelFolder) -> torch.nn.Module:
    """Read everything on the first rank with diffusers, then broadcast it, as Lockstep did before."""
    path = folder.path / "transformer"
    if ranks.is_leader:
        model = WanTransformer3DModel.from_pretrained(path, dtype=torch.bfloat16)
    else:
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(path))
    wide = model._keep_in_fp32_modules
    for name, weight in list(model.named_parameters()):
        dtype = torch.float32 if set(wide) & set(name.split(".")) else torch.bfloat16
        moved = weight.detach() if ranks.is_leader else torch.empty(weight.shape, dtype=dtype)
        ranks.node.broadcast(moved)
        assert is_finite(moved), name
        replace(model, name, moved)
    return model


def load_cast(ranks: Ranks, folder: ModelFolder) -> torch.nn.Module:
    """Load the copy as Lockstep does."""
    return load_in_shares(ranks, ModelFolder(folder.name, converted(folder.path), "", folder.pipeline))


WAYS = {
    "each rank reads a share": load_in_shares,
    "the first rank reads all": load_on_the_first,
    "each rank reads a share of a copy in bfloat16": load_cast,
}


def measure(ranks: Ranks, path: Path, rounds: int, cold: bool) -> dict[str, list[float]]:
    """Load in turn in both ways; seconds of each, and both must have loaded the same bits."""
    folder, found = ModelFolder("synthetic", path, "", "WanPipeline"), {way: [] for way in WAYS}
    sums = set()
    for _ in range(rounds):
        for way, load in WAYS.items():
            if cold and ranks.is_leader:
                drop(path)
                drop(converted(path))
            ranks.control.all_gather_object("dropped")
            began = time.perf_counter()
            model = load(ranks, folder)
            ranks.control.all_gather_object("loaded")
            found[way].append(time.perf_counter() - began)
            values = (
                p.view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32) for p in model.parameters()
            )
            sums.add(sum(int(one.sum()) for one in values))
            del model
    assert len(sums) == 1, "the ways loaded different weights"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint in float32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="read from the disk each time")
    parser.add_argument(
        "--folder", type=Path, help="where to write the checkpoint; by default a temporary one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = Path(folder) / "model"
        size = write_model(model, arguments.gigabytes)
        converting = convert(model)
        found = on_ranks(arguments.ranks, measure, model, arguments.rounds, arguments.cold)[0]
    cache = "not in" if arguments.cold else "in"
    print(
        f"{size:.1f} GB in float32, loaded in bfloat16 on {arguments.ranks} ranks; files {cache} the cache\n"
    )
    print("| way | median seconds | least |\n| --- | --- | --- |")
    for way, seconds in found.items():
        print(f"| {way} | {statistics.median(seconds):.1f} | {min(seconds):.1f} |")
    ours, theirs, cast = (statistics.median(seconds) for seconds in found.values())
    print(f"\nA share for each rank takes {ours / theirs:.2f} of the time; of a copy {cast / ours:.2f} of it")
    print(f"Converting took {converting:.1f} s.")


if __name__ == "__main__":
    main()
