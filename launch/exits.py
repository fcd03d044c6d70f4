"""How a process ends: exit codes, and what is said about them.

0 done, 2 bad request (nothing was started), 3 the job failed, 130 cancelled.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import click

from launch.terminal import forgive_encodings, visible
from runtime.errors import BadRequestError, CancelledError, LockstepError

log = logging.getLogger("launch")

EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_CANCELLED = 2, 3, 130
_AGAIN = "no file was left half-written; the same command with --resume goes on from the last checkpoint"


def run_command(command: click.Command, arguments: list[str], name: str) -> int:
    """Run a command and return its exit code; whatever ends it is explained on stderr."""
    forgive_encodings()
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(visible(said.getvalue()), nl=False, err=True)
        return EXIT_BAD_REQUEST
    except (Exception, KeyboardInterrupt) as error:
        return explain(error)
    return code if isinstance(code, int) else 0


def end_with(run: Callable[[list[str]], int]) -> NoReturn:
    """Run the process's arguments, and end it with the exit code; to be called before Ray is imported.

    Python cleans up, libraries in C++ do not: threads that Ray 2.60 leaves behind (its exporter of metrics)
    crash when its memory is freed under them, and now and then a job that was done would end with SIGSEGV.
    """
    code = EXIT_FAILED
    atexit.register(lambda: end_now(code))  # what is registered later runs before
    code = run(sys.argv[1:])
    sys.exit(code)


def end_now(code: int) -> NoReturn:
    """End this process without any clean-up; what was said is still told."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_code(error: BaseException) -> int:
    """The exit code that stands for `error`."""
    if isinstance(error, BadRequestError):
        return EXIT_BAD_REQUEST
    if isinstance(error, CancelledError | KeyboardInterrupt | click.Abort):
        return EXIT_CANCELLED
    return EXIT_FAILED


def explain(error: BaseException) -> int:
    """Say on stderr why the job ends, and return its exit code."""
    code = exit_code(error)
    if code == EXIT_CANCELLED:
        how = f" ({error})" if isinstance(error, CancelledError) else ""
        complain(f"cancelled{how}; {_AGAIN}")
    elif code == EXIT_BAD_REQUEST:
        complain(str(error))
    elif isinstance(error, LockstepError):
        complain(f"{error}\n{_AGAIN}")
    else:
        log.error("unexpected failure", exc_info=error)
        complain(f"{type(error).__name__}: {error}\n{_AGAIN}")
    return code


def complain(message: str) -> None:
    """One line on stderr for every line of `message`."""
    for line in visible(message).splitlines():
        click.echo(f"lockstep: {line}", err=True)
