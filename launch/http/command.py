"""`lockstep serve` and `lockstep keys`. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click
from rich.console import Console

from launch.commands.options import DAY, DEGREE, PRIORITY, FileNameType, NumberType, PathType
from launch.commands.queue import queue_option
from runtime.errors import BadRequestError

_COUNT = click.IntRange(min=0, max=10**9)


@click.command(short_help="Serve videos over HTTP.")
@queue_option
@click.option(
    "--replicas",
    type=click.IntRange(min=0, max=4096),
    default=1,
    show_default=True,
    metavar="N",
    help="Videos made at the same time; 0 leaves the queue to `lockstep queue run --keep`.",
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
    type=FileNameType(),
    multiple=True,
    default=("wan-tiny",),
    show_default=True,
    metavar="NAME|FILE",
    help="Model that is offered; may be given several times, the first is the default.",
)
@click.option(
    "--spectrum",
    "presets",
    type=FileNameType(),
    multiple=True,
    metavar="FILE",
    help="Forecasting preset that is offered beside the shipped ones; may be given several times.",
)
@click.option(
    "--lora",
    "loras",
    type=(str, FileNameType()),
    multiple=True,
    metavar="NAME FILE",
    help="LoRA that is offered under a name; may be given several times.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; others than this need --keys.")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8000,
    show_default=True,
    help="Port; 0 for a free one.",
)
@click.option("--keys", type=PathType(), help="File of keys that clients need; `lockstep keys` makes it.")
@click.option(
    "--days",
    type=NumberType(0.001, 3650.0),
    default=7.0,
    show_default=True,
    help="Days for which a video is kept after its end.",
)
@click.pass_obj
def serve(
    console: Console,
    /,
    folder: Path,
    replicas: int,
    ranks: int,
    configs: Sequence[str],
    presets: Sequence[str],
    loras: Sequence[tuple[str, str]],
    host: str,
    port: int,
    keys: Path | None,
    days: float,
) -> None:
    """Serve videos over HTTP until a signal comes, with OpenAI's contract of `/v1/videos`.

    Requests go into the queue, which a pool of replicas beside the server serves. Accepted requests survive
    whatever is killed, and are resumed. The address is printed once the server answers: docs/serve.md.
    """
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
    catalog = Catalog.of(configs, presets, loras, ranks)
    with bind(host, port, open=known.open) as bound, closing(Queue(folder.absolute())) as queue:
        pool = PoolKeeper(queue, replicas, ranks)
        bounds = Bounds(keep=days * DAY)
        run_server(Service.on(queue, catalog, known, bounds, pool.problem), pool, bound, console)


_FILE = click.option("--keys", "file", type=PathType(), required=True, help="File of keys.")


@click.group(short_help="Make and revoke keys of the server.")
def keys() -> None:
    """Make and revoke the keys that clients of `lockstep serve --keys FILE` need."""


@keys.command(short_help="Make a key.")
@click.argument("owner")
@_FILE
@click.option("--name", help="Name of the key, unique in the file.  [default: OWNER]")
@click.option(
    "--priority", type=PRIORITY, default=0, show_default=True, help="Highest priority of its requests."
)
@click.option("--queued", type=_COUNT, help="Requests of OWNER that may wait or run at a time.")
@click.option("--per-hour", type=_COUNT, help="Requests that OWNER may make within an hour.")
@click.option("--webhook", metavar="URL", help="Where to tell that a video of OWNER has ended.")
def add(
    owner: str,
    file: Path,
    name: str | None,
    priority: int,
    queued: int | None,
    per_hour: int | None,
    webhook: str | None,
) -> None:
    """Make a key for OWNER, whose videos it makes and sees, and print it: only its hash is kept.

    With --webhook, the secret that signs the messages is printed on a second line.
    """
    from launch.http.keys import add_key, make_key, new_secret, new_token

    token, secret = new_token(), new_secret()
    hook = None if webhook is None else {"url": webhook, "secret": secret}
    allowed = {"priority": priority, "queued": queued, "per_hour": per_hour, "webhook": hook}
    add_key(file, make_key(token, name=name or owner, owner=owner, **allowed))
    click.echo(token)
    if hook is not None:
        click.echo(secret)


@keys.command("list", short_help="List keys.")
@_FILE
def list_keys(file: Path) -> None:
    """List the keys of a file, one line each: name, owner, priority and quotas."""
    from launch.http.keys import read_keys

    for key in read_keys(file).keys:
        bounds = {"priority": key.priority, "queued": key.queued, "per-hour": key.per_hour}
        told = [f"{what} {value}" for what, value in bounds.items() if value is not None]
        click.echo("  ".join([key.name, f"owner {key.owner}", *told]))


@keys.command(short_help="Revoke a key.")
@click.argument("name")
@_FILE
def remove(name: str, file: Path) -> None:
    """Revoke the key NAME: a running server refuses it from the next request on."""
    from launch.http.keys import remove_key

    remove_key(file, name)
