"""Weights from disk to the devices: each file is read once per node, and no rank ever holds two copies.

The first rank of a node reads; the others receive the tensors one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder
from runtime.parallel.collectives import Peers
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import ShardedWeights, Weights, WholeWeights, is_sharded

_Network = TypeVar("_Network", bound=nn.Module)


def open_component(
    kind: type[_Network],
    folder: ModelFolder,
    component: str,
    dtype: torch.dtype,
    node: Peers,
    change: Callable[[_Network], None] = lambda _: None,
) -> _Network:
    """A component's weights on the CPU of the first rank of a node; on the others everything but the values.

    Args:
        kind: its class in diffusers (a `ModelMixin`).
        component: the name of its folder.
        dtype: that its weights are kept in.
        change: called with the model where its weights are, as for merging a LoRA.

    Raises:
        BadRequestError: the weights do not fit the configuration beside them.
    """
    path: Path = folder.path / component
    loader: Any = kind
    layout: list[tuple[str, list[int], str]] = []
    if node.rank == 0:
        model, info = loader.from_pretrained(path, dtype=dtype, output_loading_info=True)
        refuse_missing(folder, component, info)
        change(model)
        layout = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in _tensors(model)]
    layout = node.all_gather_object(layout)[0]
    if node.rank != 0:
        with init_empty_weights(include_buffers=True):
            model = loader.from_config(loader.load_config(path))
        for name, shape, kept in layout:  # diffusers keeps some in float32: as the reader found it
            _replace(model, name, torch.empty(shape, dtype=getattr(torch, kept), device="meta"))
    found: _Network = model.eval().requires_grad_(False)
    return found


def spread_blocks(blocks: Sequence[nn.Module], ranks: Ranks, source: str, *, shard: bool) -> Weights:
    """Bring a transformer's blocks from the first rank of the node to where they are to be.

    Args:
        source: where they come from, for messages.
        shard: whether ranks share them out (FSDP2); otherwise they wait for `spread`.

    Raises:
        BadRequestError: a weight is not a number; on every rank.
    """
    if not shard or ranks.size == 1:
        return WholeWeights()
    shares = ShardedWeights(ranks.mesh(), ranks.everyone)
    for block in blocks:  # one whole block at a time is on the device
        spread(block, ranks, source)
        shares.share_out(block)
    return shares


def spread(module: nn.Module, ranks: Ranks, source: str) -> None:
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
