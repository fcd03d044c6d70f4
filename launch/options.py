"""Command-line options that several commands share, and how they become a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from runtime.errors import BadRequestError

if TYPE_CHECKING:
    from runtime.configs import Config
    from runtime.request import VideoRequest

_Command = TypeVar("_Command", bound=Callable[..., Any])


class SizeType(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, _, height = str(value).lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not WIDTHxHEIGHT, for example 832x480", param, ctx)
        return int(width), int(height)


def sampling_options(command: _Command) -> _Command:
    """What to make and how to sample it; every option left out takes the config's default."""
    options = [
        click.option(
            "--config", default="wan-tiny", show_default=True, help="A config's name, or a YAML file."
        ),
        click.option("--steps", type=int, help="Sampler steps."),
        click.option("--size", type=SizeType(), help="Pixels, multiples of 16."),
        click.option("--frames", type=int, help="Frames, 4k + 1."),
        click.option("--guidance", type=float, help="Classifier-free guidance; at most 1 is none."),
        click.option("--negative", help="What the video should not show."),
        click.option("--max-sequence-length", type=int, help="Text tokens, padding included."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def build_request(config: Config, prompt: str, **given: Any) -> VideoRequest:
    """The request of the given options over the config's defaults; `None` means not given.

    Raises:
        BadRequestError: a field is out of its bounds.
    """
    size = given.pop("size", None)
    if size is not None:
        given["width"], given["height"] = size
    return config.request(prompt, **{name: value for name, value in given.items() if value is not None})


def refuse_several_ranks(launcher: str, **degrees: int) -> None:
    """Say clearly what this version does not do yet.

    Raises:
        BadRequestError: more than one rank, or another launcher than `inline`, is asked for.
    """
    for name, degree in degrees.items():
        if degree != 1:
            raise BadRequestError(f"{name}: {degree} given; this version runs on one rank, so it must be 1")
    if launcher != "inline":
        raise BadRequestError(f"launcher: {launcher!r} given; this version has only 'inline'")
