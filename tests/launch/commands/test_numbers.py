"""Numbers on the command line: what is not one, not finite or beyond all sense ends with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import cli

HUGE = "1" + "0" * 20
GENERATE, QUEUE = ["generate", "x"], ["queue", "add", "x"]
FLOATS = [
    (GENERATE, ["--timeout", "{}"], "a number from 1 to 604800"),
    (GENERATE, ["--lora", "a.safetensors", "{}"], "a number from -1000 to 1000"),
    (GENERATE, ["--guidance", "{}"], "guidance"),
    (GENERATE, ["--deadline", "{}"], "deadline"),
    (QUEUE, ["--expires", "{}"], "a number from 0.001 to"),
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
