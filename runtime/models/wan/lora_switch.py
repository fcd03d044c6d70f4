"""Switching of LoRAs in loaded transformers: nothing is loaded again, and nothing is subtracted.

The first rank of each machine merges on the CPU, with the code that merges while a model is loaded, into
copies of the original weights. Every rank then overwrites its own: the bits are those of a fresh load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from runtime.errors import BadRequestError
from runtime.models.folder import ModelFolder
from runtime.models.loading import empty_component, is_finite, read_component, replace
from runtime.models.originals import Blocks, Originals
from runtime.models.wan.adapter import Transformer, every_block
from runtime.models.wan.experts import HIGH_NOISE, LOW_NOISE
from runtime.models.wan.lora import first_of
from runtime.models.wan.lora_merge import LoraWeights
from runtime.parallel.ranks import Ranks
from runtime.parallel.sharding import Weights

_NOISE = {HIGH_NOISE: "high", LOW_NOISE: "low"}  # component → its name in `Lora.expert`


def open_loras(folder: ModelFolder, ranks: Ranks) -> tuple[LoraWeights, ...]:
    """Read the folder's LoRA files, each once; nothing on ranks that are not the first of a machine.

    Raises:
        BadRequestError: one of them has changed since it was checked.
    """
    return tuple(map(LoraWeights.open, folder.loras)) if ranks.node.rank == 0 else ()


def loras_of(component: str, loras: Sequence[LoraWeights]) -> list[LoraWeights]:
    """The LoRAs that are for one of a model's transformers."""
    return [one for one in loras if one.file.lora.expert in (None, _NOISE[component])]


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """Weights of a transformer, as they were when they were read and its LoRAs merged.

    Attributes:
        kept: storage dtype that was asked for.
        empty: each weight, without its values; some are kept in float32 whatever was asked for.
        changed: names of those that LoRAs changed; known on the first rank of a machine alone.
        change: what is done to each block on the device afterwards, such as quantisation.
    """

    kept: torch.dtype
    empty: Mapping[str, torch.Tensor]
    changed: frozenset[str]
    change: Callable[[nn.Module], None]


class WanLoras:
    """LoRAs of a loaded model; see `runtime.models.family.Loras`.

    Args:
        ranks: the ranks that have the model.
        folder: the model.
    """

    def __init__(self, ranks: Ranks, folder: ModelFolder):
        self._ranks, self._folder, self.merged = ranks, folder, folder.revision
        self._transformers: list[_Switched] = []

    def add(self, component: str, model: Transformer, weights: Weights, read: ReadWeights) -> None:
        """Take in a transformer that was loaded with the folder's LoRAs.

        Args:
            component: name of its folder.
            model: the transformer.
            weights: where the weights of its blocks are.
            read: how its weights were read.
        """
        self._transformers.append(_Switched(self._ranks, self._folder, component, model, weights, read))

    def switch(self, folder: ModelFolder) -> None:
        ranks, loras, problem = self._ranks, tuple[LoraWeights, ...](), ""
        ranks.synchronize()  # what is queued may still change weights in host memory
        try:
            with ranks.busy("reading LoRA files"):
                loras = open_loras(folder, ranks)
        except BadRequestError as error:
            problem = str(error)
        ranks.refuse_together(problem)
        merged = [one.merge(loras_of(one.component, loras)) for one in self._transformers]
        ranks.refuse_together(next((one.problem for one in merged if one.problem), ""))
        self.merged = ""
        for transformer, weights in zip(self._transformers, merged, strict=True):
            transformer.put(weights)
        ranks.synchronize()
        self.merged = folder.revision

    @property
    def host_bytes(self) -> int:
        """Bytes of original weights that this rank keeps in host memory."""
        return sum(one.originals.bytes for one in self._transformers)


@dataclass(frozen=True, slots=True)
class _Merged:
    """Outcome of merging, on the first rank of a machine; empty on others.

    Attributes:
        weights: new values of all weights that are to be overwritten, by name.
        changed: names of those that differ from the original ones.
        problem: why it failed; empty if it did not.
    """

    weights: Mapping[str, torch.Tensor]
    changed: frozenset[str] = frozenset()
    problem: str = ""


class _Switched:
    """A transformer whose LoRAs are switched."""

    def __init__(
        self,
        ranks: Ranks,
        folder: ModelFolder,
        component: str,
        model: Transformer,
        weights: Weights,
        read: ReadWeights,
    ):
        self.component, self._ranks, self._folder = component, ranks, folder
        self._kind, self._kept, self._changed = type(model), read.kept, read.changed
        self.originals = Originals(
            model,
            Blocks(every_block(model), weights, self._empty, read.change),
            read.empty,
            ranks,
            self._read,
            read.changed,
        )

    def _empty(self) -> Transformer:
        return empty_component(self._kind, self._folder, self.component)

    def _read(self) -> Transformer:
        self._folder.check_unchanged()
        return read_component(self._kind, self._folder, self.component, self._kept)

    def merge(self, loras: Sequence[LoraWeights]) -> _Merged:
        """Merge LoRAs into copies of the original weights; collective. The device's stay as they are."""
        new = {name for lora in loras for name in lora.changed}
        kept = self.originals.keep(sorted(new | self._changed))
        restored = {name: kept[name] for name in self._changed}
        if not loras:
            return _Merged(restored)
        try:
            with self._ranks.busy("merging LoRAs"):
                merged = self._merge_into(kept, sorted(new), loras)
        except BadRequestError as error:
            return _Merged({}, problem=str(error))
        return _Merged(restored | merged, frozenset(new))

    def _merge_into(
        self, kept: Mapping[str, torch.Tensor], names: Sequence[str], loras: Sequence[LoraWeights]
    ) -> dict[str, torch.Tensor]:
        model = self._empty()
        for name in names:
            replace(model, name, kept[name].clone())
        for lora in loras:
            lora.merge(model)
        merged = {name: model.get_parameter(name).detach() for name in names}
        broken = [name for name, weight in merged.items() if not is_finite(weight)]
        if broken:
            files, dtype = ", ".join(one.file.lora.file for one in loras), merged[broken[0]].dtype
            raise BadRequestError(
                f"lora: {files!r} given; {first_of(broken)} would not be finite, or overflow "
                f"{str(dtype).removeprefix('torch.')}"
            )
        return merged

    def put(self, merged: _Merged) -> None:
        """Overwrite weights on every rank; collective."""
        self._changed |= merged.changed  # until all are in place
        self.originals.put(merged.weights)
        self._changed = merged.changed
