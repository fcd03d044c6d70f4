"""Commands that only look, refuse or put down a request do not import what takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launch.commands.doctor import DRIVERS
from tests.places import ROOT

SLOW = {"torch", "diffusers", "transformers", "ray"}
COMMANDS = [
    ("queue add a --out a.mp4", 0),
    ("queue add --prompts two.txt --spectrum planned-14", 0),
    ("queue add a --out a.mp4", 2),
    ("status --all", 0),
    ("queue cancel 1", 0),
    ("queue cancel 9", 2),
    ("generate a --spectrum nope", 2),
    ("generate a --config nope", 2),
    ("generate a --model ./nope", 2),
    ("generate a --steps 0", 2),
    ("generate --prompts wrong.jsonl", 2),
    ("generate a --out a.gif", 2),
    ("storyboard two.txt --out film", 2),
    ("config", 0),
    ("config --schema", 0),
    ("preset planned-14", 0),
    ("plan wan-tiny --nfe 7", 0),
    ("--help", 0),
    ("generate --help", 0),
]
LOOK = f"""\
import json, sys
from launch import cli
told = []
for words in json.loads(sys.argv[1]):
    code = cli.run(words.split())
    told.append([words, code, *({{name.partition(".")[0] for name in sys.modules}} & {SLOW})])
print(json.dumps(told))
"""


def test_they_import_nothing_slow(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("a red circle\na blue circle\n")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a", "framse": 5}\n')
    gpu = any(driver.exists() for driver in DRIVERS)  # torch is asked about it
    commands = [*COMMANDS, *([] if gpu else [("doctor", 0)])]
    ran = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps([words for words, _ in commands])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == [[words, code] for words, code in commands]
