"""Files of prompts, one on each line."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.errors import BadRequestError
from runtime.files.text import read_text


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without white space around them.

    Raises:
        BadRequestError: it cannot be read, or is not text.
    """
    return [line.strip() for line in re.split(r"\r\n|\n|\r", read_text(path, "prompts"))]


def read_prompts(path: Path) -> dict[int, str]:
    """Read one prompt per line: line number → prompt. Blank lines and lines that begin with # are skipped.

    Raises:
        BadRequestError: there is no prompt, or the file is not text.
    """
    lines = enumerate(read_lines(path), 1)
    prompts = {number: line for number, line in lines if line and not line.startswith("#")}
    if not prompts:
        raise BadRequestError(f"prompts: {str(path)!r} given; it has no prompts, write one per line")
    return prompts
