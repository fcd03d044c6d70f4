"""Validity of a calibration: in what the conditions of a use differ from those it was made under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESOLUTION = 2.0  # factor of pixels up to which two videos are of the same class
_COMPARED = ("pipeline", "revision", "sampler", "steps", "guidance", "guidance_2", "boundary")


def differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Say in what `other` differs from the conditions `own` of a calibration, as "steps 50, not 28".

    A condition counts if both have it. Models of another name are the same if their weights are, and settings
    of a sampler that only one of two versions has are not compared.
    """
    names = [name for name in _COMPARED if name in own and name in other]
    if own.get("revision") != other.get("revision"):
        names.insert(0, "model")
    found = [
        f"{name} {own[name]!r}, not {other[name]!r}"
        for name in names
        if name in other and own[name] != other[name]
    ]
    if own.get("sampler") == other.get("sampler"):
        settings, given = own.get("settings", {}), other.get("settings", {})
        found += [
            f"sampler.{name} {settings[name]}, not {given[name]}"
            for name in sorted(settings.keys() & given.keys())
            if settings[name] != given[name]
        ]
    return found


def sizes_differ(own: float, other: float) -> bool:
    """Whether two sizes, in numbers or pixels, are of different classes."""
    return max(own, other) > _RESOLUTION * min(own, other)
