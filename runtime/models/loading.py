"""Loading weights from disk to the devices: each file is read once per node, and no rank holds two copies.

The first rank of a node reads, and broadcasts the tensors one by one to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from torch import nn

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder
from runtime.models.layouts.assemble import assemble
from runtime.models.layouts.sources import has_sources
from runtime.parallel.collectives import Peers
from runtime.parallel.offloading import Offload
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import ShardedWeights, Weights, WholeWeights
from runtime.request.memory import Memory

_Network = TypeVar("_Network", bound=nn.Module)


def load_component(
    kind: type[_Network],
    folder: ModelFolder,
    component: str,
    dtype: torch.dtype,
    node: Peers,
    change: Callable[[_Network], None] = lambda _: None,
) -> _Network:
    """Load a component's weights on the CPU of a node's first rank; other ranks get an empty model.

    Args:
        kind: class of the component in diffusers (a `ModelMixin`).
        folder: the model.
        component: name of the component's folder.
        dtype: dtype in which its weights are stored.
        node: ranks of this machine.
        change: called with the model on the rank that has its weights, for example to merge a LoRA.

    Raises:
        BadRequestError: the weights do not fit the configuration beside them.
    """
    layout: list[tuple[str, list[int], str]] = []
    if node.rank == 0:
        model = read_component(kind, folder, component, dtype)
        change(model)
        layout = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in _tensors(model)]
    layout = node.all_gather_object(layout)[0]
    if node.rank != 0:
        model = empty_component(kind, folder, component)
        for name, shape, kept in layout:  # diffusers keeps some in float32: as on the rank that reads
            replace(model, name, torch.empty(shape, dtype=getattr(torch, kept), device="meta"))
    found: _Network = model.eval().requires_grad_(False)
    return found


def empty_component(kind: type[_Network], folder: ModelFolder, component: str) -> _Network:
    """Make a component without weights: all are on the meta device. Arguments as of `load_component`."""
    path, loader = folder.path / component, cast(Any, kind)
    with init_empty_weights(include_buffers=True):
        model: _Network = loader.from_config(loader.load_config(path))
    return model


def read_component(kind: type[_Network], folder: ModelFolder, component: str, dtype: torch.dtype) -> _Network:
    """Read a component's weights from disk to the CPU, in whatever layout they are.

    Args:
        kind: class of the component, in diffusers or transformers.
        folder: the model.
        component: name of the component's folder.
        dtype: dtype in which its weights are stored.

    Raises:
        BadRequestError: the weights do not fit the configuration beside them.
    """
    path, loader = folder.path / component, cast(Any, kind)
    if has_sources(path):
        try:
            model, info = assemble(kind, path, dtype)
        except (OSError, ValueError) as error:
            raise BadRequestError(f"model: {folder.name!r} cannot be used: {error}") from None
    else:
        model, info = loader.from_pretrained(path, dtype=dtype, output_loading_info=True)
    refuse_missing(folder, component, info)
    found: _Network = model
    return found


_AHEAD = 2  # places on the device: for the block that runs, and the one after it


def open_offload(
    memory: Memory,
    experts: int,
    device: torch.device,
    make: Callable[[torch.device, int | None], Offload] = Offload,
) -> Offload | None:
    """Make what offloads the blocks of a model's transformers; None if they stay on the device.

    Args:
        memory: where the config wants them.
        experts: number of the transformers.
        device: the device.
        make: makes it for a device and a number of places.
    """
    if memory.transformer == "offload":
        return make(device, _AHEAD)
    return make(device, None) if memory.experts == "swap" and experts > 1 else None


def distribute_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ranks: Ranks,
    source: str,
    *,
    shard: bool,
    offload: Offload | None = None,
    change: Callable[[nn.Module], None] = lambda _: None,
) -> Weights:
    """Broadcast a transformer's blocks, and replicate them, shard them, or offload them to host memory.

    One block at a time is whole and unchanged on the device.

    Returns:
        Where their weights are.

    Args:
        model: the transformer, with its weights on the first rank of each node.
        blocks: its blocks in the order in which they run.
        source: name of the model, for messages.
        shard: whether to shard them (FSDP2).
        offload: takes the blocks in, if they are offloaded.
        change: called with each block when it is whole on the device, for example to quantise it.

    Raises:
        BadRequestError: a weight is not finite; on every rank.
    """
    shares = None
    if shard and ranks.size > 1 and offload is None:
        shares = ShardedWeights(ranks.mesh(), ranks.everyone)
    names = {id(module): name for name, module in model.named_modules()}
    for position, block in enumerate(blocks):
        distribute(block, ranks, source, prefix=f"{names[id(block)]}.")
        change(block)
        if offload is not None:
            offload.add(block, position)
        elif shares is not None:
            shares.shard(block)
    return offload or shares or WholeWeights()


def distribute(
    module: nn.Module, ranks: Ranks, source: str, without: Sequence[nn.Module] = (), prefix: str = ""
) -> None:
    """Broadcast a module from the first rank of a node to the device of every rank, tensor by tensor.

    Args:
        source: name of the model, for messages.
        without: modules in it that are distributed already.
        prefix: what precedes the names of its tensors in the model, for messages.

    Raises:
        BadRequestError: a weight is not finite; on every rank.
    """
    done = {id(tensor) for part in without for _, tensor in _tensors(part)}
    # No list of tensors: each is to be freed when it has moved.
    for name in [name for name, tensor in _tensors(module) if id(tensor) not in done]:
        tensor = _find(module, name)
        first = ranks.node.rank == 0
        moved = tensor.to(ranks.device) if first else torch.empty_like(tensor, device=ranks.device)
        ranks.node.broadcast(moved)
        if not is_finite(moved):
            raise BadRequestError(
                f"model: {source} cannot be used: its weights {prefix}{name} are not finite, or overflow "
                f"{str(moved.dtype).removeprefix('torch.')}"
            )
        replace(module, name, moved)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and values of parameters and buffers."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _find(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put another tensor in the place of a module's parameter or buffer."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def refuse_missing(folder: ModelFolder, component: str, info: dict[str, Any]) -> None:
    """Refuse a component that lacks weights.

    Args:
        info: loading info that `from_pretrained` returned.

    Raises:
        BadRequestError: weights are missing; the message names the first.
    """
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise BadRequestError(
            f"model: {folder.name!r} cannot be used: {folder.path / component} lacks {len(missing)} weights, "
            f"the first is {missing[0]}"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether every element is finite; takes one pass and allocates nothing."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))
