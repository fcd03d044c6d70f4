"""The command `lockstep`.

Exit codes: 0 done, 2 bad request (nothing was started), 3 the job failed, 130 cancelled. Progress goes to
stderr; the path of the result alone goes to stdout.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler

from launch.options import build_request, refuse_several_ranks, sampling_options
from runtime.errors import BadRequestError, LockstepError

log = logging.getLogger("launch")

_AGAIN = "no file was left half-written; there is nothing to resume, the same command starts again"
EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_CANCELLED = 2, 3, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="lockstep-video")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.pass_context
def cli(context: click.Context, verbose: bool) -> None:
    """Generate video with Wan2.1, skipping evaluations that can be forecast."""
    context.obj = console = Console(stderr=True)
    _set_up_logging(console, verbose)


@cli.command()
@click.argument("prompt")
@sampling_options
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same video.")
@click.option("--videos", type=int, default=1, show_default=True, help="Videos made as one batch.")
@click.option("--spectrum", help="Forecasting preset: off, a preset's name, or a YAML file.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("video.mp4"), show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Report JSON; default: --out with .json.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option(
    "--compare", is_flag=True, help="Also run the full sampler and measure PSNR, SSIM and VMAF against it."
)
@click.option(
    "--ranks", type=int, default=1, show_default=True, help="Processes that make the video together."
)
@click.option("--ulysses", type=int, default=1, show_default=True, help="Ranks that split attention heads.")
@click.option(
    "--ring", type=int, default=1, show_default=True, help="Ranks that pass keys and values around."
)
@click.option(
    "--cfg", type=int, default=1, show_default=True, help="2 gives each guidance branch its own ranks."
)
@click.option(
    "--launcher", type=click.Choice(["inline", "torchrun", "ray"]), default="inline", show_default=True
)
@click.pass_obj
def generate(
    console: Console,
    /,
    prompt: str,
    config: str,
    out: Path,
    report: Path | None,
    overwrite: bool,
    compare: bool,
    ranks: int,
    ulysses: int,
    ring: int,
    cfg: int,
    launcher: str,
    **given: Any,
) -> None:
    """Make a video of PROMPT and write an mp4, a report and a picture of the run."""
    refuse_several_ranks(launcher, ranks=ranks, ulysses=ulysses, ring=ring, cfg=cfg)
    from launch.progress import StepProgress, timed
    from runtime.configs import load_config
    from runtime.job import Outputs, run_compared_job, run_job
    from runtime.presets import load_preset

    settings = load_config(config)
    request = build_request(settings, prompt, **given)
    load_preset(request.spectrum).schedule_of(request.steps)
    outputs = Outputs(out, report or out.with_suffix(".json"), overwrite)
    outputs.check(request.videos)

    from runtime.engine import Engine

    with timed(console, f"loading {settings.model}"):
        engine = Engine(settings)
    job = run_compared_job if compare else run_job
    result = job(engine, request, outputs, partial(StepProgress, console))
    if result.comparison is not None and result.quality is not None:
        vmaf = "" if result.quality.vmaf is None else f", VMAF {result.quality.vmaf:.1f}"
        console.print(
            f"denoising {result.comparison.speedup:.2f}× faster than the full sampler "
            f"(ideal {result.comparison.ideal_speedup:.2f}×), "
            f"PSNR {result.quality.psnr:.1f} dB, SSIM {result.quality.ssim:.4f}{vmaf}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"report {outputs.report}, picture {outputs.picture}", highlight=False, soft_wrap=True)
    for path in result.videos:
        click.echo(path)


@cli.command()
@click.argument("prompts", nargs=-1, required=True)
@sampling_options
@click.option("--preset", "presets", multiple=True, default=("paper", "paper-fast"), show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("compare.mp4"), show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.pass_obj
def compare(
    console: Console,
    /,
    prompts: tuple[str, ...],
    config: str,
    presets: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path,
    overwrite: bool,
    **given: Any,
) -> None:
    """Compare presets with the full sampler on the same PROMPTS and seeds.

    Writes a side-by-side mp4 (full sampler first) and a JSON beside it with every number of the table.
    """
    from launch.compare import Comparison, plan_comparison
    from launch.progress import StepProgress, timed

    comparison: Comparison = plan_comparison(
        config, prompts, presets=presets, seeds=seeds, out=out, overwrite=overwrite, **given
    )
    with timed(console, f"loading {comparison.config.model}"):
        comparison.load()
    comparison.run(partial(StepProgress, console))
    console.print(comparison.table())
    click.echo(out)


@cli.command()
@click.pass_obj
def doctor(console: Console) -> None:
    """Show what this machine has, and which models and topologies it can run."""
    from launch.doctor import examine

    for table in examine():
        Console().print(table)


def main() -> None:
    """Entry point; turns every outcome into one of the exit codes of the contract."""
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # both end the job in order, with nothing half-written
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        cli.main(arguments, prog_name="lockstep", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_BAD_REQUEST
    except BadRequestError as error:
        _complain(str(error))
        return EXIT_BAD_REQUEST
    except (KeyboardInterrupt, click.Abort):
        _complain("cancelled; no file was left half-written")
        return EXIT_CANCELLED
    except LockstepError as error:
        _complain(f"{error}\n{_AGAIN}")
        return EXIT_FAILED
    except Exception as error:
        log.exception("unexpected failure")
        _complain(f"{type(error).__name__}: {error}\n{_AGAIN}")
        return EXIT_FAILED
    return 0


def _complain(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"lockstep: {line}", err=True)


def _set_up_logging(console: Console, verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(name)s: %(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
        force=True,
    )
    if not verbose:
        warnings.filterwarnings("ignore", module="diffusers|transformers")


if __name__ == "__main__":
    main()
