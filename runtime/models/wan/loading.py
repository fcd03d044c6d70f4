"""Loading Wan's components from disk to the devices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from runtime.models.folder import ModelFolder
from runtime.models.loading import distribute, load_component, read_component
from runtime.models.precision import Precision
from runtime.models.quantization import SCALES, check_quantization, quantize_linears
from runtime.models.wan.adapter import Transformer, every_block
from runtime.models.wan.folder import ModelKind
from runtime.models.wan.lora_merge import LoraWeights
from runtime.models.wan.lora_switch import ReadWeights
from runtime.models.wan.projections import fuse_projections
from runtime.parallel.offloading import Offload
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import Weights
from runtime.request.config import Config

log = logging.getLogger(__name__)


class LoadedTransformer(NamedTuple):
    """A transformer, the weights of its blocks, wherever they are, and how all were read."""

    model: Transformer
    weights: Weights
    read: ReadWeights


def load_transformer(
    folder: ModelFolder,
    config: Config,
    ranks: Ranks,
    component: str = "transformer",
    offload: Offload | None = None,
    loras: Sequence[LoraWeights] = (),
) -> LoadedTransformer:
    """Load a transformer on every rank's device: whole, or with its blocks sharded over all ranks (FSDP2) or
    offloaded.

    Args:
        component: name of the transformer's folder.
        offload: takes its blocks in, if they are offloaded.
        loras: what is merged into it, in this order; on the first rank of a machine.

    Raises:
        BadRequestError: the weights do not fit the settings beside them, or are not finite; or the device
            cannot compute with the quantisation.
    """
    check_quantization(config.performs.quantization, ranks.device)
    vace = folder.pipeline == ModelKind.VACE
    kind: type[Transformer] = WanVACETransformer3DModel if vace else WanTransformer3DModel
    source = f"the {component} of {folder.name!r}"
    if loras:
        source += f" with {', '.join(one.file.lora.file for one in loras)}"

    def add_loras(model: Transformer) -> None:
        for lora in loras:
            lora.merge(model)

    kept = config.dtype.of("transformer")
    changed = frozenset(name for lora in loras for name in lora.changed)
    arriving = load_component(kind, folder, component, kept, ranks.node, add_loras, changed)
    model = arriving.model
    empty = {name: torch.empty_like(weight, device="meta") for name, weight in model.named_parameters()}
    change = change_of_blocks(config)
    read = ReadWeights(kept, empty, changed, change)
    precision = Precision(kept, config.dtype.computed, (*model._keep_in_fp32_modules, SCALES))
    shard, blocks = config.memory.transformer == "shard", every_block(model)
    weights = distribute(arriving, ranks, source, blocks, shard=shard, offload=offload, change=change)
    precision.convert(model, blocks)
    if config.performs.compile:
        for block in blocks:  # of one class, so they share their compiled code
            block.compile()
    shared = ", sharded" * (shard and ranks.size > 1) + ", offloaded" * (offload is not None)
    log.info("loaded %s of %s on %s%s", component, folder.name, ranks.device, shared)
    return LoadedTransformer(model, precision.visiting(weights), read)


def change_of_blocks(config: Config) -> Callable[[nn.Module], None]:
    """Return what a config does to each block, whole and on the device, before it is used or sharded."""
    performs = config.performs

    def change(block: nn.Module) -> None:
        if performs.fuse_projections:
            fuse_projections(block)
        quantize_linears(block, performs.quantization)

    return change


def load_vae(folder: ModelFolder, config: Config, ranks: Ranks) -> AutoencoderKLWan | None:
    """Load the VAE where it is needed: for whole frames on the first rank, otherwise on every one."""
    if config.decoding == "whole":
        if not ranks.is_leader:
            return None
        ranks = Ranks.alone(ranks.device)
    arriving = load_component(AutoencoderKLWan, folder, "vae", config.dtype.of("vae"), ranks.node)
    distribute(arriving, ranks, f"the VAE of {folder.name!r}")
    return arriving.model


def load_text_encoder(folder: ModelFolder, config: Config, device: torch.device) -> UMT5EncoderModel:
    """Load the text encoder on this rank alone."""
    disable_progress_bar()  # Lockstep shows loading itself
    model = read_component(UMT5EncoderModel, folder, "text_encoder", config.dtype.of("text_encoder"))
    return model.to(device)
