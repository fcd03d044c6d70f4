"""Command-line options that several commands share. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from launch.commands.lora_option import LoraOption
from launch.commands.transformer_options import transformer_options
from launch.commands.types import DEGREE, SCALE, TIMEOUT, BudgetsType, FileNameType, PathType, SizeType
from runtime.jobs.defaults import CHECKPOINT_EVERY, COMPILE_TIMEOUT, DEFAULT_TIMEOUT

_TIMEOUT_HELP = (
    "If one rank fails, all others end within this time.  "
    f"[default: {DEFAULT_TIMEOUT:.0f}; {COMPILE_TIMEOUT:.0f} if blocks are compiled]"
)
_CONFIGS = "[default: the config's]"
_PRESET = (
    "[default: the config's; in shipped configs auto: the best calibrated preset that fits, "
    "or else universal]"
)
_Command = TypeVar("_Command", bound=Callable[..., Any])


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
            type=FileNameType("."),
            metavar="NAME|FILE",
            help="Model and defaults: a shipped config (`lockstep doctor` lists them) or a YAML file.  "
            "[default: wan-tiny, or the usual config for --model]",
        ),
        click.option(
            "--model",
            type=FileNameType(),
            metavar="FOLDER|REPOSITORY",
            help="Model to use instead of the config's: a folder, or a Hugging Face repository.",
        ),
        click.option(
            "--revision",
            metavar="NAME",
            help="Commit or tag of the model's repository.  [default: the config's, or the newest]",
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
            help=f"Scale of classifier-free guidance; 1 or less turns it off. For a model of two experts: "
            f"scale of the first, for high noise.  {_CONFIGS}",
        ),
        click.option(
            "--guidance-2",
            type=float,
            help=f"Scale of the second expert, for low noise, if it differs from the first's.  {_CONFIGS}",
        ),
        click.option("--negative", help=f"What the video should not show.  {_CONFIGS}"),
        click.option(
            "--image",
            type=FileNameType(),
            metavar="FILE",
            help="Image that the video starts with, for models that make videos from images.",
        ),
        click.option(
            "--max-sequence-length",
            type=int,
            help=f"Length of the prompt in tokens, with padding.  {_CONFIGS}",
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
            help="Ranks that split the attention heads.  [default: automatic]",
        ),
        click.option(
            "--ring",
            type=DEGREE,
            metavar="N",
            help="Ranks that pass keys and values around.  [default: automatic]",
        ),
        click.option(
            "--cfg",
            type=DEGREE,
            metavar="N",
            help="2 gives each guidance branch its own ranks.  [default: automatic]",
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
            help="Text file with one prompt per line.  [default: the shipped prompts]",
        ),
        click.option("--seed", type=int, default=1000, show_default=True, help="Seed of the first video."),
        click.option(
            "--budgets",
            type=BudgetsType(),
            metavar="N,N,…",
            help="Numbers of computed steps for which solvers are fitted, or none.  "
            "[default: 8,10,14 for 50 steps]",
        ),
        click.option("--out", type=PathType(), required=True, help="JSON file to write the calibration to."),
        click.option("--overwrite", is_flag=True, help="Replace an existing calibration."),
        click.option(
            "--add-solvers",
            is_flag=True,
            help="Add solvers to the calibration in --out, for other --budgets. Its prompts, seeds and size "
            "are used again, and nothing else in it changes.",
        ),
        click.option(
            "--ranks", type=DEGREE, metavar="N", help="Processes that make each video together.  [default: 1]"
        ),
        click.option("--timeout", type=TIMEOUT, metavar="SECONDS", help=_TIMEOUT_HELP),
    ]
    return _with(options, command)


def generate_options(command: _Command) -> _Command:
    """Add the argument and options of `generate`, on one rank or many."""
    options = [
        click.argument("prompt", required=False),
        click.option(
            "--prompts",
            type=PathType(),
            metavar="FILE",
            help="Make a video of each line of a file, and load the model once. A line of a .txt file is a "
            "prompt; a line of a .jsonl file is a JSON object with fields of a request.",
        ),
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
            help="Continue a finished video, from its latents in this file (--latents); for models that make "
            "videos from images. --frames counts both videos.",
        ),
        click.option(
            "--spectrum",
            type=FileNameType("spectrum"),
            metavar="off|NAME|FILE",
            help="Preset: which steps are computed, and how the others are forecast. A shipped name "
            f"(`lockstep doctor` lists them) or a YAML file. off computes every step, exactly.  {_PRESET}",
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
            help="The mp4; for several videos, numbers are added to its name. With --prompts, {number}, "
            "{slug} and {seed} are replaced, also in the names of the other files.  "
            "[default: video.mp4; with --prompts, {number:03d}-{slug}.mp4]",
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
            help="WebP preview, updated at most once per second while the video is made; removed at the end.",
        ),
        click.option(
            "--latents",
            type=PathType(),
            metavar="FILE",
            help="Write the video's latents to this safetensors file, for --extend.",
        ),
        click.option(
            "--overwrite", is_flag=True, help="Replace existing files, if they are of the same kind."
        ),
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
            cls=LoraOption,
            type=(FileNameType(), SCALE),
            multiple=True,
            metavar="[high:|low:]FILE[=SCALE]",
            help="LoRA weights, which are multiplied by SCALE (default 1) and added to the transformer's; "
            "may be given several times. With high: or low:, only for that one of two transformers.",
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
            help="Folder for checkpoints, with a subfolder for each job.  [default: --out with .checkpoints]",
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
            type=FileNameType("spectrum"),
            metavar="off|NAME|FILE",
            help="Preset: which steps are computed, and how the others are forecast. A shipped name "
            f"or a YAML file. off computes every step, exactly.  {_PRESET}",
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
            help="Show this rank; all: one rank of each kind.  [default: the first rank and one other]",
        ),
        click.option(
            "--topologies", is_flag=True, help="Also compare all topologies of this number of ranks."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ]
    return _with(options, command)
