"""Commands: `-v` and `-q` may stand before or after a command, and long help lists options by purpose.

Imports nothing slow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import click

from launch.commands.lora_option import LoraOption
from launch.shell.logs import set_up_logging
from launch.shell.terminal import Terminal

VERBOSITY = ("verbose", "quiet")
_MANY = 16  # options of a command, above which its help lists them by purpose
_OTHERS = "Options"
_PURPOSES = {
    "What to make": "prompts size frames videos seed seeds negative image extend",
    "Model and sampler": "config model revision lora steps guidance guidance_2 max_sequence_length",
    "Computed steps and quality": "spectrum presets deadline compare budgets",
    "Files": "out report preview latents overwrite",
    "GPUs and speed": (
        "launcher gpu ranks ulysses ring cfg attention performance quantization shard offload compile"
    ),
    "Interruptions and failures": "checkpoints checkpoint_every resume timeout busy_timeout",
    "Queue": "folder name owner priority expires",
}
_CALLED_OTHERWISE = {"--preset": "--spectrum"}  # name that another command has for an option
_PURPOSE = {name: purpose for purpose, names in _PURPOSES.items() for name in names.split()}
_Command = TypeVar("_Command", bound=Callable[..., Any])


class _TakesVerbosity(click.Command):
    """A command or group that takes `-v` and `-q`."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        if not any(one.name in VERBOSITY for one in self.params):
            self.params += _verbosity(expose=False)


class Command(_TakesVerbosity):
    """A command that takes `-v` and `-q`, and lists many options by purpose in its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for one in self.params:
            if isinstance(one, LoraOption):
                args = one.in_two_words(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            instead = _CALLED_OTHERWISE.get(error.option_name, "")
            if not any(instead in one.opts for one in self.params):
                raise
            said = f"No such option {error.option_name!r}. Did you mean {instead!r}?"
            raise click.UsageError(said, ctx=error.ctx) from None
        except click.UsageError as error:
            prompts = [one for one in self.params if isinstance(one, click.Argument) and one.name == "prompt"]
            if not prompts or "unexpected extra argument" not in error.message:
                raise
            raise click.UsageError(f"{error.message}; put the prompt in quotes", ctx=error.ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if len(self.params) <= _MANY:
            super().format_options(ctx, formatter)
            return
        listed: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for one in self.get_params(ctx):
            if (record := one.get_help_record(ctx)) is not None:
                listed[_PURPOSE.get(one.name or "", _OTHERS)].append(record)
        for purpose in (*_PURPOSES, _OTHERS):
            if listed[purpose]:
                with formatter.section(purpose):
                    formatter.write_dl(listed[purpose])


class CommandGroup(_TakesVerbosity, click.Group):
    """A group of such commands, which takes `-v` and `-q`, too."""

    command_class = Command


def verbosity_options(command: _Command) -> _Command:
    """Add `-v` and `-q` to a command that sets up its own logging."""
    for option in reversed(_verbosity(expose=True)):
        command = click.option(*option.opts, is_flag=True, help=option.help)(command)
    return command


def _verbosity(*, expose: bool) -> list[click.Option]:
    callback = None if expose else _obey
    helps = {"verbose": "Log more to stderr.", "quiet": "Print only warnings and errors to stderr."}
    return [
        click.Option(
            [f"-{name[0]}", f"--{name}"],
            is_flag=True,
            expose_value=expose,
            callback=callback,
            help=helps[name],
        )
        for name in VERBOSITY
    ]


def _obey(context: click.Context, option: click.Parameter, given: bool) -> None:
    """Log more, or print less, from here on; the options before the command hold, too."""
    root = context.find_root()
    if given and option.name is not None and isinstance(root.obj, Terminal):
        root.params[option.name] = True
        set_verbosity(root.obj, **{name: bool(root.params.get(name)) for name in VERBOSITY})


def set_verbosity(console: Terminal, *, verbose: bool, quiet: bool) -> None:
    """Set up logging, and let the console print nothing if it is to be quiet."""
    console.quiet = quiet
    set_up_logging(Terminal(stderr=True) if quiet else console, verbose=verbose)
