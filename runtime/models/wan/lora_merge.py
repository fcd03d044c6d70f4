"""Merging of LoRA weights into a transformer.

Merged weights cost nothing per step, and nothing else (ranks, sharding, forecasts) depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from safetensors.torch import load

from runtime.models.loras import KnownLora
from runtime.models.wan.adapter import Transformer
from runtime.models.wan.lora import LoraFile, content_of, converted, digest_of, first_of, read_lora
from runtime.models.wan.lora_names import difference_of, with_prefix
from runtime.models.wan.lora_settings import LoraSettings


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """Weights of a LoRA file in memory, which can be merged into several transformers.

    Attributes:
        file: what was checked.
        settings: settings in the file's header; None if it has none.
        pairs: pairs of matrices, under diffusers' names.
        differences: parameter of the transformer → what is added to it as a whole.
    """

    file: LoraFile
    settings: LoraSettings | None
    pairs: Mapping[str, torch.Tensor]
    differences: Mapping[str, torch.Tensor]

    @classmethod
    def open(cls, known: KnownLora) -> Self:
        """Read a LoRA file that was checked.

        Raises:
            BadRequestError: it has changed since.
        """
        file, content = read_lora(known.lora), content_of(known.lora.file)
        if not known.digest == file.digest == digest_of(content):
            raise file.refusal("the file has changed since it was checked")
        given = with_prefix(load(content))
        differences = {difference_of(name) or "": given[name] for name in file.differences}
        return cls(file, LoraSettings.read(content), converted(given), differences)

    @property
    def changed(self) -> set[str]:
        """Names of the transformer's parameters that it changes."""
        names = set(self.differences)
        for module, parts in self.file.modules.items():
            names |= {f"{module}.weight"} | ({f"{module}.bias"} if "lora_B.bias" in parts else set())
        return names

    def merge(self, model: Transformer) -> None:
        """Add `scale` times the LoRA to the weights that it is for, in place.

        Args:
            model: transformer in any dtype, on the CPU. Weights that are not `changed` may be anywhere.

        Raises:
            BadRequestError: it is for another model.

        Source: diffusers' `WanLoraLoaderMixin`, which reads the formats, and its PEFT adapters, which merge
        them.
        """
        self.file.check({name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
        if self.pairs:
            self._merge_pairs(model)
        for name, difference in self.differences.items():
            _add(model.get_parameter(name), difference, self.file.lora.scale)

    def _merge_pairs(self, model: Transformer) -> None:
        file = self.file
        bias = any("lora_B.bias" in parts for parts in file.modules.values())
        told = None if self.settings is None else self.settings.for_peft(file.modules, bias=bias)
        try:
            model.load_lora_adapter(
                dict(self.pairs), prefix="transformer", adapter_name="lora", metadata=told
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
        ) as error:  # the ranks in its metadata are not those of its weights
            said = str(error).strip().splitlines()
            raise file.refusal(
                f"it does not fit the model: {said[-1].strip() if said else error!r}"
            ) from None
        unused = [
            name for name in file.modules if "lora" not in getattr(model.get_submodule(name), "lora_A", {})
        ]
        if unused:
            raise file.refusal(
                f"its metadata excludes the weights of {len(unused)} modules: {first_of(unused)}"
            )
        model.fuse_lora(lora_scale=file.lora.scale, adapter_names=["lora"])
        model.unload_lora()


@torch.no_grad()
def _add(parameter: torch.Tensor, difference: torch.Tensor, scale: float) -> None:
    """Add a difference to a parameter; the sum is computed in float32 and rounded once."""
    parameter.copy_(parameter.float() + scale * difference.float().view_as(parameter))
