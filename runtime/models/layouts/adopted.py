"""A model in another layout, as the folder in diffusers layout that it amounts to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.models.layouts.weights import Component


@dataclass(frozen=True, slots=True)
class Adopted:
    """A model that was recognised in files of another layout.

    Attributes:
        components: its components with weights.
        settings: path in diffusers layout → content of the other JSON files.
        files: path in diffusers layout → file that is there as it is, or its content.
    """

    components: Sequence[Component]
    settings: Mapping[str, object]
    files: Mapping[str, Path | bytes]
