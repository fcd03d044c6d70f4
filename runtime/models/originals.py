"""Original weights of a loaded module, kept aside while others are in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from runtime.errors import BadRequestError
from runtime.models.loading import replace
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import Weights, whole_of


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a module, whose weights may be sharded, elsewhere, or in another form.

    Attributes:
        modules: the blocks.
        weights: where their weights are.
        empty: makes the module anew without weights, and with its blocks as they are read.
        change: what is done to each block that is read, whole and on the device, such as quantisation.
    """

    modules: Sequence[nn.Module]
    weights: Weights
    empty: Callable[[], nn.Module]
    change: Callable[[nn.Module], None]


class Originals:
    """Weights of a loaded module as its files have them.

    The first rank of each machine keeps those that were ever changed in host memory: as they were on the
    device, if that is to the bit what was read, else read again from the files. A block in another form is
    made anew of all of its weights, which are kept.

    Args:
        module: the module as this rank has it.
        blocks: its blocks.
        read_as: each weight as it was read, without its values.
        ranks: all ranks that have it.
        read: reads the module from its files on the CPU; called on the first rank of a machine.
        changed: weights that were changed before they came to the device; known to that rank alone.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Blocks,
        read_as: Mapping[str, torch.Tensor],
        ranks: Ranks,
        read: Callable[[], nn.Module],
        changed: Collection[str] = (),
    ):
        self._module, self._blocks, self._read_as = module, blocks, read_as
        self._ranks, self._read = ranks, read
        self._lost, self._kept = set(changed), dict[str, torch.Tensor]()
        own = {id(block) for block in blocks.modules}
        self._prefixes = {f"{name}.": one for name, one in module.named_modules() if id(one) in own}

    @property
    def bytes(self) -> int:
        """Bytes of what this rank keeps."""
        return sum(one.numel() * one.element_size() for one in self._kept.values())

    def keep(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Keep these weights aside, unless they are already; collective.

        Call it before they are changed for the first time.

        Args:
            names: names of parameters; those that the first rank gives count.

        Returns:
            What is kept, whole and on the CPU, by name; nothing on ranks that are not the first of a machine.

        Raises:
            BadRequestError: the files cannot be read again; raised on every rank.
        """
        new = [name for name in self._needed(names) if name not in self._kept]
        from_files = bool(self._lost & {*new}) or not all(map(self._is_exact, new))
        new, from_files = self._ranks.control.all_gather_object([new, from_files])[0]
        if from_files:
            self._keep_from_files(new)
        else:
            self._keep_from_device(new)
        return self._kept

    def _keep_from_device(self, names: Sequence[str]) -> None:
        for name in names:
            whole = whole_of(self._module.get_parameter(name), self._ranks.everyone)
            if self._ranks.node.rank == 0:
                self._kept[name] = self._to_host(name, whole)

    def _keep_from_files(self, names: Sequence[str]) -> None:
        problem = ""
        if self._ranks.node.rank == 0:
            try:
                with self._ranks.busy("reading original weights"):
                    source = self._read()
                    self._kept |= {name: self._to_host(name, source.get_parameter(name)) for name in names}
            except BadRequestError as error:
                problem = str(error)
        self._ranks.refuse_together(problem)

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite weights on every rank, in place; collective.

        Args:
            values: name of a parameter → its new values, whole, in the dtype that it was read in; those of
                the first rank of each machine count.
        """
        names = self._ranks.control.all_gather_object(sorted(values))[0]
        empty = None
        for prefix, group in self._by_block(self._needed(names)).items():
            moved = {name.removeprefix(prefix): self._moved(name, values) for name in group}
            if not prefix:
                with torch.no_grad():
                    for name, weight in moved.items():
                        self._module.get_parameter(name).copy_(weight)
                continue
            if self._is_remade(prefix):
                empty = empty or self._blocks.empty()
                moved = self._remade(empty.get_submodule(prefix.removesuffix(".")), moved)
            self._blocks.weights.write(self._prefixes[prefix], moved)

    def _remade(self, empty: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of a block in its other form."""
        block = deepcopy(empty)
        for name, weight in weights.items():
            replace(block, name, weight)
        self._blocks.change(block)
        return {name: weight.detach() for name, weight in block.named_parameters()}

    def _by_block(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group names by the prefix of their block; it is empty for those that are in none."""
        groups = defaultdict[str, list[str]](list)
        for name in names:
            groups[next((one for one in self._prefixes if name.startswith(one)), "")].append(name)
        return groups

    def _is_remade(self, prefix: str) -> bool:
        """Return whether a block is in another form than that in which it was read."""
        read = {name.removeprefix(prefix) for name in self._read_as if name.startswith(prefix)}
        return bool(prefix) and read != {name for name, _ in self._prefixes[prefix].named_parameters()}

    def _needed(self, names: Sequence[str]) -> list[str]:
        """Add all weights of blocks that are made anew."""
        needed = dict.fromkeys(names)
        for prefix in self._by_block(names):
            if self._is_remade(prefix):
                needed |= dict.fromkeys(name for name in self._read_as if name.startswith(prefix))
        return [*needed]

    def _moved(self, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A weight's new values on this rank's device, from the first rank of the machine."""
        device = self._ranks.device
        if self._ranks.node.rank == 0:
            moved = (values[name] if name in values else self._kept[name]).to(device)
        else:
            moved = torch.empty_like(self._read_as[name], device=device)
        self._ranks.node.broadcast(moved)
        return moved

    def _is_exact(self, name: str) -> bool:
        """Return whether a weight on the device has the bits that were read, or more."""
        if any(name.startswith(prefix) and self._is_remade(prefix) for prefix in self._prefixes):
            return False
        now, read = self._module.get_parameter(name).dtype, self._read_as[name].dtype
        return now == read or now.itemsize > read.itemsize

    def _to_host(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        pinned = self._ranks.device.type == "cuda"
        kept = torch.empty(weight.shape, dtype=self._read_as[name].dtype, pin_memory=pinned)
        return kept.copy_(weight.detach())
