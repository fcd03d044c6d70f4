"""Tables and the plot of docs/quality.md."""

from pathlib import Path
from typing import Any


def write_document(results: list[dict[str, Any]], out: Path) -> None:
    print(len(results))
