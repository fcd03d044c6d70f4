"""Loading weights from disk to the devices: each is read once per node, and no rank holds two copies.

The ranks of a node read their shares of the weights ahead, and broadcast them one by one to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import init_empty_weights
from torch import nn

from runtime.errors import BadRequestError, with_files
from runtime.models.folder import ModelFolder
from runtime.models.layouts.assemble import assemble, kept_wide
from runtime.models.layouts.sources import has_sources
from runtime.models.layouts.weights import Weight, made
from runtime.models.reading import ReadAhead, readers, weight_bytes
from runtime.models.weight_files import DIFFUSERS_STEM, WeightFiles
from runtime.parallel.collectives import Peers
from runtime.parallel.offloading import Offload
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import ShardedWeights, Weights, WholeWeights
from runtime.request.memory import Memory

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Arriving(Generic[_Network]):
    """A component of which most weights are still on disk; `distribute` reads them.

    Attributes:
        model: the component; weights that are on disk are on the meta device.
        stored: on disk: name → how the weight is made. The others are in `model` on the node's first rank.
        readers: name of each weight on disk → the rank of the node that reads it.
        mapped: whether one rank reads files of diffusers' own layout; see `ReadAhead`.
    """

    model: _Network
    stored: Mapping[str, Weight]
    readers: Mapping[str, int]
    mapped: bool


def load_component(
    kind: type[_Network],
    folder: ModelFolder,
    component: str,
    dtype: torch.dtype,
    node: Peers,
    change: Callable[[_Network], None] = lambda _: None,
    changed: Collection[str] = (),
) -> Arriving[_Network]:
    """Begin to load a component; `distribute` reads its weights, each on one rank of a node.

    Args:
        kind: class of the component in diffusers (a `ModelMixin`).
        folder: the model.
        component: name of the component's folder.
        dtype: dtype in which its weights are stored.
        node: ranks of this machine.
        change: called with the model on the node's first rank, for example to merge a LoRA.
        changed: weights that it changes, which this rank reads before; known to that rank alone.

    Raises:
        BadRequestError: the weights do not fit the configuration beside them.
    """
    path, found = folder.path / component, cast(Any, kind)
    files = WeightFiles(path, DIFFUSERS_STEM)
    with init_empty_weights(include_buffers=False):
        model: _Network = found.from_config(found.load_config(path)).eval().requires_grad_(False)
    own, wide = model.state_dict(keep_vars=True), kept_wide(kind, dtype)
    with _refused(repr(folder.name)):
        files.check({name: tuple(tensor.shape) for name, tensor in own.items()})
        stored = files.weights()
    for name, tensor in own.items():
        kept = torch.float32 if wide.intersection(name.split(".")) else dtype
        replace(model, name, torch.empty(tensor.shape, dtype=kept, device="meta"))
    early: list[str] = node.all_gather_object(sorted(changed))[0]
    if node.rank == 0:
        with _refused(repr(folder.name)):
            for name, tensor in made(stored, early):
                replace(model, name, tensor.to(_find(model, name).dtype, copy=True))
        change(model)
    left = {name: stored[name] for name in own if name not in early}
    sizes = {name: weight_bytes(one.shape, _find(model, name).dtype) for name, one in left.items()}
    mapped = node.size == 1 and not has_sources(path)
    return Arriving(model, left, readers(sizes, node.size), mapped)


@contextmanager
def _refused(source: str) -> Iterator[None]:
    """Refuse a model, or a part of it, if its files cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        said = with_files(error) if isinstance(error, OSError) else error
        raise BadRequestError(f"model: {source} cannot be used: {said}") from None


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
        with _refused(repr(folder.name)):
            model, info = assemble(kind, path, dtype)
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


def distribute(
    arriving: Arriving[Any],
    ranks: Ranks,
    source: str,
    blocks: Sequence[nn.Module] = (),
    *,
    shard: bool = False,
    offload: Offload | None = None,
    change: Callable[[nn.Module], None] = lambda _: None,
) -> Weights:
    """Read a component, and broadcast each weight within a node to the devices of its ranks.

    One block at a time is whole and unchanged on the device; then it is replicated, sharded, or offloaded.

    Args:
        arriving: the component.
        ranks: all ranks.
        source: name of the model, for messages.
        blocks: blocks of a transformer in the order in which they run.
        shard: whether to shard these (FSDP2).
        offload: takes them in, if they are offloaded.
        change: called with each of them when it is whole on the device, for example to quantise it.

    Returns:
        Where the blocks' weights are.

    Raises:
        BadRequestError: a weight is not finite, or a file is damaged or has changed; on every rank of a node.
    """
    shares = None
    if shard and ranks.size > 1 and offload is None:
        shares = ShardedWeights(ranks.mesh(), ranks.everyone)
    model, node = arriving.model, ranks.node
    prefixes = {id(module): f"{name}." for name, module in model.named_modules()}
    parts = [[f"{prefixes[id(block)]}{name}" for name, _ in _tensors(block)] for block in blocks]
    within = {name for part in parts for name in part}
    parts.append([name for name, _ in _tensors(model) if name not in within])
    own = {
        name: (arriving.stored[name], _find(model, name).dtype)
        for part in parts
        for name in part
        if arriving.readers.get(name) == node.rank
    }
    with ReadAhead(own, mapped=arriving.mapped and ranks.device.type == "cpu") as ahead:

        def move(name: str) -> None:
            reader, tensor, problem = arriving.readers.get(name, 0), _find(model, name), ""
            if node.rank == reader:
                try:
                    with _refused(source):
                        moved = (ahead.take(name) if name in own else tensor).to(ranks.device)
                except BadRequestError as error:
                    problem = str(error)
                    moved = torch.full_like(tensor, math.nan, device=ranks.device)  # tells the others to ask
            else:
                moved = torch.empty_like(tensor, device=ranks.device)
            node.broadcast(moved, reader)
            if not is_finite(moved):
                told: str = node.all_gather_object(problem)[reader]
                raise BadRequestError(
                    told
                    or f"model: {source} cannot be used: its weights {name} are not finite, or overflow "
                    f"{str(moved.dtype).removeprefix('torch.')}"
                )
            replace(model, name, moved)

        for position, names in enumerate(parts):
            for name in names:
                move(name)
            if position == len(blocks):
                break
            change(blocks[position])
            if offload is not None:
                offload.add(blocks[position], position)
            elif shares is not None:
                shares.shard(blocks[position])
    return offload or shares or WholeWeights()


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
