"""Spare processes: forked ahead, they become the Python programs that a command starts, all imports done.

Importing takes seconds, and one command starts many programs: ranks, Ray's daemons and workers, a pool.
`install` lets torchrun's agent, Ray and servers take spare processes for them. Such a process is a child of
the one that starts it, forked when that had not begun to use torch.distributed or gRPC; its streams, folder,
environment, arguments, session and signals are those of a new one. Ray's raylet, which is no Python, is given
a spare process from which its workers and agents are forked as its children.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import inspect
import json
import logging
import os
import runpy
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import cache, partial
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from tests.ranks import PROCESSES

_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)
_DAEMONS = 3  # in Python, that Ray's first node starts
_SYMBOLS = 2  # kind of a section of an ELF file
_GUARD = b"\0_ZGVZN9RayConfig8instanceEvE6config\0"
_RAYLET = "raylet"
_FORKED = {  # commands that a raylet is given, and what becomes of the client that asks for such a process
    "--python_worker_command": "goes",
    "--dashboard_agent_command": "stays",
    "--runtime_env_agent_command": "stays",
}
_CLIENT = str(Path(__file__).with_name("spare_client.py"))
_FIRST = sys.executable
_EXECUTE, _SEARCH_AND_EXECUTE = os.execv, os.execvp
_OWN = ("spectrum", "runtime", "launch")
_MAIN = process.current_process()  # as this is imported by processes that are nobody's child
_server = 0  # process whose spare ones are the fork server's children
_spares: list[_Spare] = []
_loggers: dict[str, tuple[list[logging.Handler], int, bool, bool]] = {}
_path: list[str] = []


def install(*, served: bool = False) -> None:
    """From now on, torchrun's agent and Ray take spare processes in this process and in its forks.

    Args:
        served: in this process itself, they are children of the fork server: this one may have used gRPC.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous
    from torch.distributed.launcher import api as launcher

    from launch.http import pool
    from runtime.parallel import agent

    global _server  # noqa: PLW0603
    _server = os.getpid() if served else 0
    _note()
    if subprocess_handler.Popen is SparePopen:  # type: ignore[attr-defined]
        return
    names = partial(inspect.stack, context=0)  # with lines of source, as usual, a meeting costs 0.6 s here
    dynamic_rendezvous.inspect = SimpleNamespace(**vars(inspect) | {"stack": names})  # type: ignore
    subprocess_handler.Popen = SparePopen  # type: ignore[misc, attr-defined]
    pool.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": SparePopen})  # type: ignore
    run, launch = agent.run_on_this_machine, launcher.launch_agent

    def run_on_this_machine(ranks: int, module: str, arguments: Sequence[str]) -> int:
        fill(ranks)
        try:
            return run(ranks, module, arguments)
        finally:
            dismiss()

    def launch_agent(config: Any, *arguments: Any, **named: Any) -> Any:
        fill(config.nproc_per_node)
        try:
            return launch(config, *arguments, **named)
        finally:
            dismiss()

    agent.run_on_this_machine, launcher.launch_agent = run_on_this_machine, launch_agent
    if _guard() is not None:
        _install_for_ray()


def _install_for_ray() -> None:
    from ray._private import node, services

    start_head, start = node.Node.start_head_processes, node.Node.start_ray_processes

    def start_head_processes(self: Any) -> None:
        fill(_DAEMONS + bool(self._ray_params.ray_client_server_port) + 1)
        start_head(self)

    def start_ray_processes(self: Any) -> None:
        start(self)
        dismiss()

    services.ConsolePopen = SparePopen
    node.Node.start_head_processes = start_head_processes
    node.Node.start_ray_processes = start_ray_processes


def _note() -> None:
    """What forks are to find as it is now."""
    _loggers.clear()
    names = ["", *logging.root.manager.loggerDict]
    for name in names:
        logger = logging.getLogger(name)
        _loggers[name] = ([*logger.handlers], logger.level, logger.propagate, logger.disabled)
    _path[:] = sys.path


def fill(number: int) -> None:
    dismiss()
    _spares.extend(_Spare() for _ in range(number))


def dismiss() -> None:
    while _spares:
        _spares.pop().dismiss()


class _Spare:
    """A forked process that waits until it is told what to become, or that it is not needed."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair()
        self.process: Any = None
        with closing(theirs):
            if os.getpid() == _server:
                self.process = PROCESSES.Process(target=_serve, args=(Stream(theirs.fileno()),), daemon=True)
                self.process.start()
                self.pid = self.process.pid
                return
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            self.pid = os.fork()
            if self.pid == 0:
                self._line.close()
                for spare in _spares:
                    spare._line.close()
                _await(theirs)

    def become(self, order: Mapping[str, Any], streams: Sequence[int]) -> None:
        """Become a program; returns when it has its own session and streams."""
        _send(self._line, order, streams)
        self._line.recv(1)
        self._line.close()

    def dismiss(self) -> None:
        self._line.close()
        if self.process is not None:
            self.process.join()
            return
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _serve(line: Any) -> NoReturn:
    _note()
    _await(socket.socket(fileno=line))


class SparePopen(subprocess.Popen):  # type: ignore[type-arg]
    """Popen that takes a spare process if there is one."""

    def _execute_child(self, args, executable, preexec, close, keep, cwd, env, *more) -> None:  # type: ignore[no-untyped-def, override]
        args = [os.fsdecode(word) for word in args]
        if not _spares or (args[0] != _FIRST and Path(args[0]).name != _RAYLET):
            super()._execute_child(args, executable, preexec, close, keep, cwd, env, *more)  # type: ignore[misc]
            return
        pipes = more[3:9]  # both ends of each standard stream's; -1 for one that is the caller's
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        ends = [number if end == -1 else end for number, end in enumerate((p2cread, c2pwrite, errwrite))]
        ray = preexec is not None  # it blocks SIGINT for its own, and may let them die with it
        order = {
            "args": args,
            "environment": dict(os.environ if env is None else env),
            "folder": os.fspath(cwd or Path.cwd()),
            "session": bool(more[14]),
            "blocked": ray,
            "dies": ray and bool(inspect.getclosurevars(preexec).nonlocals["fate_share"]),
        }
        spare = _spares.pop(0)  # as process ids are in the order of the ranks
        spare.become(order, ends)
        self.pid, self._child_created, self._process = spare.pid, True, spare.process
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    _process: Any = None  # of the fork server

    def _internal_poll(self, *usual: Any, **named: Any) -> int | None:
        if self._process is None:
            code: int | None = super()._internal_poll(*usual, **named)  # type: ignore[misc]
            return code
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return int(super()._wait(timeout=timeout))  # type: ignore[misc]
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return int(self.returncode)


class Stream:
    """A file descriptor on its way to another process, where it arrives as its number there."""

    def __init__(self, number: int):
        self._number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _received, (DupFd(self._number),)


def _received(stream: Any) -> int:
    number: int = stream.detach()
    return number


def _send(line: socket.socket, order: Mapping[str, Any], streams: Sequence[int]) -> None:
    content = json.dumps(order).encode()
    line.sendmsg(
        [len(content).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
    )
    line.sendall(content)


def _receive(line: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """An order and three streams; None if the other end was closed."""
    size, streams, _, _ = socket.recv_fds(line, 4, 3)
    if not size:
        return None
    left, parts = int.from_bytes(size, "big"), []
    while left:
        parts.append(line.recv(left))
        left -= len(parts[-1])
    order: dict[str, Any] = json.loads(b"".join(parts))
    return order, streams


def _await(line: socket.socket) -> NoReturn:
    """What a spare process does."""
    try:
        received = _receive(line)
        if received is None:
            os._exit(0)
        order, streams = received
        if order["dies"]:
            _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if order["session"]:
            os.setsid()
        if order["blocked"]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        line.set_inheritable(False)
        _settle(order, streams, line)
        line.close()
        if order["args"][0] == _FIRST:
            _run_python(order["args"][1:])
        _become(order["args"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _settle(order: Mapping[str, Any], streams: Sequence[int], line: socket.socket) -> None:
    """Take streams, environment, folder and signals; all that was inherited is left alone."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if descriptor > 2 and descriptor != line.fileno():
            with suppress(OSError):
                os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    for number in signal.valid_signals():
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)
    line.send(b"r")


def _become(args: Sequence[str]) -> NoReturn:
    """Become another program; a raylet is given a process from which its workers are forked."""
    args = [*args]
    if Path(args[0]).name == _RAYLET:
        name = f"\0spare-{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(name)
        listener.listen(64)
        raylet = os.getpid()
        if os.fork() == 0:
            _prctl(_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() == raylet:
                _fork_workers(listener)
            os._exit(0)
        listener.close()
        _prctl(_SUBREAPER, 1)
        for place, arg in enumerate(args):
            option, _, command = arg.partition(f"={_FIRST} ")
            if option in _FORKED:
                args[place] = f"{option}={_FIRST} -I -S {_CLIENT} {name[1:]} {_FORKED[option]} {command}"
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    _EXECUTE(args[0], args)


def _fork_workers(listener: socket.socket) -> NoReturn:
    raylet = os.getppid()
    while True:
        line, _ = listener.accept()
        with closing(line):
            received = _receive(line)
            if received is None:
                continue
            order, streams = received
            between = os.fork()
            if between == 0:  # it ends at once, and the worker becomes the raylet's child
                if os.fork() == 0:
                    listener.close()
                    _prctl(_DEATH_SIGNAL, 0)
                    if order["kind"] == "goes":
                        _work(order, streams, line)
                    _watch(order, streams, line, raylet)
                os._exit(0)
            os.waitpid(between, 0)
            for stream in streams:
                os.close(stream)


def _work(order: Mapping[str, Any], streams: Sequence[int], line: socket.socket) -> NoReturn:
    """Become a worker of Ray; its setup_worker.py says which."""
    try:
        _settle(order, streams, line)
        line.close()
        _run_python(order["args"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _watch(order: Mapping[str, Any], streams: Sequence[int], line: socket.socket, raylet: int) -> NoReturn:
    """Become an agent of Ray, which ends with its raylet.

    The raylet ends without its agent, too: it watches the client, which sees its end of the line close when
    this process ends.
    """
    try:
        while (parent := os.getppid()) != raylet and parent != 1:
            time.sleep(0.001)
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != raylet:
            os._exit(1)
        _settle(order, streams, line)
        _run_python(order["args"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def forget_settings() -> None:
    """Let Ray read its settings from the environment again; the job of a worker is one of them.

    They are a static variable of a function. A byte says whether it was made; its symbol is a local one.
    """
    address = _guard()
    if address is not None:
        ctypes.c_byte.from_address(address).value = 0


@cache
def _guard() -> int | None:
    """Address of that byte; None if Ray's library has no such symbol: then Ray starts processes as usual."""
    import ray._raylet as library

    path = Path(library.__file__).resolve()
    data = path.read_bytes()
    start, size, count = struct.unpack_from("<Q10xHH", data, 40)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + size * number) for number in range(count)]
    for _, kind, _, _, symbols, length, link, *_ in sections:
        if kind != _SYMBOLS:
            continue
        names, extent = sections[link][4:6]
        wanted = data.find(_GUARD, names, names + extent) + 1 - names
        for name, _, _, _, value, _ in struct.iter_unpack("<IBBHQQ", data[symbols : symbols + length]):
            if name == wanted > 0:
                maps = Path("/proc/self/maps").read_text().splitlines()
                first = next(line for line in maps if line.endswith(str(path)))
                return int(first.partition("-")[0], 16) + int(value)
    return None


def _run_python(words: Sequence[str]) -> NoReturn:
    """Run what stands behind the interpreter on its command line."""
    from ray._raylet import setproctitle  # type: ignore[attr-defined]

    forget_settings()
    os.execv, os.execvp = _go_on, _go_on_from_shell  # type: ignore[assignment]
    setproctitle(" ".join([_FIRST, *words]).encode(errors="replace").decode())
    words = [*words]
    unbuffered = safe = False
    while words and words[0] in ("-u", "-P", "-I"):
        option = words.pop(0)
        unbuffered, safe = unbuffered or option == "-u", safe or option != "-u"
    _renew(unbuffered=unbuffered)
    if words[0] == "-m":
        module, sys.argv = words[1], ["-m", *words[2:]]
        sys.modules.pop(module, None)
        if not safe:
            sys.path.insert(0, str(Path.cwd()))
        run_program(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    run_program(lambda: runpy.run_path(words[0], run_name="__main__"))


def run_program(run: Callable[[], object]) -> NoReturn:
    """Run a program, and end as Python does."""
    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    _end_python(code)


def _go_on(path: str, args: Sequence[str]) -> NoReturn:
    """As os.execv, but this interpreter goes on as it is."""
    if path == _FIRST:
        _run_python(args[1:])
    _EXECUTE(path, args)


def _go_on_from_shell(file: str, args: Sequence[str]) -> NoReturn:
    """As os.execvp, but where a shell would start this interpreter, perhaps in a job's folder, it goes on."""
    words = shlex.split(args[-1]) if file == "bash" else []
    folder = words[1] if words[:1] == ["cd"] and words[2:3] == ["&&"] else ""
    program = words[3:] if folder else words
    if program[:2] != ["exec", _FIRST]:
        _SEARCH_AND_EXECUTE(file, args)
    if folder:
        os.chdir(folder)
        _path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        for name in [*sys.modules]:
            if name.partition(".")[0] in _OWN:  # the folder has its own
                del sys.modules[name]
    _run_python(program[2:])


def forget_parent() -> None:
    """Let this be nobody's child by `multiprocessing`, whose helpers' pipes are closed now."""
    process._current_process = _MAIN  # type: ignore[attr-defined]
    process._parent_process, process._children = None, set()  # type: ignore[attr-defined]
    for module in (resource_tracker, forkserver):
        importlib.reload(module)


def _renew(*, unbuffered: bool = False) -> None:
    """Let Python be as after its start, with its modules."""
    forget_parent()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if unbuffered:
        sys.stdout.reconfigure(write_through=True)
    sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.path[:] = _path
    sys.excepthook = sys.__excepthook__
    for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]:
        if isinstance(logger, logging.Logger):
            handlers, level, propagate, disabled = _loggers.get(name, ([], logging.NOTSET, True, False))
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled
            logger.level = level  # setLevel would clear the cache of all loggers for each of them
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]
    warnings.resetwarnings()
    tempfile.tempdir = None
    if "click.globals" in sys.modules:
        sys.modules["click.globals"]._local.__dict__.clear()
    gc.enable()


def _end_python(code: object) -> NoReturn:
    """End as Python does."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
