"""Commands as a shell starts them, in processes that need not import torch and all the rest first.

Importing takes seconds, and tests start many commands. A `Command` is forked from a process that has imported
everything and done nothing: its streams, environment, folder, arguments and signals are those of a new one.
Tests of what happens during imports, and of what a program of others does, start `sys.executable`.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.ranks import PROCESSES
from tests.spare import Stream, fill, forget_parent, forget_settings, install, run_program


class Command(subprocess.Popen[str]):
    """`python -m launch WORDS`.

    Args:
        words: what stands behind the name of the command.
        module: another one to run.
        spares: processes in which it may run what it starts; a server's pool is one.
        enter: called in the new process before anything else.
        options: as of Popen; streams, `env` and `cwd` alone have an effect.
    """

    def __init__(
        self,
        words: Sequence[str],
        module: str = "launch",
        spares: int = 0,
        enter: Callable[[], None] | None = None,
        **options: Any,
    ):
        self._spares, self._enter = spares, enter
        super().__init__([module, *words], **{"text": True, **options})

    def _execute_child(self, args, executable, preexec, close, keep, cwd, env, *more) -> None:  # type: ignore[no-untyped-def, override]
        """Fork, where Popen would start a program."""
        pipes = more[3:9]  # both ends of each standard stream's; -1 for one that is the caller's
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        ends = (p2cread, c2pwrite, errwrite)
        streams = [Stream(number if end == -1 else end) for number, end in enumerate(ends)]
        given = dict(os.environ if env is None else env)
        work = (
            args[0],
            [str(word) for word in args[1:]],
            given,
            os.fspath(cwd or Path.cwd()),
            streams,
            self._spares,
            self._enter,
        )
        self._process = PROCESSES.Process(target=_run, args=work, daemon=True)
        self._process.start()
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return int(self.returncode)


def completed(
    words: Sequence[str], module: str = "launch", timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; both of its streams are kept unless `options` say otherwise."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Command(words, module, **streams | options) as command:
        try:
            said, complained = command.communicate(timeout=timeout)
        except BaseException:
            command.kill()
            raise
    return subprocess.CompletedProcess(command.args, int(command.returncode), said, complained)


def _run(
    module: str,
    words: list[str],
    environment: Mapping[str, str],
    folder: str,
    streams: list[int],
    spares: int,
    enter: Callable[[], None] | None,
) -> NoReturn:
    if enter is not None:
        enter()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    forget_parent()
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["", *words]
    sys.path.insert(0, folder)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install()
    forget_settings()
    fill(spares)
    run_program(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
