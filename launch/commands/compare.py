"""`lockstep compare`: compares presets with the full sampler on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.commands.build_job import build_request, inputs_of
from runtime.measure.compare import FULL, Comparison, against_full
from runtime.models.configs import open_config
from runtime.profile import check_loras


def plan_comparison(
    config: str | None,
    prompts: Sequence[str],
    *,
    model: str | None = None,
    revision: str | None = None,
    presets: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    overwrite: bool,
    **given: Any,
) -> Comparison:
    """Build a comparison from options, checking everything that can be checked before the model loads.

    Raises:
        BadRequestError: a preset, a request or an output file is not acceptable.
    """
    settings = open_config(config, model=model, revision=revision)
    check_loras(settings)
    requests = [
        build_request(settings, prompt, seed=seed, spectrum=FULL, **given)
        for prompt in prompts
        for seed in seeds
    ]
    comparison = Comparison(settings, against_full(presets), requests, out, overwrite)
    comparison.check(inputs_of(config, settings, requests[0]))
    return comparison


def comparison_table(comparison: Comparison) -> Table:
    """Return the rows of a comparison as a table for a terminal."""
    count = len(comparison.requests)
    title = (
        f"{comparison.config.model}: means of {count} videos"
        if count > 1
        else f"{comparison.config.model}: one video"
    )
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("preset", "NFE", "time, s", "speed-up", "expected", "PSNR, dB", "SSIM", "VMAF"):
        first = name == "preset"
        table.add_column(name, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    table.caption = "time of denoising; expected and measured PSNR against the full sampler"
    for row in comparison.rows():
        table.add_row(
            row["preset"],
            f"{row['nfe']:g}/{row['steps']}",
            f"{row['denoise_seconds']:.2f}",
            f"{row['speedup']:.2f}×",
            *(
                "" if row[name] is None else format(row[name], spec)
                for name, spec in (
                    ("predicted", ".1f"),
                    ("psnr", ".1f"),
                    ("ssim", ".4f"),
                    ("vmaf", ".1f"),
                )
            ),
        )
    return table
