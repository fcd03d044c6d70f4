"""`lockstep keys` and `lockstep serve`: what they print, and what they refuse before anything starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.http.auth import Keys
from launch.http.keys import read_keys


def run(*arguments: str) -> int:
    return cli.run([*arguments])


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.yaml")
    assert (
        run("keys", "add", "ann", "--keys", file, "--priority", "5", "--queued", "3", "--per-hour", "9") == 0
    )
    token = capsys.readouterr().out.strip()
    assert run("keys", "add", "bob", "--name", "b", "--keys", file, "--webhook", "https://example.org/h") == 0
    other, secret = capsys.readouterr().out.split()
    keys = Keys(Path(file))
    assert keys.of(token).owner == "ann" and keys.of(other).name == "b"
    [_, bob] = read_keys(Path(file)).keys
    assert bob.webhook is not None and bob.webhook.secret == secret
    assert run("keys", "list", "--keys", file) == 0
    listed = capsys.readouterr().out
    assert listed.splitlines() == [
        "ann  owner ann  priority 5  queued 3  per-hour 9",
        "b  owner bob  priority 0",
    ]
    assert run("keys", "remove", "b", "--keys", file) == 0
    assert [key.name for key in read_keys(Path(file)).keys] == ["ann"]
    for wrong, said in (
        (["add", "ann"], "has a key of this name"),
        (["add", " "], "owner: ' ' given; must be one line of text"),
        (["add", "eve", "--webhook", "ftp://x"], "webhook.url"),
        (["remove", "eve"], "name: 'eve' given; the keys are ann"),
    ):
        capsys.readouterr()
        assert run("keys", *wrong, "--keys", file) == 2
        assert said in capsys.readouterr().err


def test_a_server_that_cannot_serve_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, lora = tmp_path / "keys.yaml", str(tmp_path / "missing.safetensors")
    keys.write_text("keys: []")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (
                ["--host", "0.0.0.0"],
                "host: '0.0.0.0' given; without --keys the server listens only on this machine",
            ),
            (["--host", "nowhere.invalid"], "host, port: 'nowhere.invalid', 8000 given"),
            (["--port", port], f"host, port: '127.0.0.1', {port} given; "),
            (["--keys", str(tmp_path / "none.yaml")], "keys: "),
            (["--keys", str(keys)], "has no key"),
            (["--config", "nothing"], "config: 'nothing' given"),
            (["--model", str(tmp_path / "none")], "none"),
            (["--model", "wan-tiny", "--model", "wan2.2-tiny", "--revision", "v1"], "it needs one --model"),
            (["--revision", "v1"], "revision: 'v1' given with 0 models; it needs one --model"),
            (["--config", "wan-tiny", "--model", "wan-tiny"], "has the same name, rename one"),
            (["--spectrum", "nothing"], "spectrum: 'nothing' given"),
            (["--lora", "mine", lora], f"lora: {lora!r} given"),
            (
                ["--lora", "my own", str(keys)],
                "lora: 'my own' given; clients can only choose names of letters",
            ),
            (["--lora", "mine", str(keys), "--lora", "mine", str(keys)], "has the same name, rename one"),
            (["--days", "0"], "--days"),
        ):
            assert run("serve", "--queue", str(tmp_path / "queue"), *arguments) == 2, arguments
            assert said in capsys.readouterr().err, arguments
    assert not (tmp_path / "queue").exists()


def test_what_is_offered_has_one_name_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "paper.yaml").write_text(json.dumps({"schedule": {"kind": "full"}}))
    assert run("serve", "--queue", str(tmp_path / "queue"), "--spectrum", str(tmp_path / "paper.yaml")) == 2
    assert "'paper' has the same name, rename one" in capsys.readouterr().err


def test_a_file_of_keys_that_cannot_be_written_stays(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    assert run("keys", "add", "ann", "--keys", file) == 0
    with Path(file).open("a") as longer:  # what is tried at the door has room
        longer.write("# a user's own notes\n" * 1000)
    before = Path(file).read_bytes()
    command = ["prlimit", "--fsize=8192", sys.executable, "-m", "launch", "keys", "remove", "ann"]
    command += ["--keys", file]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (3, ""), ended.stderr
    assert ended.stderr.startswith("lockstep: ") and "File too large" in ended.stderr
    assert Path(file).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]
