"""What users name is text: no markup, no command to the terminal, no character too many for it."""

from __future__ import annotations

import ast
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest
from rich.table import Table

from launch import cli
from launch.serve.queue import Queue
from launch.shell.exits import complain, run_command
from launch.shell.logs import set_up_logging
from launch.shell.progress import StepProgress, timed
from launch.shell.terminal import Terminal, print_path, visible
from runtime.sampling.denoise import StepRecord
from spectrum import StepKind
from tests.jobs import make_job
from tests.places import ROOT

SMALL = ["--size", "64x48", "--frames", "1", "--steps", "2", "--max-sequence-length", "32"]
ODD = (
    "The end [/end]",
    "Scene one [draft]",
    "[link=file:///etc]here[/link]",
    "a [red]b",
    ":warning: 12:30",
    "back\\[slash\\]",
)
HOSTILE = "\x1b]0;owned\x07\x1b[2Jgone\x9b31m\u202etxt\rover"


def written(*things: object, **options: object) -> str:
    file = io.StringIO()
    console = Terminal(file=file, width=200, **options)
    for thing in things:
        console.print(thing)
    return file.getvalue()


def table_of(text: str) -> Table:
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    return table


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("terminal", [True, False])
def test_strings_are_text_wherever_they_stand(text: str, terminal: bool) -> None:
    said = written(text, table_of(text), force_terminal=terminal)
    assert said.count(text) == 1 + 4


@pytest.mark.parametrize("text", [*ODD, HOSTILE])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_and_logs_show_text(text: str, terminal: bool) -> None:
    file = io.StringIO()
    console = Terminal(file=file, width=200, force_terminal=terminal)
    with timed(console, text):
        pass
    with StepProgress(console, text, [StepKind.COMPUTE]) as progress:
        progress(StepRecord(0, StepKind.COMPUTE, 0.0, 1.0, None))
    before = logging.getLogger().handlers[:]
    try:
        set_up_logging(console, verbose=False)
        logging.getLogger("launch").warning("lost %s", text)
    finally:
        logging.getLogger().handlers[:] = before
    said = file.getvalue()
    shown = (
        visible(text).replace("\\x07", "").replace("\\r", "")
    )  # rich leaves these two out of its own texts
    assert said.replace("\\x07", "").replace("\\r", "").count(shown) >= 3
    assert "\x1b]0" not in said and "\x1b[2J" not in said and "\x9b" not in said and "\u202e" not in said


def test_nothing_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    complain(f"out: {HOSTILE!s} given\nand more")
    command = click.Command("c", params=[click.Option(["--n"], type=int)])
    assert run_command(command, ["--n", HOSTILE], "c") == 2
    said = written(HOSTILE, table_of(HOSTILE)) + capsys.readouterr().err
    assert said.count("gone") == 7
    assert not set(said) & set("\x1b\x07\x9b\u202e\r")
    assert "lockstep: and more" in said


class _Ascii(io.TextIOWrapper):
    """A terminal that knows ASCII alone, or a pipe."""

    def __init__(self, terminal: bool):
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def bytes(self) -> bytes:
        return self.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_without_the_characters_spells_them_out(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = _Ascii(terminal), _Ascii(terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    folder = tmp_path / "猫 [/b] 🎬"
    folder.mkdir(parents=True)
    board = folder / "film.yaml"
    board.write_text("title: Le café — 猫 [/end]\nshots: [{id: one, prompt: 猫, title: é}]\n", "utf-8")
    assert cli.run(["storyboard", str(board), "--out", str(folder / "film"), "--dry-run"]) == 0
    assert b"Le caf\\xe9 \\u2014 \\u732b [/end]: 1 shot," in out.bytes
    before = len(out.bytes)
    assert cli.run(["generate", "猫", *SMALL, "--out", str(folder / "a.mp4")]) == 0
    path = out.bytes[before:].rstrip(b"\n")
    assert (path == bytes(folder / "a.mp4")) != terminal  # programs need the real name
    assert b"[/b]" in err.bytes
    assert cli.run(["--help"]) == 0


def test_a_name_that_is_no_unicode_is_printed_as_it_is(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    print_path(Path("/caf\udce9.mp4"))
    assert capfdbinary.readouterr().out == b"/caf\xe9.mp4\n"


@pytest.mark.parametrize("name", ["take [/b]", "shots [v2]", "$x$ \\frac$", "a:b;c='d',e"])
def test_a_folders_name_is_text_from_start_to_end(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    preset = folder / "my.yaml"
    preset.write_text("schedule: {kind: paper}\npredictor: {kind: linear}\n")
    out = folder / "a.mp4"
    options = [*SMALL, "--spectrum", str(preset), "--out", str(out), "--compare"]
    assert cli.run(["generate", "a red circle", *options]) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{out}\n"
    assert f"report {folder / 'a.json'}, picture {folder / 'a.png'}" in stderr
    assert {path.name for path in folder.iterdir()} == {"my.yaml", "a.mp4", "a.json", "a.png"}


def test_a_queue_of_odd_names_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Queue(tmp_path / "queue")) as queue:
        for number, name in enumerate(ODD):
            job = make_job(tmp_path / f"{number}.mp4").absolute()
            queue.submit(job, name=name, owner="[me]")
    assert cli.run(["status", "--queue", str(tmp_path / "queue")]) == 0
    said = capfd.readouterr().out
    assert said.count("[me]") == len(ODD)
    assert all(name in said for name in ODD)
    assert "\x1b" not in said


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.py")), ids=lambda path: path.stem)
def test_no_command_has_a_console_of_its_own(path: Path) -> None:
    """Everything is shown by a `Terminal`; what rich takes for markup all the same is told not to."""
    for name, call in calls(path):
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{path.name}, line {call.lineno}: {ast.unparse(call)[:80]}"
        assert name not in ("Console", "from_markup", "render_markup", "rprint"), where
        assert told.get("markup", "False") == "False" and told.get("emoji", "False") == "False", where
        if name == "TextColumn":
            assert told.get("markup") == "False", where
        if name in ("status", "Spinner", "Status") and call.args:
            assert ast.unparse(call.args[0]).startswith("Text("), where
