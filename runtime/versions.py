"""Versions of Lockstep's code and of the libraries it uses, on which a result depends beside its request."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import runtime
import spectrum

# The parts of runtime/ that affect a video's frames.
_MAKE_FRAMES = (
    "engine.py",
    "files/extensions.py",
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
    """Versions of Lockstep, Python and the libraries, by name."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"lockstep": code_version(), "python": platform.python_version(), **libraries}


@cache
def code_version() -> str:
    """Lockstep's version and a digest of the code that makes frames, such as `0.1.0+1f0e9c2ab37d`.

    The digest tells two checkouts of one version apart. The code of films, reports and commands is not part
    of it: a change there does not affect frames.
    """
    assert runtime.__file__ is not None and spectrum.__file__ is not None
    home = Path(runtime.__file__).parent
    parts = [*(home / name for name in _MAKE_FRAMES), Path(spectrum.__file__).parent]
    return f"{version('lockstep-video')}+{source_digest(parts)[:12]}"


def source_digest(parts: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of Python files, given by themselves or by their folder."""
    digest = hashlib.sha256()
    for place in parts:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for part in (path.relative_to(place.parent).as_posix().encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
