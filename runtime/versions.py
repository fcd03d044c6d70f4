"""What a result depends on beside its request: versions of Lockstep's code and of the libraries it uses."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import runtime
import spectrum

# What of runtime/ has a part in a video's frames.
_MAKE_FRAMES = (
    "engine.py",
    "forecasting",
    "media",
    "models",
    "parallel",
    "profile.py",
    "recipe.py",
    "request",
    "sampling",
)
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Name → version, of Lockstep, Python and the libraries."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"lockstep": code_version(), "python": platform.python_version(), **libraries}


@cache
def code_version() -> str:
    """Such as `0.1.0+1f0e9c2ab37d`: the version, and a digest of the code that makes frames.

    The digest tells two checkouts of one version apart. The code of films, reports and commands is not in it:
    a change there makes no other frames.
    """
    assert runtime.__file__ is not None and spectrum.__file__ is not None
    home = Path(runtime.__file__).parent
    parts = [*(home / name for name in _MAKE_FRAMES), Path(spectrum.__file__).parent]
    return f"{version('lockstep-video')}+{source_digest(parts)[:12]}"


def source_digest(parts: Iterable[Path]) -> str:
    """SHA-256 of Python files and those in folders: of their names there and of what they hold."""
    digest = hashlib.sha256()
    for place in parts:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for part in (path.relative_to(place.parent).as_posix().encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
