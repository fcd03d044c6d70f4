"""Fuzzing: mutate valid input of every kind and check how Lockstep handles it (`make fuzz`).

    python scripts/fuzz.py --seconds 600 --seed 1 [--only storyboard]

Requests, configs, presets, calibrations, storyboards, checkpoints, reports, queues, LoRA files, model folders
and images are truncated, corrupted, and filled with unexpected values. Each must be accepted or refused with
`BadRequestError`, within seconds and within a memory limit, without writing outside its own folder, starting
a program or contacting another machine. Failing inputs are kept in `out/fuzz/`, minimised by hypothesis.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_targets import Target, targets
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from runtime.errors import BadRequestError

SECONDS, MEMORY = 20, 4 * 2**30  # that one input may take
_HEAD = 20_000  # bytes of a file in which words are replaced
_WORDS = [
    *(b"", b"null", b"~", b"[]", b"{}", b"true", b"off", b"no", b"''", b'"x"', b"x", b"../../x", b"~root/x"),
    *(b"0", b"-1", b"2.5", b"021", b"12:30", b"1e5", b"1e400", b"-.inf", b".nan", b"NaN", b"Infinity", b"/"),
    *(b"9" * 25, b"9" * 5000, b"-" + b"9" * 400, b"2024-02-30", b"0b_", b"!!bool x", b"!x", b"&a [*a]"),
    *(b"*a", b"<<", b": ", b"[" * 200, b'{"a":' * 300, b"[" * 5000, b'{"a":' * 2000),
    *(b"\\ud800", b"\\u0000", b"\0", b"\xff"),
    *(b"\xef\xbb\xbf", b"\x1b[2J", b"\n\n", "猫".encode(), "\u2028".encode(), b"a" * 30_000, b"[/a]"),
    *(b"%s", b"---\n", b"? ", b"- ", b"#", b"\t", b"\r"),
]  # fmt: skip


@dataclass(slots=True)
class Tally:
    """Outcomes of a target's inputs; `seconds` is the time of the slowest."""

    taken: int = 0
    refused: int = 0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.taken + self.refused


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Mutate a valid file by up to three changes."""
    suffix, original = draw(st.sampled_from(valid))
    content = bytearray(original)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 8, 100, 5000]))
        match draw(
            st.sampled_from(["word", "word", "word", "flip", "cut", "drop", "repeat", "insert", "any"])
        ):
            case "word":
                found = list(re.finditer(rb"[\w.+/-]+", bytes(content[:_HEAD])))
                if found:
                    place = draw(st.sampled_from(found))
                    content[place.start() : place.end()] = draw(st.sampled_from(_WORDS))
            case "flip":
                if content:
                    content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + length]
            case "repeat":
                content[at:at] = content[at : at + length]
            case "insert":
                content[at:at] = draw(st.sampled_from(_WORDS))
            case _:
                content[at:at] = draw(st.binary(max_size=20))
    return suffix, bytes(content)


def check(target: Target, number: int, tally: Tally, examples: int | None = None) -> None:
    """Run one round of a target.

    Raises:
        Exception: an input raised it, and it is not a refusal; its attribute `failing` is the file.
    """

    @seed(number)
    @settings(
        max_examples=examples or target.examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(mutated(target.valid))
    def round_(file: tuple[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-") as folder:
            path = Path(folder) / f"input{file[0]}"
            path.write_bytes(file[1])
            begun = time.monotonic()
            try:
                with _within(SECONDS), _staying_in(folder):
                    target.load(path)
                tally.taken += 1
            except BadRequestError:
                tally.refused += 1
            except (Exception, _Breach) as error:
                found = OutOfBoundsError(str(error)) if isinstance(error, _Breach) else error
                found.failing = file  # type: ignore[attr-defined]
                raise found from None
            finally:
                tally.seconds = max(tally.seconds, time.monotonic() - begun)

    round_()


class OutOfBoundsError(Exception):
    """An input took too long, or caused something that no input may cause."""


class _Breach(BaseException):
    """Like `OutOfBoundsError`, raised where it happens; no code catches it as an error of its own."""


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Breach(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(5 * seconds, exit=True)  # for code that hears no signal
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_allowed: list[str] = []  # folders, while an input is looked at
_REACHES = {
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "socket.connect",
    "socket.getaddrinfo",
}
_MOVES = {  # positions of paths among the event's arguments
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"), (0,)),
    **dict.fromkeys(("sqlite3.connect", "os.utime"), (0,)),
    **dict.fromkeys(("os.rename", "os.link"), (0, 1)),
    "os.symlink": (1,),
}


@sys.addaudithook
def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event in _REACHES:
        raise _Breach(f"{event} of {str(arguments)[:200]}")
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _check_place(event, arguments[0], follows=True)
    for place in _MOVES.get(event, ()):
        _check_place(event, arguments[place], follows=event == "sqlite3.connect")


def _check_place(event: str, path: object, *, follows: bool) -> None:
    """Check a path that is written to; moving or removing a link does not follow it."""
    if isinstance(path, str | bytes | os.PathLike):
        given_ = Path(os.fsdecode(path)).absolute()
        place = given_.resolve() if follows else given_.parent.resolve() / given_.name
        if (
            not place.is_relative_to(_allowed[0])
            and str(place) != os.devnull
            and "__pycache__" not in place.parts
        ):
            raise _Breach(f"{event} of {str(place)!r}")


@contextmanager
def _staying_in(folder: str) -> Iterator[None]:
    """Forbid writes outside the folder, programs and connections within the context."""
    _allowed.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _allowed.clear()


def run(seconds: float, number: int, only: Sequence[str], out: Path) -> int:
    """Run rounds of every target in turn until the time is over; return the number of failures.

    A target that has failed is skipped from then on: it would mostly find the same failure again.
    """
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-") as scratch:
        chosen = {one.name: one for one in targets(Path(scratch)) if not only or one.name in only}
        tallies, failed = {name: Tally() for name in chosen}, set[str]()
        while time.monotonic() < ends and len(failed) < len(chosen):
            for name in [name for name in chosen if name not in failed]:
                if time.monotonic() > ends:
                    break
                try:
                    check(chosen[name], number, tallies[name])
                except Exception as error:
                    failed.add(name)
                    _keep(chosen[name], error, number, out)
            number += 1
    for name, tally in tallies.items():
        print(
            f"{name:12}{tally.inputs:7} inputs: {tally.taken:6} taken, {tally.refused:6} refused, "
            f"{int(name in failed)} failed; the slowest took {tally.seconds:.1f} s"
        )
    inputs = sum(tally.inputs for tally in tallies.values())
    print(f"{inputs} inputs, {len(failed)} failures; the next seed is {number}")
    return len(failed)


def _keep(target: Target, error: Exception, number: int, out: Path) -> None:
    suffix, content = getattr(error, "failing", ("", b""))
    path = out / f"{target.name}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"
    out.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    trace, places = error.__traceback__, []
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    print(f"{target.name}, seed {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"  {' '.join(places[-6:])}\n  {path}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="A target's name; may be repeated.")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    return 1 if run(given_.seconds, given_.seed, given_.only, given_.out) else 0


if __name__ == "__main__":
    sys.exit(main())
