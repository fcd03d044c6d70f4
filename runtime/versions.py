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

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Name → version, of Lockstep, Python and the libraries."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"lockstep": code_version(), "python": platform.python_version(), **libraries}


@cache
def code_version() -> str:
    """Such as `0.1.0+1f0e9c2ab37d`: the version, and a digest of the code that makes frames.

    The digest tells two checkouts of one version apart.
    """
    packages = [Path(package.__file__).parent for package in (runtime, spectrum) if package.__file__]
    return f"{version('lockstep-video')}+{source_digest(packages)[:12]}"


def source_digest(packages: Iterable[Path]) -> str:
    """SHA-256 of the Python files in folders: of their names in them and of what they hold."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            for part in (path.relative_to(package.parent).as_posix().encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
