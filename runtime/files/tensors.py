"""Writing tensors to files, with a clear error for a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.files.atomic import PlainFile


def save_tensors(content: Any, path: Path) -> None:
    """Save tensors as `torch.save` does, but report a full disk as such.

    Raises:
        OSError: the file cannot be written.
    """
    with PlainFile(path, "w") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise file.error or error from None
