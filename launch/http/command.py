"""`lockstep serve` and `lockstep keys`. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click
from rich.console import Console

from launch.commands.command import Command, CommandGroup
from launch.commands.queue import queue_option
from launch.commands.types import DAY, DEGREE, PRIORITY, FileNameType, NumberType, PathType
from runtime.errors import BadRequestError, JobFailedError, reason

_COUNT = click.IntRange(min=0, max=10**9)


@click.command(cls=Command, short_help="Serve an HTTP API and a web page.")
@queue_option
@click.option(
    "--replicas",
    type=click.IntRange(min=0, max=4096),
    default=1,
    show_default=True,
    metavar="N",
    help="Videos made at the same time; 0 to serve the queue with `lockstep queue run --keep` instead.",
)
@click.option(
    "--ranks",
    type=DEGREE,
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that make a video together.",
)
@click.option(
    "--config",
    "configs",
    type=FileNameType("."),
    multiple=True,
    metavar="NAME|FILE",
    help="Config that clients may choose; may be given several times, the first is the default.  "
    "[default: wan-tiny, or only --model]",
)
@click.option(
    "--model",
    "models",
    type=FileNameType(),
    multiple=True,
    metavar="FOLDER|REPOSITORY",
    help="Model that clients may choose besides those of --config, with the settings that are usual for it; "
    "may be given several times.",
)
@click.option("--revision", metavar="NAME", help="Commit or tag of the repository, if --model is given once.")
@click.option(
    "--spectrum",
    "presets",
    type=FileNameType("spectrum"),
    multiple=True,
    metavar="FILE",
    help="Forecasting preset that clients may choose, besides the shipped ones; may be given several times.",
)
@click.option(
    "--lora",
    "loras",
    type=(str, FileNameType()),
    multiple=True,
    metavar="NAME FILE",
    help="LoRA weights that clients may choose by NAME; may be given several times.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; --keys is needed if other machines can reach it.",
)
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 for a free one.",
)
@click.option(
    "--keys",
    type=PathType(),
    help="File of API keys, one of which clients must send; `lockstep keys add` makes it.",
)
@click.option(
    "--days",
    type=NumberType(0.001, 3650.0),
    default=7.0,
    show_default=True,
    metavar="NUMBER",
    help="Days to keep a video after it has ended.",
)
@click.pass_obj
def serve(
    console: Console,
    /,
    folder: Path,
    replicas: int,
    ranks: int,
    configs: Sequence[str],
    models: Sequence[str],
    revision: str | None,
    presets: Sequence[str],
    loras: Sequence[tuple[str, str]],
    host: str,
    port: int,
    keys: Path | None,
    days: float,
) -> None:
    """Serve an HTTP API for OpenAI's video client, and a web page, until Ctrl-C.

    Requests go into the queue, and a pool of replicas makes their videos. After a crash or a kill, the same
    command resumes every accepted request. The address is printed once the server is ready: docs/serve.md.
    """
    from launch.commands.build_job import check_given

    for name in configs:
        check_given(name)
    for name in models:
        check_given(None, model=name, revision=revision if len(models) == 1 else None)
    try:
        from launch.http.auth import Keys
        from launch.http.catalog import Catalog
        from launch.http.pool import PoolKeeper
        from launch.http.server import bind, run_server
        from launch.http.service import Bounds, Service
    except ModuleNotFoundError as error:
        raise BadRequestError(
            f"serve: {error.name} is not installed; install Lockstep with its extra: pip install '.[serve]'"
        ) from None
    from launch.serve.queue import Queue
    from runtime.files.checks import check_outlives

    check_outlives(folder, field="queue")
    known = Keys(keys)
    catalog = Catalog.of(configs, presets, loras, ranks, models, revision)
    with bind(host, port, open=known.open) as bound, closing(Queue(folder.absolute())) as queue:
        pool = PoolKeeper(queue, replicas, ranks)
        bounds = Bounds(keep=days * DAY)
        run_server(Service.on(queue, catalog, known, bounds, pool.problem), pool, bound, console)


_FILE = click.option("--keys", "file", type=PathType(), required=True, help="File of keys.")


@click.group(cls=CommandGroup, short_help="Add, list and remove API keys of the server.")
def keys() -> None:
    """Add, list and remove the API keys that clients of `lockstep serve --keys FILE` need."""


@keys.command(short_help="Add a key and print it.")
@click.argument("owner")
@_FILE
@click.option("--name", metavar="NAME", help="Name of the key, unique in the file.  [default: OWNER]")
@click.option(
    "--priority",
    type=PRIORITY,
    default=0,
    show_default=True,
    metavar="N",
    help="Highest priority that its requests may have.",
)
@click.option(
    "--queued", type=_COUNT, metavar="N", help="Limit on OWNER's requests that wait or run at the same time."
)
@click.option("--per-hour", type=_COUNT, metavar="N", help="Limit on OWNER's requests within an hour.")
@click.option("--webhook", metavar="URL", help="URL to notify when a video of OWNER ends.")
def add(
    owner: str,
    file: Path,
    name: str | None,
    priority: int,
    queued: int | None,
    per_hour: int | None,
    webhook: str | None,
) -> None:
    """Add a key with which OWNER's videos can be made and seen, and print it. Only its hash is stored.

    With --webhook, the secret that signs the notifications is printed on a second line.
    """
    from launch.http.keys import add_key, make_key, new_secret, new_token, remove_key

    token, secret = new_token(), new_secret()
    hook = None if webhook is None else {"url": webhook, "secret": secret}
    allowed = {"priority": priority, "queued": queued, "per_hour": per_hour, "webhook": hook}
    key = make_key(token, name=name or owner, owner=owner, **allowed)
    add_key(file, key)
    try:
        click.echo("\n".join([token, secret] if hook else [token]))
    except OSError as error:
        remove_key(file, key.name)  # nobody knows it
        raise JobFailedError(f"stdout: cannot print the key, so it was not made: {reason(error)}") from error


@keys.command("list", short_help="List keys.")
@_FILE
def list_keys(file: Path) -> None:
    """List the keys of a file, one per line: name, owner, priority and limits."""
    from launch.http.keys import read_keys

    for key in read_keys(file).keys:
        bounds = {"priority": key.priority, "queued": key.queued, "per-hour": key.per_hour}
        told = [f"{what} {value}" for what, value in bounds.items() if value is not None]
        click.echo("  ".join([key.name, f"owner {key.owner}", *told]))


@keys.command(short_help="Remove a key.")
@click.argument("name")
@_FILE
def remove(name: str, file: Path) -> None:
    """Remove the key NAME: a running server refuses it from the next request on."""
    from launch.http.keys import remove_key

    remove_key(file, name)
