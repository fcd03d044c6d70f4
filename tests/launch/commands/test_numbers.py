"""Numbers on the command line: what is not one, not finite or beyond all sense ends with exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from launch import cli
from launch.commands.types import NumberType

HUGE = "1" + "0" * 20
GENERATE, QUEUE = ["generate", "x"], ["queue", "add", "x"]
FLOATS = [
    (GENERATE, ["--timeout", "{}"], "a number from 1 to 604800"),
    (GENERATE, ["--lora", "a.safetensors={}"], "a number from -1000 to 1000"),
    (GENERATE, ["--guidance", "{}"], "guidance"),
    (GENERATE, ["--guidance-2", "{}"], "guidance"),
    (GENERATE, ["--deadline", "{}"], "deadline"),
    (QUEUE, ["--expires", "{}"], "a number from 1 to"),
    (["storyboard", "film.yaml"], ["--price", "{}"], "a number from 0 to 1e+09"),
    (["plan", "wan-tiny"], ["--psnr", "{}"], "a number from 0 to 1000"),
    (["plan", "wan-tiny"], ["--seconds", "{}"], "a number from 0 to 3.1536e+08"),
    (["calibrate", "--out", "a.json"], ["--timeout", "{}"], "a number from 1 to 604800"),
]
WHOLE = [
    (GENERATE, ["--seed", "{}"]),
    (GENERATE, ["--steps", "{}"]),
    (GENERATE, ["--frames", "{}"]),
    (GENERATE, ["--size", "{}x16"]),
    (GENERATE, ["--size", "16X{}"]),
    (GENERATE, ["--videos", "{}"]),
    (GENERATE, ["--max-sequence-length", "{}"]),
    (GENERATE, ["--ranks", "{}"]),
    (GENERATE, ["--ring", "{}"]),
    (GENERATE, ["--checkpoint-every", "{}"]),
    (QUEUE, ["--priority", "{}"]),
    (["queue", "cancel"], ["--", "{}"]),
    (["queue", "run"], ["--replicas", "{}"]),
    (["storyboard", "film.yaml"], ["--replicas", "{}"]),
    (["storyboard", "film.yaml"], ["--ranks", "{}"]),
    (["plan", "wan-tiny"], ["--nfe", "{}"]),
    (["calibrate", "--out", "a.json"], ["--seed", "{}"]),
    (["compare", "x"], ["--seed", "{}"]),
]
TOO_SMALL = [
    (GENERATE, ["--deadline", "1e-9"], "deadline: 1e-09 given; should be greater than or equal to 0.01"),
    (GENERATE, ["--timeout", "1e-9"], "'1e-9' given; a number from 1 to 604800 is needed"),
    (GENERATE, ["--busy-timeout", "0.5"], "'0.5' given; a number from 1 to 604800 is needed"),
    (QUEUE, ["--expires", "1e-9"], "'1e-9' given; a number from 1 to 3.1536e+08 is needed"),
    (GENERATE, ["--checkpoint-every", "-1"], "-1 is not in the range 0<=x<=1000000"),
    (GENERATE, ["--guidance", "-1e-9"], "guidance: -1e-09 given; should be greater than or equal to 0"),
    (GENERATE, ["--videos", "0"], "videos: 0 given; should be greater than or equal to 1"),
]
NEEDED = {  # arguments that a command cannot do without
    "generate": ["x"], "compare": ["x"], "calibrate": ["--out", "a.json"], "plan": ["wan-tiny"],
    "storyboard": ["film.yaml"], "add": ["x"],
}  # fmt: skip


def numbers() -> Iterator[tuple[list[str], str, list[str]]]:
    """Every option of every command that takes a number: the command, the option, what each value needs."""

    def commands(group: click.Group, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                yield from commands(command, [*path, name])
            else:
                yield [*path, name], command

    for path, command in commands(cli.cli, []):
        for option in command.params:
            kind = option.type
            last = kind.types[-1] if isinstance(kind, click.Tuple) else kind
            if isinstance(option, click.Option) and isinstance(last, NUMERIC):
                before = ["a"] * (option.nargs - 1)
                yield [*path, *NEEDED.get(path[-1], [])], option.opts[-1], before


NUMERIC = (type(click.INT), type(click.FLOAT), click.IntRange, click.FloatRange, NumberType)
NUMBERS = list(numbers())


def refused(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> str:
    """What is said of arguments that are refused, having written nothing."""
    monkeypatch.chdir(folder)
    assert cli.run(arguments) == 2
    said = capfd.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert list(folder.iterdir()) == []
    return " ".join(said.err.split())


@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}"])
@pytest.mark.parametrize(("command", "option", "before"), NUMBERS, ids="".join)
def test_every_number_has_bounds(
    command: list[str],
    option: str,
    before: list[str],
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And is refused for them, by its name."""
    said = refused([*command, option, *before, value], tmp_path, monkeypatch, capfd)
    assert option in said or option.removeprefix("--").replace("-", "_") in said


def test_every_command_s_numbers_are_found() -> None:
    found = {(command[0], option) for command, option, _ in NUMBERS}
    assert len(found) > 40
    assert {("generate", "--deadline"), ("generate", "--lora"), ("queue", "--expires")} <= found


@pytest.mark.parametrize(("command", "option", "said"), TOO_SMALL)
def test_a_number_is_not_too_small_to_mean_anything(
    command: list[str],
    option: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert said in refused([*command, *option], tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1e400", "1e18", "many"])
@pytest.mark.parametrize(("command", "option", "said"), FLOATS)
def test_a_number_is_finite_and_within_its_bounds(
    command: list[str],
    option: list[str],
    said: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = command + [word.format(value) for word in option]
    assert said in refused(arguments, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}", "1" * 5000, "nan", "2.5"])
@pytest.mark.parametrize(("command", "option"), WHOLE)
def test_a_whole_number_is_within_its_bounds(
    command: list[str],
    option: list[str],
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = command + [word.format(value) for word in option]
    assert value in refused(arguments, tmp_path, monkeypatch, capfd)
