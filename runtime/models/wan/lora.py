"""Files of LoRA weights: low-rank ones, and differences of whole ones.

Either every weight of a file is used, or the file is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from runtime.errors import BadRequestError, reason
from runtime.models.loras import check_lora_file, lora_refusal
from runtime.models.wan.lora_names import PREFIXES, difference_of, with_prefix
from runtime.models.wan.lora_settings import LoraSettings
from runtime.request.config import Lora

_PARTS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")  # of names, in the formats that diffusers reads
_ADAPTER = re.compile(r"(\.lora_[AB])\.(\w+)\.(weight|bias)$")  # names of PEFT's own files
_WEIGHT = re.compile(r"^transformer\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)$")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file that was checked, with weights under diffusers' names.

    Attributes:
        lora: the file and the scale of its weights.
        digest: digest of the file's content.
        modules: module such as `blocks.0.attn1.to_q` → part such as `lora_A.weight` → shape.
        differences: name in the file of a difference that is added to a whole parameter → its shape.
    """

    lora: Lora
    digest: str
    modules: Mapping[str, Mapping[str, tuple[int, ...]]]
    differences: Mapping[str, tuple[int, ...]]

    def check(self, model: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the LoRA fits a model and that each module has both of its matrices.

        Args:
            model: names and shapes of the transformer's weights.

        Raises:
            BadRequestError: a weight is for another model, or one of a pair is missing.
        """
        modules = self.modules
        strangers = [name for name in modules if f"{name}.weight" not in model]
        if strangers:
            raise self.refusal(
                f"it does not fit the model, which has no {first_of(strangers)} "
                f"({len(strangers)} of its {len(modules)} modules)"
            )
        for name, parts in modules.items():
            for part in ("lora_A.weight", "lora_B.weight"):
                if part not in parts:
                    raise self.refusal(f"{name}.{part} is missing")
            down, up, wanted = parts["lora_A.weight"], parts["lora_B.weight"], model[f"{name}.weight"]
            bias = parts.get("lora_B.bias", up[:1])
            fits = down[1:] == wanted[1:] and up[:1] == wanted[:1] == bias[:1]
            if not fits or up[1] != down[0]:
                raise self.refusal(
                    f"it does not fit the model: {name} has shape {list(wanted)}, "
                    f"its lora_A {list(down)} and its lora_B {list(up)}"
                )
        for name, shape in self.differences.items():
            target = model.get(difference_of(name) or "")
            if target is None or math.prod(shape) != math.prod(target):
                has = "none" if target is None else f"one of shape {list(target)}"
                raise self.refusal(
                    f"it does not fit the model: {name} of shape {list(shape)} is for a weight of which the "
                    f"model has {has}"
                )

    def refusal(self, problem: str) -> BadRequestError:
        """Error that names the file and a problem with it."""
        return lora_refusal(self.lora.file, problem)


def read_lora(lora: Lora) -> LoraFile:
    """Read and check a safetensors file of LoRA weights in any trainer's format.

    A file is read only once, unless it changes.

    Raises:
        BadRequestError: there is no such file, it holds no LoRA, or a part of it would not be used.
    """
    try:
        now = Path(lora.file).stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        content_of(lora.file)  # says why
        raise
    checked = _checked(lora.file, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))
    return LoraFile(lora, checked.digest, checked.modules, checked.differences)


@dataclass(frozen=True, slots=True)
class _Checked:
    """Digest, modules and differences of a file that was checked; see `LoraFile`."""

    digest: str
    modules: Mapping[str, Mapping[str, tuple[int, ...]]]
    differences: Mapping[str, tuple[int, ...]]


@lru_cache(maxsize=256)
def _checked(file: str, state: tuple[int, ...]) -> _Checked:
    """Read and check a file.

    Args:
        file: the file.
        state: its inode, size and times; cached results are for this state alone.
    """
    content = content_of(file)
    try:
        weights = with_prefix(load(content))
    except (SafetensorError, ValueError) as error:
        raise lora_refusal(file, f"it is not a safetensors file: {reason(error)}") from None
    if problem := _unsupported(weights):
        raise lora_refusal(file, problem)
    try:
        found = converted(weights)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise lora_refusal(file, f"diffusers cannot read it: {reason(error)[:200]}") from None
    unused = [name for name in _unused(weights) if weights[name].count_nonzero()]  # zeros change nothing
    differences = {name: tuple(weights[name].shape) for name in unused if difference_of(name) is not None}
    if lost := [name for name in unused if name not in differences]:
        raise lora_refusal(file, f"{len(lost)} of its weights would not be used: {first_of(lost)}")
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in found.items():
        match = _WEIGHT.match(name)
        if match is None:
            raise lora_refusal(file, f"{name} is not a LoRA weight of a known format")
        modules.setdefault(match[1], {})[match[2]] = tuple(value.shape)
    try:
        LoraSettings.read(content)
    except (ValueError, RecursionError) as error:
        raise lora_refusal(file, f"its metadata cannot be read: {reason(error)}") from None
    return _Checked(digest_of(content), modules, differences)


def digest_of(content: bytes) -> str:
    """Digest of a file's content, as reports and revisions have it."""
    return hashlib.sha256(content).hexdigest()[:16]


def content_of(file: str) -> bytes:
    """Read a file.

    Raises:
        BadRequestError: it cannot be read, or is a folder.
    """
    check_lora_file(file)
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise lora_refusal(file, f"it cannot be read: {reason(error)}") from None


def _unsupported(weights: Mapping[str, torch.Tensor]) -> str:
    """Reason why diffusers cannot merge these weights into Wan; empty if it may be able to."""
    dora = [name for name in weights if "dora_scale" in name or "lora_magnitude_vector" in name]
    if dora:
        return f"it is a DoRA, which is not supported ({dora[0]})"
    if not any(part in name for name in weights for part in _PARTS):
        return f"it holds no LoRA weights, but {min(weights, default='nothing')} …"
    others = [name for name in weights if not name.startswith(PREFIXES)]
    if others or len({_prefix(name) for name in weights}) > 1:
        return (
            f"it has {min(others or weights)}; all names must begin with `transformer.` (diffusers), "
            "with `diffusion_model.` (ComfyUI) or with `lora_unet_` (kohya, musubi-tuner), or with `blocks.`"
        )
    adapters = {match[2] for match in map(_ADAPTER.search, weights) if match}
    if len(adapters) > 1:
        return f"it holds {len(adapters)} adapters ({first_of(list(adapters))}); it must hold one"
    return next(filter(None, (_unreadable(name, value) for name, value in weights.items())), "")


def _unreadable(name: str, value: torch.Tensor) -> str:
    """Reason why a weight's values cannot be used; empty if they can. Alphas may be integers."""
    if not value.is_floating_point() and not name.endswith(".alpha"):
        return f"{name} is stored as {str(value.dtype).removeprefix('torch.')}, which is not read"
    return "" if value.float().isfinite().all() else f"{name} has values that are not finite"


def _prefix(name: str) -> str:
    return next(prefix for prefix in PREFIXES if name.startswith(prefix))


def converted(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert pairs of matrices to diffusers' names, scaled by the alphas beside them."""
    from diffusers import WanPipeline

    given = {_without_adapter(name): value for name, value in weights.items()}
    found: dict[str, torch.Tensor] = WanPipeline.lora_state_dict(given)
    return found


def _without_adapter(name: str) -> str:
    """Name as diffusers' own trainers write it, and its converters read it."""
    bare = _ADAPTER.sub(r"\1.\3", name)
    if not name.startswith("transformer."):
        return bare
    return bare.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


def _unused(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of weights that diffusers silently ignores.

    They are found by converting a file in which each weight is a number of its own. An alpha counts as used
    with the weights that it scales.
    """
    names = dict(enumerate(weights, start=2))  # 1 is used in matrices that the conversion fills in
    numbered = {
        name: torch.tensor(1.0) if name.endswith(".alpha") else torch.full((1, 1), float(number))
        for number, name in names.items()
    }
    arrived = {int(value.flatten()[0]) for value in converted(numbered).values() if value.numel()}
    used = {name for number, name in names.items() if number in arrived}
    modules = {re.split(r"\.lora_|\.diff", name)[0] for name in used}
    return [
        name
        for name in weights
        if name not in used and not (name.endswith(".alpha") and name.removesuffix(".alpha") in modules)
    ]


def first_of(names: list[str]) -> str:
    """Join the first few names."""
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more
