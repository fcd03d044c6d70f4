"""The lines that a pool prints while it serves a queue."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from launch.cluster.group import Begun, End, Ended
from launch.serve.events import print_event
from launch.shell.terminal import Terminal
from spectrum import StepKind

WARNED = json.dumps({"warnings": ["the video is of one colour"]})


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        (Begun("spectrum", [StepKind.COMPUTE]), ["a: begins (spectrum), try 2"]),
        (Ended(End.DONE), ["a: done"]),
        (Ended(End.DONE, report=WARNED), ["a: done", "a: warning: the video is of one colour"]),
        (Ended(End.FAILED, "rank 0 died"), ["a: failed: rank 0 died"]),
    ],
)
def test_a_line_says_what_happened_and_no_more(
    event: Begun | Ended, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_event(Terminal(stderr=True), SimpleNamespace(name="a", tries=2), event, None)
    assert capsys.readouterr().err == "".join(line + "\n" for line in lines)
