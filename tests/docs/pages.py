"""Blocks of the documentation that a reader runs or writes, and a reader who does so in a folder.

A `bash` block is commands, a line each; a `python` block is a part of the page's program; a `yaml` or `toml`
block whose first line is a comment with a file's name is that file, as is such a `python` block.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from tests.forked import completed
from tests.places import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"# (\S+\.\w+)\n")
_TEXTS = ("", "json")  # languages of blocks that show what others write: pictures, answers, output


@dataclass(frozen=True, slots=True)
class Piece:
    """What is run, written or left out as a whole: a command, or a block.

    Attributes:
        page: name of the page.
        line: line of the page on which it begins.
        language: `bash`, `python`, or that of a file.
        text: the command on one line without its comment, or the block's content.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.text.splitlines()[0]}"

    @property
    def file(self) -> str | None:
        """Name of the file that it is; None for others."""
        found = _NAME.match(self.text)
        return None if found is None or self.language == "bash" else found[1]


def pieces(page: Path) -> Iterator[Piece]:
    """Pieces of a page, in order."""
    name = str(page.relative_to(ROOT))
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        language, content = fence.groups()
        line = text.count("\n", 0, fence.start()) + 2
        if language == "bash":
            for number, command in _commands(content):
                yield Piece(name, line + number, language, command)
        elif language not in _TEXTS:
            yield Piece(name, line, language, content)


def _commands(content: str) -> Iterator[tuple[int, str]]:
    """Commands of a block with the numbers of their lines; those that go on on the next are joined."""
    begun, start = "", 0
    for number, line in enumerate(content.splitlines()):
        start = start if begun else number
        begun += line
        if begun.endswith("\\"):
            begun = begun[:-1] + " "
            continue
        words = shlex.split(begun, comments=True)
        if words:
            yield start, shlex.join(words).replace("'>'", ">")
        begun = ""


@dataclass(slots=True)
class Reader:
    """Somebody who follows a page in an empty folder, with a home of their own.

    Attributes:
        folder: where files are written and commands are run.
        names: what the page's program has defined so far.
    """

    folder: Path
    capfd: pytest.CaptureFixture[str]
    names: dict[str, Any] = field(default_factory=dict)

    def follow(self, piece: Piece) -> None:
        """Do what a piece says.

        Raises:
            AssertionError: a command ended with another exit code than 0.
        """
        if piece.language == "bash":
            self.run(piece.text)
            return
        if piece.file is not None:
            (self.folder / piece.file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / piece.file).write_text(piece.text, encoding="utf-8")
        if piece.language == "python":
            exec(compile(piece.text, str(piece), "exec"), self.names)

    def run(self, command: str) -> None:
        """Run one of Lockstep's commands; in a process of its own if it starts a Ray cluster."""
        words = shlex.split(command)
        entry = ["lockstep"] if words[0] == "lockstep" else ["python", "-m", "launch"]
        assert words[: len(entry)] == entry, f"{command}: who runs this?"
        words, out = words[len(entry) :], None
        if ">" in words:
            out, words = words[-1], words[: words.index(">")]
        if "PROMPT" in words and "--out" not in words:  # in place of the one before, not after it
            for path in self.folder.glob("video.*"):
                path.unlink()
        if _starts_ray(words):
            done = completed(words, cwd=self.folder)
            code, said, complained = done.returncode, done.stdout, done.stderr
        else:
            self.capfd.readouterr()
            code = cli.run(words)
            said, complained = self.capfd.readouterr()
        assert code == 0, f"{command} ended with {code}: {complained}"
        if out is not None:
            (self.folder / out).write_text(said, encoding="utf-8")


def _starts_ray(words: list[str]) -> bool:
    makes_film = words[0] == "storyboard" and not {"--dry-run", "--prune", "--schema"} & {*words}
    return makes_film or words[:2] == ["queue", "run"] or (words[0] == "generate" and "--ranks" in words)
