"""Sets up logging for every command: to stderr, with the rank if there are several."""

from __future__ import annotations

import logging
import warnings

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler


def set_up_logging(console: Console, *, verbose: bool, rank: int | None = None) -> None:
    """Log warnings; with `verbose`, also info messages and warnings of other libraries."""
    prefix = "" if rank is None else f"rank {rank} "
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format=f"{prefix}%(name)s: %(message)s",
        handlers=[RichHandler(console=console, show_path=False, markup=False, highlighter=NullHighlighter())],
        force=True,
    )
    if not verbose:
        warnings.filterwarnings("ignore", module="diffusers|transformers")
