"""Registry of model families, by the class of a model's pipeline in `model_index.json`.

A family is imported when it is requested, so that a lookup alone does not import diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.given import Given
from runtime.models.settings import ModelIndex

if TYPE_CHECKING:  # it takes seconds
    from runtime.models.family import Family

_FAMILIES = {
    "WanPipeline": "runtime.models.wan.family:WAN",
    "WanImageToVideoPipeline": "runtime.models.wan.family:WAN",
    "WanVACEPipeline": "runtime.models.wan.family:WAN",
}


def register(pipeline: str, family: str) -> None:
    """Register a family for a pipeline.

    Args:
        pipeline: class of the pipeline in diffusers.
        family: location of the `Family` object, as `package.module:NAME`.

    Raises:
        ValueError: another family has that pipeline.
    """
    if _FAMILIES.setdefault(pipeline, family) != family:
        raise ValueError(f"{pipeline} belongs to the family {_FAMILIES[pipeline]}")


def find_family(pipeline: str) -> Family:
    """Find the family of a pipeline class.

    Raises:
        ValueError: there is none.
    """
    if pipeline not in _FAMILIES:
        raise ValueError(f"it is a {pipeline}; supported are {', '.join(_FAMILIES)}")
    return _load(_FAMILIES[pipeline])


def family_in(folder: Path) -> tuple[Family, str]:
    """Find the family of the model in a folder, and the class of its pipeline.

    Raises:
        OSError, ValueError: there is no model in diffusers layout, or its family is unknown.
    """
    pipeline = ModelIndex.read(folder / "model_index.json").pipeline
    return find_family(pipeline), pipeline


def adopt(given: Given) -> Adopted | None:
    """Ask every family to recognise a model in weight files of another layout; None if none does.

    Raises:
        OSError, ValueError: one recognises a model that is incomplete or not supported.
    """
    return next((model for family in families() if (model := family.adopt(given)) is not None), None)


def families() -> Iterator[Family]:
    """Yield all families, each once; Wan, which every shipped config is for, is the first."""
    for family in dict.fromkeys(_FAMILIES.values()):
        yield _load(family)


def _load(family: str) -> Family:
    module, _, name = family.partition(":")
    return cast("Family", getattr(import_module(module), name))
