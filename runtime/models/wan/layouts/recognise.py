"""Recognises Wan's models in files of other layouts, by the shapes and names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.files.text import read_json
from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.given import Given, WeightSet
from runtime.models.layouts.weights import Component
from runtime.models.wan.layouts.image import find_image_encoder
from runtime.models.wan.layouts.index import other_settings
from runtime.models.wan.layouts.text import find_text_encoder
from runtime.models.wan.layouts.tokenizer import tokenizer_files
from runtime.models.wan.layouts.transformer import find_transformer
from runtime.models.wan.layouts.vae import find_vae

_HIGH, _LOW = (re.compile(rf"(?<![a-z]){noise}(?![a-z])", re.IGNORECASE) for noise in ("high", "low"))
_EXPERTS = ("transformer", "transformer_2")
_NEEDED = ("transformer", "vae", "text_encoder")
_FINDERS: tuple[Callable[[WeightSet], Component | None], ...] = (
    lambda one: find_transformer(one.tensors, _stated(one.folder)),
    lambda one: find_vae(one.tensors),
    lambda one: find_text_encoder(one.tensors),
    lambda one: find_image_encoder(one.tensors),
)


@dataclass(frozen=True, slots=True)
class _Found:
    """A component, and the file that it is in."""

    source: WeightSet
    component: Component


def recognise(given: Given) -> Adopted | None:
    """Recognise a model of Wan in weight files; None if no file holds a transformer of Wan.

    Raises:
        OSError, ValueError: it is incomplete, or not clear; the message says what was seen.
    """
    found = [one for source in given.readable() for one in _components(source)]
    if not any(one.component.name in _EXPERTS for one in found):
        return None
    chosen = _chosen(found)
    missing = [name for name in _NEEDED if name not in chosen]
    takes_image = chosen["transformer"].component.settings.get("image_dim") is not None
    if takes_image and "image_encoder" not in chosen:
        missing.append("image_encoder")
    if missing:
        raise ValueError(f"it holds no {' and no '.join(missing)}; found: {given.seen()}")
    if not takes_image:
        chosen.pop("image_encoder", None)
    components = [one.component for one in chosen.values()]
    settings = other_settings({one.name: one.settings for one in components})
    return Adopted(components, settings, tokenizer_files(given, chosen["text_encoder"].source))


def _components(source: WeightSet) -> list[_Found]:
    """Find the components in a file; one that was named must hold what it was named for.

    Raises:
        ValueError: it holds something else, or a component of a kind that is not known.
    """
    try:
        components = [one for find in _FINDERS if (one := find(source)) is not None]
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    if not source.role:
        return [_Found(source, one) for one in components]
    wanted = "transformer" if source.role in _EXPERTS else source.role
    fitting = [replace(one, name=source.role) for one in components if one.name == wanted]
    if not fitting:
        raise ValueError(f"{source.role}: {source.seen()}, which is not Wan's {wanted}")
    return [_Found(source, fitting[0])]


def _chosen(found: list[_Found]) -> dict[str, _Found]:
    """Choose one of each component; of two transformers one is for high noise, the other for low.

    Raises:
        ValueError: there are several.
    """
    chosen: dict[str, _Found] = {}
    for name in (*_EXPERTS, *_NEEDED[1:], "image_encoder"):
        candidates = [one for one in found if one.component.name == name]
        if name == "transformer" and len(candidates) == 2:
            chosen |= _experts(candidates)
        elif len(candidates) > 1:
            files = ", ".join(one.source.name for one in candidates)
            raise ValueError(
                f"it holds {len(candidates)} files for the {name}: {files}; name the files of one model, as "
                "docs/models.md says"
            )
        elif candidates:
            chosen[name] = candidates[0]
    if "transformer" not in chosen:
        raise ValueError(
            "transformer_2 is named without transformer; name the only transformer `transformer`"
        )
    return chosen


def _experts(pair: list[_Found]) -> dict[str, _Found]:
    """Tell Wan2.2's two experts, which have the same shapes, by the names of their files or folders.

    Raises:
        ValueError: their names do not say which is which.
    """
    high = [one for one in pair if _HIGH.search(one.source.name) and not _LOW.search(one.source.name)]
    low = [one for one in pair if _LOW.search(one.source.name) and not _HIGH.search(one.source.name)]
    if len(high) != 1 or len(low) != 1:
        files = ", ".join(one.source.name for one in pair)
        raise ValueError(
            f"it holds two transformers: {files}; their names should have `high_noise` and `low_noise`, or "
            "name the files of one model, as docs/models.md says"
        )
    second = replace(low[0], component=replace(low[0].component, name="transformer_2"))
    return {"transformer": high[0], "transformer_2": second}


def _stated(folder: Path) -> Mapping[str, Any]:
    """Settings of a transformer that are stated beside its file; empty if there are none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        stated = read_json(file)
    except ValueError:
        return {}  # of something else, perhaps: a folder of single files has no config.json of its own
    return stated if "num_heads" in stated or "num_attention_heads" in stated else {}
