"""What a shell completes, and help that lists options by purpose."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
from click.shell_completion import ShellComplete

from launch import cli


def completed(*words: str) -> list[tuple[str, str]]:
    """What the last word may become, with its kind: `plain`, or `file` for a path of a file."""
    shell = ShellComplete(cli.cli, {}, "lockstep", "_LOCKSTEP_COMPLETE")
    *before, last = words
    return [(item.value, item.type) for item in shell.get_completions(before, last)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["gen"], [("generate", "plain")]),
        (["queue", ""], [("add", "plain"), ("cancel", "plain"), ("run", "plain")]),
        (["generate", "a", "--perf"], [("--performance", "plain")]),
        (["generate", "a", "--performance", "fas"], [("fast", "plain"), ("fastest", "plain")]),
        (["generate", "a", "--spectrum", "planned-e"], [("planned-experts-14", "plain")]),
        (["generate", "a", "--spectrum", "./m"], [("./m", "file")]),
        (
            ["generate", "a", "--config", "wan2.2-ti"],
            [(f"wan2.2-{name}", "plain") for name in ("ti2v-5b-720p", "ti2v-5b-720p-fastwan", "tiny")],
        ),
        (["generate", "a", "--prompts", "p"], [("p", "file")]),
        (["compare", "a", "--preset", "paper-"], [("paper-fast", "plain")]),
        (["config", "wan-"], [("wan-tiny", "plain")]),
        (["status", "--q"], [("--queue", "plain"), ("--quiet", "plain")]),
    ],
)
def test_a_shell_completes(words: list[str], found: list[tuple[str, str]]) -> None:
    assert completed(*words) == found


def helps(group: click.Group, *names: str) -> Iterator[list[str]]:
    """The words of every command and group."""
    yield [*names]
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from helps(command, *names, name)
        else:
            yield [*names, name]


@pytest.mark.parametrize("words", [*helps(cli.cli)], ids=lambda words: " ".join(["lockstep", *words]))
def test_help_fits_a_terminal_of_80_columns_and_cuts_no_summary(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([*words, "--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert [line for line in lines if re.match(r"  \w+ .*\.\.\.$", line)] == []


def test_long_help_lists_every_option_once_under_its_purpose(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(["generate", "--help"]) == 0
    said = capfd.readouterr().out
    purposes = re.findall(r"^([A-Z][\w ]+):$", said, re.MULTILINE)
    assert purposes[0] == "What to make" and purposes[-1] == "Options" and len(purposes) == 7
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", said, re.MULTILINE)
    options = [one for one in cli.generate.params if isinstance(one, click.Option)]
    assert sorted(shown) == sorted([*(one.opts[-1] for one in options), "--help"])
    own = said.partition("\nOptions:\n")[2]
    assert re.findall(r"--[\w-]+", own) == ["--verbose", "--quiet", "--help"]
