"""Command-line options that several commands share. Imports nothing slow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from launch.commands.transformer_options import transformer_options
from runtime.files.text import user_path
from runtime.jobs.defaults import CHECKPOINT_EVERY, COMPILE_TIMEOUT, DEFAULT_TIMEOUT

_TIMEOUT_HELP = (
    "Time within which the failure of one rank ends all of them.  "
    f"[default: {DEFAULT_TIMEOUT:.0f}; {COMPILE_TIMEOUT:.0f} with --compile]"
)
_CONFIGS = "[default: the config's]"
_Command = TypeVar("_Command", bound=Callable[..., Any])
DEGREE = click.IntRange(min=1, max=65536)


class NumberType(click.ParamType[float]):
    """A finite number within bounds, both inclusive; others are refused with their value and the bounds."""

    name = "number"

    def __init__(self, least: float, most: float):
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not self._least <= number <= self._most:  # NaN fails both comparisons
            self.fail(
                f"{str(value)[:60]!r} given; a number from {self._least:g} to {self._most:g} is needed",
                param,
                ctx,
            )
        return number


class PathType(click.ParamType[Path]):
    """Path of a file or folder; empty ones are refused, as they mostly come from unset variables."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("'' given; a name is needed", param, ctx)
        path = user_path(str(value))
        first = path.parts[0] if len(path.parts) > 1 else ""
        if first.startswith("~"):  # a folder of this name would be made
            self.fail(
                f"{str(value)!r} given; no user's home folder is {first!r}; for a folder of that name give "
                f"{'./' + str(value)!r}",
                param,
                ctx,
            )
        return path


class FileNameType(click.ParamType[str]):
    """Name of something shipped, or path of a file; expands the `~` of `--option=~/file`, too."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(user_path(value)) if str(value).startswith("~") else str(value)


DAY = 86400.0  # seconds
SCALE = NumberType(-1000.0, 1000.0)  # scale of a LoRA
TIMEOUT = NumberType(1.0, 7 * DAY)  # seconds for `--timeout`
EXPIRY = NumberType(1.0, 3650 * DAY)  # seconds after which a request expires
PRICE = NumberType(0.0, 1e9)  # price of a rank for an hour
REPLICAS = click.IntRange(min=1, max=4096)
PRIORITY = click.IntRange(min=-1_000_000, max=1_000_000)
ID = click.IntRange(min=1, max=2**63 - 1)  # number of a request in a queue; SQLite's range


class SizeType(click.ParamType[tuple[int, int]]):
    """A size given as WIDTHxHEIGHT, in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", str(value))
        if found is None:
            self.fail(f"{value!r} is not WIDTHxHEIGHT, for example 832x480", param, ctx)
        return int(found[1]), int(found[2])


class BudgetsType(click.ParamType[tuple[int, ...]]):
    """Numbers of computed steps, such as 8,10,14; `none` for an empty list."""

    name = "N,N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if str(value) == "none":
            return ()
        if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", str(value)):
            self.fail(f"{str(value)[:60]!r} given; numbers such as 8,10,14 are needed, or none", param, ctx)
        return tuple(int(number) for number in str(value).split(","))


def _with(options: Sequence[Callable[[_Command], _Command]], command: _Command) -> _Command:
    """Add options to a command; its help lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def sampling_options(command: _Command) -> _Command:
    """Add the options of what to make and how to sample it; each defaults to the config's value."""
    options = [
        click.option(
            "--config",
            type=FileNameType(),
            default="wan-tiny",
            show_default=True,
            metavar="NAME|FILE",
            help="Model and defaults: a shipped config (`lockstep doctor` lists them) or a YAML file.",
        ),
        click.option("--steps", type=int, help=f"Steps of the sampler.  {_CONFIGS}"),
        click.option(
            "--size",
            type=SizeType(),
            metavar="WIDTHxHEIGHT",
            help=f"Size in pixels; both are multiples of 16.  {_CONFIGS}",
        ),
        click.option(
            "--frames", type=int, help=f"Length of the video: 4k + 1 frames, such as 17 or 81.  {_CONFIGS}"
        ),
        click.option(
            "--guidance",
            type=float,
            help=f"Scale of classifier-free guidance; 1 or less turns it off. Of a model of two experts: "
            f"that of the first, for high noise.  {_CONFIGS}",
        ),
        click.option(
            "--guidance-2",
            type=float,
            help=f"Scale of the second expert, for low noise, if it is to be another.  {_CONFIGS}",
        ),
        click.option("--negative", help=f"What the video should not show.  {_CONFIGS}"),
        click.option(
            "--image",
            type=FileNameType(),
            metavar="FILE",
            help="Image that the video starts with, for models that make videos from images.",
        ),
        click.option(
            "--max-sequence-length", type=int, help=f"Tokens of the prompt, padding included.  {_CONFIGS}"
        ),
    ]
    return _with(options, command)


def degree_options(command: _Command) -> _Command:
    """Add the degrees of parallelism."""
    options = [
        click.option(
            "--ulysses",
            type=DEGREE,
            metavar="N",
            help="Ranks that split the attention heads.  [default: chosen]",
        ),
        click.option(
            "--ring",
            type=DEGREE,
            metavar="N",
            help="Ranks that pass keys and values around.  [default: chosen]",
        ),
        click.option(
            "--cfg",
            type=DEGREE,
            metavar="N",
            help="2 gives each guidance branch ranks of its own.  [default: chosen]",
        ),
    ]
    return _with(options, command)


def calibrate_options(command: _Command) -> _Command:
    """Add the argument and options of `calibrate`, on one rank or many."""
    options = [
        sampling_options,
        click.option(
            "--prompts",
            type=PathType(),
            help="Text file with one prompt per line.  [default: the shipped ones]",
        ),
        click.option("--seed", type=int, default=1000, show_default=True, help="Seed of the first video."),
        click.option(
            "--budgets",
            type=BudgetsType(),
            metavar="N,N,…",
            help="Numbers of computed steps for which solvers are fitted, or none.  "
            "[default: 8,10,14 of 50 steps]",
        ),
        click.option("--out", type=PathType(), required=True, help="JSON file to write the calibration to."),
        click.option("--overwrite", is_flag=True, help="Replace a file that exists."),
        click.option(
            "--ranks", type=DEGREE, metavar="N", help="Processes that make each video together.  [default: 1]"
        ),
        click.option("--timeout", type=TIMEOUT, metavar="SECONDS", help=_TIMEOUT_HELP),
    ]
    return _with(options, command)


def generate_options(command: _Command) -> _Command:
    """Add the argument and options of `generate`, on one rank or many."""
    options = [
        click.argument("prompt"),
        sampling_options,
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Seed of the noise: the same seed gives the same video.",
        ),
        click.option(
            "--videos",
            type=int,
            default=1,
            show_default=True,
            help="Number of videos to make from the prompt, as one batch.",
        ),
        click.option(
            "--extend",
            type=FileNameType(),
            metavar="FILE",
            help="Latents of a finished video that this one goes on with, for models that make videos from "
            "images; --frames counts both.",
        ),
        click.option(
            "--spectrum",
            type=FileNameType(),
            metavar="off|NAME|FILE",
            help="Forecasting preset: a shipped one (`lockstep doctor` lists them) or a YAML file; off "
            f"computes every step.  {_CONFIGS}",
        ),
        click.option(
            "--deadline",
            type=float,
            metavar="SECONDS",
            help="Time limit for denoising; steps that do not fit are forecast instead of computed.",
        ),
        click.option(
            "--out",
            type=PathType(),
            default=Path("video.mp4"),
            show_default=True,
            help="The mp4; several videos get numbers added to its name.",
        ),
        click.option(
            "--report",
            type=PathType(),
            help="JSON file for the report; the picture is written beside it.  [default: --out with .json]",
        ),
        click.option(
            "--preview",
            type=PathType(),
            metavar="FILE",
            help="WebP preview, renewed at most once a second while the video is made; removed at the end.",
        ),
        click.option(
            "--latents",
            type=PathType(),
            metavar="FILE",
            help="Safetensors file for the video's latents, which --extend takes.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace files that exist."),
        click.option(
            "--compare",
            is_flag=True,
            help="Also run the full sampler and measure PSNR, SSIM and VMAF against it.",
        ),
        click.option(
            "--ranks",
            type=DEGREE,
            metavar="N",
            help="Processes that make the video together; each has a GPU, or shares the CPU.  [default: 1]",
        ),
        degree_options,
        click.option(
            "--lora",
            type=(FileNameType(), SCALE),
            multiple=True,
            metavar="[high:|low:]FILE SCALE",
            help="LoRA weights to add to the transformer's, times SCALE; may be given several times. After "
            "high: or low: they are for that one of two transformers.",
        ),
        click.option(
            "--attention",
            metavar="NAME",
            help="Self-attention kernel: auto, sdpa, flash, efficient, cudnn, math, xfuser or "
            f"xfuser:KERNEL.  {_CONFIGS}",
        ),
        *transformer_options(),
        click.option(
            "--compile/--no-compile",
            default=None,
            help="Compile each transformer block; results differ by rounding.  [default: the config's, "
            "or as --performance says]",
        ),
        click.option(
            "--timeout",
            type=TIMEOUT,
            metavar="SECONDS",
            help=_TIMEOUT_HELP,
        ),
        click.option(
            "--busy-timeout",
            type=TIMEOUT,
            metavar="SECONDS",
            help="Time that one rank may spend loading, encoding, decoding or writing while the others "
            "wait.  [default: the config's, usually 1800]",
        ),
        click.option(
            "--checkpoints",
            type=PathType(),
            help="Folder in which the job's checkpoints get a subfolder.  [default: --out with .checkpoints]",
        ),
        click.option(
            "--checkpoint-every",
            type=click.IntRange(min=0, max=1_000_000),
            metavar="N",
            default=CHECKPOINT_EVERY,
            show_default=True,
            help="Computed steps between checkpoints; 0 for none.",
        ),
        click.option("--resume", is_flag=True, help="Resume from the last checkpoint, if there is one."),
    ]
    return _with(options, command)


def rehearse_options(command: _Command) -> _Command:
    """Add the options of `rehearse`: those that change what a job computes, holds or sends."""
    options = [
        sampling_options,
        click.option("--videos", type=int, help="Number of videos made as one batch.  [default: 1]"),
        click.option(
            "--spectrum",
            type=FileNameType(),
            metavar="off|NAME|FILE",
            help=f"Forecasting preset: a shipped one or a YAML file; off computes every step.  {_CONFIGS}",
        ),
        click.option(
            "--gpu",
            type=FileNameType(),
            default="h100",
            show_default=True,
            metavar="NAME|FILE",
            help="GPU to rehearse on: h100, h200, b200, 4090, or a YAML file.",
        ),
        click.option(
            "--ranks", type=DEGREE, metavar="N", help="GPUs that make the video together.  [default: 1]"
        ),
        degree_options,
        click.option("--attention", metavar="NAME", help=f"Self-attention kernel of torch.  {_CONFIGS}"),
        *transformer_options(),
        click.option(
            "--rank",
            metavar="N|all",
            help="Show this rank, or one of each kind.  [default: the first rank and one other]",
        ),
        click.option(
            "--topologies", is_flag=True, help="Compare every topology of this number of ranks, too."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ]
    return _with(options, command)
