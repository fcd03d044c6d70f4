"""Weights from disk to the devices: each file is read once per node, and no rank ever holds two copies.

The first rank of a node reads; the others receive the tensors one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder, ModelKind
from runtime.models.wan.adapter import Transformer, every_block
from runtime.models.wan.lora import merge_lora
from runtime.parallel.collectives import Peers
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import ShardedWeights, Weights, WholeWeights, is_sharded
from runtime.request.config import Config

log = logging.getLogger(__name__)

_Network = TypeVar("_Network", WanTransformer3DModel, WanVACETransformer3DModel, AutoencoderKLWan)


class LoadedTransformer(NamedTuple):
    """A transformer on this rank's device, and where the weights of its blocks are."""

    model: Transformer
    weights: Weights


def load_transformer(folder: ModelFolder, config: Config, ranks: Ranks) -> LoadedTransformer:
    """The transformer on every rank's device: whole, or its blocks sharded over all ranks (FSDP2).

    Raises:
        BadRequestError: the weights do not fit the configuration beside them.
    """
    kind = WanVACETransformer3DModel if folder.kind is ModelKind.VACE else WanTransformer3DModel
    model: Transformer = _open(kind, "transformer", folder, config, ranks.node)
    weights: Weights = WholeWeights()
    source = f"the transformer of {folder.name!r}"
    if config.lora:
        source += f" with {', '.join(one.file for one in config.lora)}"
    sharded = config.memory.transformer == "shard" and ranks.size > 1
    if sharded:
        weights = shares = ShardedWeights(ranks.mesh(), ranks.everyone)
        for block in every_block(model):  # one whole block at a time is on the device
            _spread(block, ranks, source)
            shares.share_out(block)
    _spread(model, ranks, source)
    if config.compile:
        for block in every_block(model):  # alike, so they share their compiled code
            block.compile()
    log.info("loaded the transformer of %s on %s%s", folder.name, ranks.device, ", sharded" * sharded)
    return LoadedTransformer(model, weights)


def load_vae(folder: ModelFolder, config: Config, ranks: Ranks) -> AutoencoderKLWan | None:
    """The VAE where it is needed: on every rank if they share tiles, otherwise on the first."""
    if config.tiles is None:
        if not ranks.is_leader:
            return None
        ranks = Ranks.alone(ranks.device)
    model = _open(AutoencoderKLWan, "vae", folder, config, ranks.node)
    _spread(model, ranks, f"the VAE of {folder.name!r}")
    return model


def load_text_encoder(folder: ModelFolder, config: Config, device: torch.device) -> UMT5EncoderModel:
    """The text encoder, on this rank alone."""
    disable_progress_bar()  # loading is one phase of ours, with its own line
    model, info = UMT5EncoderModel.from_pretrained(
        folder.path / "text_encoder", dtype=config.dtype.of("text_encoder"), output_loading_info=True
    )
    refuse_missing(folder, "text_encoder", info)
    return model.to(device)


def _open(
    kind: type[_Network],
    component: Literal["transformer", "vae"],
    folder: ModelFolder,
    config: Config,
    node: Peers,
) -> _Network:
    """The weights on the CPU on the first rank of a node; on the others everything but the values."""
    path, dtype = folder.path / component, config.dtype.of(component)
    layout: list[tuple[str, list[int], str]] = []
    if node.rank == 0:
        model, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
        refuse_missing(folder, component, info)
        for lora in config.lora if component == "transformer" else ():
            merge_lora(model, lora, folder.revision)
        layout = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in _tensors(model)]
    layout = node.all_gather_object(layout)[0]
    if node.rank != 0:
        with init_empty_weights(include_buffers=True):
            model = kind.from_config(kind.load_config(path))
        for name, shape, kept in layout:  # diffusers keeps some in float32: as the reader found it
            _replace(model, name, torch.empty(shape, dtype=getattr(torch, kept), device="meta"))
    return model.eval().requires_grad_(False)


def _spread(module: nn.Module, ranks: Ranks, source: str) -> None:
    """Move what is on the first rank of the node to every rank's device, tensor by tensor.

    Args:
        source: where it comes from, for messages.

    Raises:
        BadRequestError: a weight is not a number; on every rank.
    """
    for name in [name for name, _ in _tensors(module)]:  # no list of tensors: each is to be freed when moved
        tensor = _find(module, name)
        if is_sharded(tensor):
            continue  # sharded already
        first = ranks.node.rank == 0
        moved = tensor.to(ranks.device) if first else torch.empty_like(tensor, device=ranks.device)
        ranks.node.broadcast(moved)
        if not is_finite(moved):
            raise BadRequestError(
                f"model: {source} cannot be used: its weights {name} hold what is not a number, or overflow "
                f"{str(moved.dtype).removeprefix('torch.')}"
            )
        _replace(module, name, moved)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _find(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def refuse_missing(folder: ModelFolder, component: str, info: dict[str, Any]) -> None:
    """Refuse a component of which weights were not found, by what its loader tells.

    Raises:
        BadRequestError: the first that is missing.
    """
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise BadRequestError(
            f"model: {folder.name!r} cannot be used: {folder.path / component} lacks {len(missing)} weights, "
            f"the first is {missing[0]}"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is a number; one pass, and nothing is allocated."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))
