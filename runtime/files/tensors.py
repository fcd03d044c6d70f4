"""Writes tensors to files, and says of a full disk that it is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.files.atomic import PlainFile


def save_tensors(content: Any, path: Path) -> None:
    """As `torch.save`, which says something else of a full disk than that it is full.

    Raises:
        OSError: it cannot be written.
    """
    with PlainFile(path, "w") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise file.error or error from None
