"""A model in another layout as a folder in diffusers layout, made in the user's cache folder.

The folder holds settings and the tokenizer; in place of weights there are descriptions of how they are made
(`runtime.models.layouts.sources`). It is small, and named by its content, so it is made only once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from runtime.files.cache import cache_folder
from runtime.models.layouts.adopted import Adopted
from runtime.models.layouts.sources import NAME, Sources


def write_view(model: Adopted) -> Path:
    """Make the folder of a model, unless it is there; return it.

    Raises:
        OSError: it cannot be written.
    """
    content = _content(model)
    digest = hashlib.sha256()
    for name, part in sorted(content.items()):
        digest.update(f"{name}\0{len(part)}\0".encode() + part)
    path = cache_folder() / "models" / digest.hexdigest()[:32]
    if not path.is_dir():
        _write(path, content)
    return path


def is_view(folder: Path) -> bool:
    """Return whether a folder has descriptions in place of weights."""
    return any(folder.glob(f"*/{NAME}"))


def _content(model: Adopted) -> dict[str, bytes]:
    """Make the files of the folder: path → content."""
    content = {name: json.dumps(part, indent=2).encode() for name, part in model.settings.items()}
    content |= {
        name: part if isinstance(part, bytes) else part.read_bytes() for name, part in model.files.items()
    }
    for component in model.components:
        content[f"{component.name}/config.json"] = json.dumps(component.settings, indent=2).encode()
        content[f"{component.name}/{NAME}"] = Sources.of(component).text().encode()
    return content


def _write(path: Path, content: dict[str, bytes]) -> None:
    """Write the folder whole or not at all; another process may write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, part in content.items():
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(part)
        os.chmod(temporary, 0o755)  # noqa: PTH101
        with suppress(OSError):  # another process was faster
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not path.is_dir():
        raise OSError(f"{path} cannot be written")
