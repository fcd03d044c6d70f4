"""`lockstep queue add | cancel | run` and `lockstep status`. Imports nothing slow."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from launch.commands.command import Command, CommandGroup
from launch.commands.options import generate_options
from launch.commands.types import DEGREE, EXPIRY, ID, PRIORITY, REPLICAS, PathType
from launch.shell.exits import advising, only_while_heard
from launch.shell.terminal import Terminal, counted
from runtime.errors import BadRequestError, CancelledError, JobFailedError

if TYPE_CHECKING:
    from runtime.jobs.job import Job

_REFRESH = 1.0  # seconds
_OPEN = ("waiting", "running")  # requests that have not ended
_Command = TypeVar("_Command", bound=Callable[..., Any])


def queue_option(command: _Command) -> _Command:
    """Add the option `--queue`."""
    return click.option(
        "--queue",
        "folder",
        type=PathType(),
        default=Path("queue"),
        show_default=True,
        help="Folder of the queue.",
    )(command)


@click.group(cls=CommandGroup, short_help="Add, cancel and serve requests.")
def queue() -> None:
    """Add requests to a queue, cancel them, and serve the queue with replicas on Ray.

    A queue is a folder; its requests are kept while no replica runs. `lockstep status` shows it.
    """


@queue.command(short_help="Add a request for a video.")
@generate_options
@queue_option
@click.option("--name", help="Name of the request, unique in the queue.  [default: made from its number]")
@click.option(
    "--owner", help="Owner of the request; owners share the replicas fairly.  [default: your user name]"
)
@click.option(
    "--priority",
    type=PRIORITY,
    default=0,
    show_default=True,
    metavar="N",
    help="Requests of higher priority run first.",
)
@click.option("--expires", type=EXPIRY, metavar="SECONDS", help="Cancel the request after this time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the numbers.")
def add(
    folder: Path,
    name: str | None,
    owner: str | None,
    priority: int,
    expires: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Add a request for a video of PROMPT and print its number. Takes the options of `generate`.

    With --prompts, add one request for each line of a file, or none if one of them is invalid.
    """
    from launch.commands.build_job import build_batch
    from launch.serve.submission import submit_all

    batch = build_batch(**options)
    if name is not None and options["prompts"] is not None:
        raise BadRequestError(f"name: {name!r} given; the requests of a file get their own names")
    added = submit_all(folder, batch, name=name, owner=owner, priority=priority, expires=expires)
    if as_json:
        click.echo(json.dumps({"requests": [_added(*one) for one in zip(added, batch.jobs, strict=True)]}))
        return
    for number in added:
        click.echo(number)
    for told in dict.fromkeys(job.told for job in batch.jobs if job.chosen):
        click.echo(told, err=True)


def _added(number: int, job: Job) -> dict[str, Any]:
    preset = {"preset": job.request.preset, "chosen": job.chosen or None}
    return {"number": number, "prompt": job.request.prompt, "out": str(job.outputs.video), **preset}


@queue.command(short_help="Cancel requests.")
@queue_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("requests", nargs=-1, required=True, type=ID)
def cancel(folder: Path, requests: tuple[int, ...], as_json: bool) -> None:
    """Cancel REQUESTS, given by their numbers: waiting ones end now, running ones after the current step.

    Requests that have ended already are not changed, nor are their files; stderr names them. If one of the
    numbers is unknown, none is cancelled.
    """
    with _opened(folder, must_exist=True) as opened, opened.transaction() as base:
        before = {request: opened.cancel_in(base, request) for request in requests}
    if as_json:
        told = [{"number": request, "was": str(state)} for request, state in before.items()]
        click.echo(json.dumps({"requests": told}))
        return
    for request, state in before.items():
        if state not in _OPEN:
            click.echo(f"request {request} is {state} already: it and its files are not changed", err=True)


@queue.command("run", short_help="Serve the queue.")
@queue_option
@click.option(
    "--replicas",
    type=REPLICAS,
    default=1,
    show_default=True,
    metavar="N",
    help="Requests served at the same time.",
)
@click.option(
    "--ranks",
    type=DEGREE,
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks per request, for requests that are added later.",
)
@click.option("--keep", is_flag=True, help="Keep waiting for requests when the queue is empty.")
@click.option(
    "--previews", is_flag=True, help="Write a preview of each running request into the queue's folder."
)
@click.pass_obj
def serve(console: Console, /, folder: Path, replicas: int, ranks: int, keep: bool, previews: bool) -> None:
    """Serve the queue until it is empty, on the Ray cluster of RAY_ADDRESS or on a local one."""
    from launch.serve.entries import State

    with _opened(folder, must_exist=True) as opened, opened.served():  # refused before Ray is imported
        before = opened.count()
        cores = _cores([ranks, *(_world(entry) for entry in opened.entries(*_OPEN))], replicas)
    from launch.cluster.cluster import on_cluster

    about = {"queue": str(folder.absolute()), "replicas": str(replicas)}
    with advising(partial(_release, folder)):
        serving = partial(_serve, folder, replicas, keep, previews, console)
        stopped = on_cluster(cores, about, serving, console)
    with _opened(folder, must_exist=True) as opened:
        ended = {state: count - before[state] for state, count in opened.count().items()}
    console.print(
        ", ".join(f"{ended[state]} {state}" for state in (State.DONE, State.FAILED, State.CANCELLED))
    )
    if stopped:
        raise CancelledError("stopped; requests that were running wait in the queue again")
    if ended[State.FAILED]:
        failed, where = counted(ended[State.FAILED], "request"), shlex.quote(str(folder))
        raise JobFailedError(f"{failed} failed: see `lockstep status --all --queue {where}`")


def _release(folder: Path) -> str:
    """Let requests that a lost driver was running wait again; returns how to continue."""
    with suppress(BadRequestError, JobFailedError), _opened(folder, must_exist=True) as opened:
        with opened.served():  # fails if another pool serves the queue
            left = len(opened.entries(*_OPEN))
        return "the same command serves the requests that have not ended" if left else ""
    return ""


def _serve(folder: Path, replicas: int, keep: bool, previews: bool, console: Console, driver: Any) -> bool:
    """Serve the queue, in a driver process; returns whether it was told to stop."""
    from launch.serve.events import print_event
    from launch.serve.pool import ReplicaPool

    with _opened(folder, must_exist=True) as opened:
        pool = ReplicaPool(
            opened,
            replicas,
            partial(print_event, console),
            driver.pulse,
            driver.look,
            how_to_resume,
            previews,
        )
        with driver.stopped_by_signals(pool.stop):
            pool.run(keep=keep, again=driver.again)
        return pool.ending


def how_to_resume(entry: Any) -> str:
    """Return how to resume a request that ended early and whose checkpoints are kept; else empty."""
    if entry.through_api:
        return ""
    try:
        job = entry.job
        options, first = job.options_to_go_on(), job.first_to_do()
    except (BadRequestError, OSError):
        return ""
    if options is None:
        return ""
    if entry.name != f"request-{entry.id}":
        options = [*options, "another --name"]
    also = f" with {' and '.join(options)}" if options else ""
    kept = f"its checkpoints are kept in {str(job.checkpoints.root)!r}"
    return f"{kept}: {first}the same `lockstep queue add`{also} resumes from the last"


def _cores(worlds: list[int], replicas: int) -> int:
    """Return the number of cores that a local Ray gets. Requests with too many ranks for this machine are
    ignored: they will fail when their turn comes, and the others will not."""
    from runtime.parallel.devices import check_room

    cores = replicas
    for wanted in [count * world for world in worlds for count in (1, replicas)]:
        with suppress(BadRequestError):
            check_room(wanted, "cpu")
            cores = max(cores, wanted)
    return cores


def _world(entry: Any) -> int:
    """Return the ranks that a request needs; 1 if it cannot be read, as it will fail when its turn comes."""
    try:
        return int(entry.job.world)
    except BadRequestError:
        return 1


@click.command(cls=Command, short_help="Show a queue.")
@queue_option
@click.option("--watch", is_flag=True, help="Refresh once a second until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--all", "ended", is_flag=True, help="Also show requests that have ended.")
def status(folder: Path, watch: bool, as_json: bool, ended: bool) -> None:
    """Show a queue: requests, their steps and time left, and which ranks run on which nodes."""
    from launch.serve.entries import State
    from launch.serve.status import tables

    states = tuple(State) if ended else _OPEN
    with _opened(folder, must_exist=True) as opened, only_while_heard():
        if as_json:
            requests = [{**asdict(entry), "text": _content(entry.text)} for entry in opened.entries(*states)]
            replicas = [asdict(replica) for replica in opened.replicas()]
            click.echo(
                json.dumps({"count": opened.count(), "requests": requests, "replicas": replicas}, indent=2)
            )
            return
        console = Terminal()
        while True:
            if watch:
                console.clear()
            for table in tables(opened, states):
                console.print(table)
            if not watch:
                return
            time.sleep(_REFRESH)


def _content(text: str) -> Any:
    """Parse JSON; a text that is not JSON is shown as it is, and will fail when its turn comes."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@contextmanager
def _opened(folder: Path, *, must_exist: bool = False) -> Iterator[Any]:
    from launch.serve.queue import Queue
    from runtime.files.checks import check_outlives, refusing

    check_outlives(folder, field="queue")
    with refusing("queue", folder):
        missing = not (folder / "queue.sqlite").is_file()
    if must_exist and missing:
        raise BadRequestError(
            f"queue: {str(folder)!r} given; there is no queue in this folder, `lockstep queue add` makes one"
        )
    with closing(Queue(folder)) as opened:
        yield opened
