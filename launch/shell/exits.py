"""Ends a process: its exit code, and the explanation on stderr.

0 done, 2 bad request (nothing was started), 3 the job failed, 130 cancelled.
"""

from __future__ import annotations

import atexit
import errno
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import click

from launch.shell.namesakes import in_the_way
from launch.shell.terminal import forgive_encodings, visible
from runtime.errors import (
    BadRequestError,
    CancelledError,
    LockstepError,
    NotFiniteError,
    named,
    with_files,
)
from runtime.parallel.signals import SignalCount, ending_signals

log = logging.getLogger("launch")

EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_CANCELLED = 2, 3, 130
_LOOK = 0.05  # seconds between two checks whether imports are over
# Per process, as signal handlers are:
_raised = SignalCount()  # signals that raised KeyboardInterrupt while this command ran
_waiting = SignalCount()  # signals that wait for imports to end


def run_command(command: click.Command, arguments: list[str], name: str) -> int:
    """Run a command and return its exit code; if it ends early, explain on stderr why."""
    forgive_encodings()
    _raised.forget()
    try:
        check_arguments(arguments)
        code = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        return explain_usage(error)
    except (Exception, KeyboardInterrupt) as error:
        return explain(error)
    return code if isinstance(code, int) else 0


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not text.

    Raises:
        BadRequestError: one has bytes that are not UTF-8, or a character that the locale's encoding lacks.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            content = os.fsencode(argument)
            try:
                content.decode()
            except UnicodeDecodeError as error:
                raise BadRequestError(
                    f"argument {visible(repr(content)[1:])} given; its byte 0x{content[error.start]:02x} is "
                    "not UTF-8; names and texts must be UTF-8"
                ) from None
            raise BadRequestError(
                f"argument {content.decode()!r} given; this locale's encoding is "
                f"{sys.getfilesystemencoding()}, set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            ) from None


@contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """Add advice on how to continue to the exception that ends the block, unless it would only recur.

    Args:
        advice: called when the block fails; returns "" if there is no advice.
    """
    try:
        yield
    except (BadRequestError, NotFiniteError):  # the same command would end the same way
        raise
    except click.exceptions.Exit:  # explained already, by another process
        raise
    except BaseException as error:
        with suppress(OSError):  # such as a working directory that is gone; the error itself matters more
            said = advice()
            if said and said not in str(error):
                error.add_note(said)
        raise


def end_with(run: Callable[[list[str]], int]) -> NoReturn:
    """Run the command line and end the process with its exit code. Call it before Ray is imported.

    Python cleans up at exit, C++ libraries do not: threads that Ray 2.60 leaves behind (its metrics exporter)
    crash when memory is freed under them, so now and then a finished job would end with SIGSEGV.
    """
    open_streams()
    code = EXIT_FAILED
    atexit.register(lambda: end_now(code))  # runs last: handlers registered later run earlier
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second signal, while an error was being explained
        code = EXIT_CANCELLED
    _let_clean_up(code)
    sys.exit(code)


def _let_clean_up(code: int) -> None:
    """Let signals change nothing from here on: one is ignored, another skips the rest of the clean-up."""
    heard = SignalCount()

    def hear(number: int, frame: FrameType | None) -> None:
        if heard.hear() and heard.count > 1:
            end_now(code)

    for number in ending_signals():
        signal.signal(number, hear)


def open_streams() -> None:
    """Give the process standard streams that never end it: a job continues when its reader is gone.

    A stream that the process was started without is opened as well; otherwise the next file that is opened
    would get its number, and printed text would land in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
        before = getattr(sys, name)
        if number == 0:
            sys.stdin = before or os.fdopen(number, encoding="utf-8", closefd=False)
        elif before is None or isinstance(before, io.TextIOWrapper):
            stream = io.TextIOWrapper(
                _Patient(number, "w", closefd=False),  # with a buffer, signal handlers could not print
                encoding="utf-8" if before is None else before.encoding,
                errors="backslashreplace",
                write_through=True,
            )
            setattr(sys, name, stream)


class _Patient(io.FileIO):
    """A standard stream that drops its output once it cannot be written any more.

    Attributes:
        patient: whether the process continues when the reader of stdout is gone.
    """

    patient = True

    def write(self, content: Any, /) -> int:
        left = memoryview(content).cast("B")
        size = left.nbytes
        try:
            while left:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            if self.fileno() == 1 and (error.errno != errno.EPIPE or not _Patient.patient):
                # Either a result's path arrives, or the caller must learn that it did not.
                raise OSError(error.errno, os.strerror(error.errno or 0), "standard output") from error
            _to_nowhere(self.fileno())
        return size


@contextmanager
def only_while_heard() -> Iterator[None]:
    """End the block quietly when the reader of stdout is gone: for commands that only display something."""
    _Patient.patient = False
    try:
        yield
    except BrokenPipeError:
        if isinstance(getattr(sys.stdout, "buffer", None), _Patient):
            _to_nowhere(1)  # for whatever is still printed
    finally:
        _Patient.patient = True


def _to_nowhere(number: int) -> None:
    """Point the file descriptor `number` at /dev/null."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(number, True)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler that raises KeyboardInterrupt, so that the process ends in an orderly way.

    The same signal sent again within a second does not disturb that. While modules are being imported it
    waits: libraries swallow the exception there, or stay half imported and fail later with another one. A
    second signal meanwhile ends the process at once.
    """
    if not _importing(frame):
        if _raised.hear():
            raise KeyboardInterrupt
        return
    if not _waiting.hear():
        return
    if _waiting.count > 1:
        complain("cancelled")
        end_now(EXIT_CANCELLED)
    signal.signal(number, interrupt)  # whatever handler called this one would take it for the same signal
    threading.Thread(target=_again, args=(number,), daemon=True).start()


def _again(number: int) -> None:
    """Send the signal again once the main thread has finished importing."""
    main = threading.main_thread().ident
    assert main is not None
    while _importing(sys._current_frames().get(main)):
        time.sleep(_LOOK)
    _waiting.forget()
    os.kill(os.getpid(), number)


def _importing(frame: FrameType | None) -> bool:
    """Return whether this frame runs inside an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


def end_now(code: int) -> NoReturn:
    """End the process without any clean-up but flushing its output."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it may be closed or missing
            stream.flush()
    os._exit(code)


def give_up(error: LockstepError) -> None:
    """End this process although its main thread is stuck and cannot raise `error`."""
    log.error("%s; this rank is stuck and ends now", error)
    end_now(EXIT_FAILED)


def exit_code(error: BaseException) -> int:
    """Exit code for `error`."""
    if isinstance(error, BadRequestError):
        return EXIT_BAD_REQUEST
    if isinstance(error, CancelledError | KeyboardInterrupt | click.Abort):
        return EXIT_CANCELLED
    return EXIT_FAILED


def explain(error: BaseException) -> int:
    """Explain on stderr why the job ended and what to do about it; return the exit code."""
    code = exit_code(error)
    if code == EXIT_CANCELLED:
        complain(f"cancelled ({error})" if isinstance(error, CancelledError) else "cancelled")
    elif isinstance(error, LockstepError):
        complain(str(error))
    elif isinstance(error, OSError):
        complain(with_files(error))
        log.debug("raised here", exc_info=error)
    else:
        log.error("unexpected failure", exc_info=error)
        complain(named(error))
        complain(in_the_way(error))
    complain("\n".join(getattr(error, "__notes__", [])))
    return code


def explain_usage(error: click.ClickException) -> int:
    """Explain on stderr which argument click refused; return the exit code."""
    said = io.StringIO()
    error.show(said)
    click.echo(visible(said.getvalue()), nl=False, err=True)
    return EXIT_BAD_REQUEST


def complain(message: str) -> None:
    """Print `message` on stderr, each line with the prefix `lockstep:`."""
    for line in visible(message).splitlines():
        click.echo(f"lockstep: {line}", err=True)
