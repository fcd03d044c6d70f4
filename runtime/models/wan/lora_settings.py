"""Ranks and alphas of a LoRA, which diffusers' trainers store in the header of its file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runtime.files.problems import explain, shown

_METADATA = "lora_adapter_metadata"
_PREFIX = "transformer."
_TRAINING = (  # how it was trained, and which modules it is for, which the names of its weights tell as well
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias",
    "lora_dropout", "lora_ga_config", "peft_version", "revision", "runtime_config", "target_modules",
    "task_type",
)  # fmt: skip
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # other ways change the model's own weights
_NOTHING: tuple[object, ...] = (None, False, "", [], {})


def _pattern(name: str) -> str:
    try:
        re.compile(name)
    except re.error as error:
        raise ValueError(f"{name!r} is not a regular expression: {error}") from None
    return name


_Rank = Annotated[int, Field(ge=1, le=65536, strict=True)]
_Alpha = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False, strict=True)]
_Pattern = Annotated[str, AfterValidator(_pattern)]


class LoraSettings(BaseModel):
    """Settings that change what a LoRA adds to a model; fields as in `peft.LoraConfig`."""

    model_config = ConfigDict(frozen=True)

    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[_Pattern, _Rank] = {}
    alpha_pattern: dict[_Pattern, _Alpha] = {}
    use_rslora: Annotated[bool, Field(strict=True)] = False

    @classmethod
    def read(cls, content: bytes) -> LoraSettings | None:
        """Read the settings in a safetensors file; None if it has none.

        Args:
            content: content of the file.

        Raises:
            ValueError: they are damaged or not supported.
        """
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        if _METADATA not in header:
            return None
        told = json.loads(header[_METADATA])
        if not isinstance(told, dict):
            raise ValueError(f"{_METADATA} is not an object")  # noqa: TRY004 of a file
        own = {name.removeprefix(_PREFIX): value for name, value in told.items() if name.startswith(_PREFIX)}
        if not own:
            bare = [name for name in told if "." not in name]
            if bare:
                raise ValueError(f"{_METADATA} has {shown(bare[0])}; its names must begin with {_PREFIX}")
            return None  # it is for another part of a pipeline
        _refuse_unsupported(own)
        try:
            return cls.model_validate(
                {name: own[name] for name in cls.model_fields if own.get(name) is not None}
            )
        except ValidationError as error:
            raise ValueError("; ".join(f"{_METADATA}: {explain(error)}".splitlines())) from None

    def for_peft(self, modules: Iterable[str], *, bias: bool) -> dict[str, Any]:
        """Make the metadata that `load_lora_adapter` takes.

        Args:
            modules: modules of the LoRA.
            bias: whether it has biases.
        """
        own = self.model_dump() | {"target_modules": sorted(modules), "lora_bias": bias}
        return {f"{_PREFIX}{name}": value for name, value in own.items()}


def _refuse_unsupported(own: Mapping[str, Any]) -> None:
    """Refuse settings that are not supported and differ from PEFT's defaults.

    Raises:
        ValueError: there is one.
    """
    from peft import LoraConfig

    defaults: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    usual = {name: getattr(value, "value", value) for name, value in defaults.items()}
    for name, value in own.items():
        if name in LoraSettings.model_fields or name in _TRAINING or value in _NOTHING:
            continue
        if name == "init_lora_weights" and value in _INITIAL:
            continue
        if name not in usual or value != usual[name]:
            raise ValueError(f"{_METADATA} has {name}: {shown(value)}, which is not supported")
