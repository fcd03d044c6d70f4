"""Many prompts in one command: checked together, named by templates, made by one loaded model, resumed."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from launch import cli
from launch.commands.build_job import build_batch
from launch.commands.prompts import read_requests, slug
from launch.serve.queue import Queue
from runtime.errors import BadRequestError

TINY = ["--size", "16x16", "--frames", "1", "--steps", "2", "--guidance", "1", "--spectrum", "off"]
TINY += ["--max-sequence-length", "8"]
PROMPTS = "a red circle\n\n# not this one\na blue square\na green star\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path


def test_a_line_may_say_any_field_of_a_request(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "start.png")
    lines = [
        {"prompt": "one", "steps": 7, "seed": 4, "spectrum": "paper-fast", "out": "mine-{seed}.mp4"},
        {"prompt": "two", "travel": [{"at": 1, "prompt": "three"}], "frames": 33, "negative": "blue"},
        {"prompt": "four", "image": "start.png", "width": 64, "height": 48, "videos": 2, "deadline": 9},
    ]
    (folder / "sub").mkdir()
    (folder / "start.png").rename(folder / "sub" / "start.png")
    file = folder / "sub" / "mine.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    batch = build_batch(prompt=None, prompts=Path("sub/mine.jsonl"), seed=2, steps=30, out=None)
    one, two, three = (job.request for job in batch.jobs)
    assert (one.steps, one.seed, one.spectrum) == (7, 4, "paper-fast")
    assert (two.steps, two.seed, two.frames, two.negative, two.travel[0].prompt) == (
        30,
        2,
        33,
        "blue",
        "three",
    )
    assert (three.image, three.width, three.videos) == (str(folder / "sub" / "start.png"), 64, 2)
    names = [str(job.outputs.video) for job in batch.jobs]
    assert names == ["mine-4.mp4", "002-two.mp4", "003-four.mp4"]
    assert all(job.config is batch.config for job in batch.jobs)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it has no prompts"),
        ("a red circle", "line 1: it is not JSON: Expecting value"),
        ('{"prompt": "a"}\n["b"]', "line 2: a list given; an object is needed"),
        (
            '{"prompt": "a"}\n\n{"prompt": "b", "framse": 5}',
            "line 3: framse: unknown field; did you mean frames?",
        ),
        (
            '{"prompt": "a", "ranks": 2}',
            "line 1: ranks: unknown field; the fields are deadline, extend, frames",
        ),
        ('{"seed": 1}', "line 1: prompt: missing"),
        ('{"prompt": "a", "steps": "many"}', "line 1: steps: 'many' given"),
        ('{"prompt": "a", "frames": 18}', "line 1: frames: 18 given; must be 4k + 1"),
        ('{"prompt": "a", "out": "same.mp4"}\n{"prompt": "b", "out": "same.mp4"}', "line 1 writes it, too"),
        ('{"prompt": "a", "out": "{nummer}.mp4"}', "out: '{nummer}.mp4' given; in a name for many videos"),
        ('{"prompt": "a", "out": "{number:q}.mp4"}', "out: '{number:q}.mp4' given; in a name for many"),
        ('{"prompt": "a", "out": "{slug.__class__}.mp4"}', "out: '{slug.__class__}.mp4' given; in a name"),
        ('{"prompt": "a", "image": "none.png"}', "line 1: image: '"),
    ],
)
def test_a_file_is_checked_as_a_whole_before_anything_is_added(
    folder: Path, content: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.jsonl").write_text(content)
    for command in (["generate"], ["queue", "add"]):
        assert cli.run([*command, "--prompts", "mine.jsonl"]) == 2
        stdout, stderr = capfd.readouterr()
        assert (
            stdout == ""
            and said in stderr
            and all(one.startswith("lockstep: ") for one in stderr.splitlines())
        )
    assert {path.name for path in folder.iterdir()} == {"mine.jsonl", "prompts.txt"}


def test_all_problems_are_told_at_once(folder: Path) -> None:
    (folder / "mine.jsonl").write_text(
        '{"prompt": "a", "steps": 0}\n{"prompt": "b"}\n{"promt": "c"}\n{"prompt": " "}\n"d"\nd\n'
    )
    with pytest.raises(BadRequestError) as caught:
        build_batch(prompt=None, prompts=Path("mine.jsonl"))
    starts = [
        "line 1: steps: 0 given",
        "line 3: promt: unknown field; did you mean prompt?",
        "line 4: prompt: ' ' given; must not be empty",
        "line 5: 'd' given; an object is needed",
        "line 6: it is not JSON",
    ]
    for one, start in zip(str(caught.value).splitlines(), starts, strict=True):
        assert one.startswith(f"prompts: 'mine.jsonl', {start}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "prompts.md"], "prompts: 'prompts.md' given; the name must end in .txt or .jsonl"),
        (["--prompts", "prompts.txt", "--out", "a.mp4"], "line 1 writes it, too: put {number} into --out"),
        (["--prompts", "prompts.txt", "--report", "a.json"], "put {number} into --report"),
        ([], "prompt: give either PROMPT, or --prompts with a file of prompts"),
    ],
)
def test_what_does_not_fit_a_file_of_prompts_is_refused(
    folder: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", *words]) == 2
    assert said in capfd.readouterr().err


def test_a_queue_takes_all_lines_in_one_transaction(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["queue", "add", "--prompts", "prompts.txt", *TINY]
    assert cli.run([*words, "--name", "mine"]) == 2
    assert cli.run(["queue", "add", "x", "--out", "003-a-green-star.mp4", *TINY]) == 0
    assert cli.run(words) == 2  # the last of them would be written twice
    assert "request-1 will write it" in capfd.readouterr().err
    assert cli.run(["queue", "cancel", "1"]) == 0
    assert cli.run([*words, "--priority", "2"]) == 0
    assert capfd.readouterr().out == "2\n3\n4\n"
    with closing(Queue(Path("queue"))) as queue:
        entries = queue.entries()[1:]
        assert [one.job.request.prompt for one in entries] == [
            "a red circle",
            "a blue square",
            "a green star",
        ]
        assert [one.priority for one in entries] == [2, 2, 2]
        assert entries[2].job.outputs.video == folder / "003-a-green-star.mp4"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red  circle, growing!", "a-red-circle-growing"),
        ("ein Kreis, groß & blau", "ein-kreis-groß-blau"),
        ("一只猫", "一只猫"),
        ("../..//", "video"),
        ("one two three four five six seven eight nine ten", "one-two-three-four-five-six-seven-eight"),
        ("x" * 90, "x" * 40),
    ],
)
def test_a_prompt_becomes_a_part_of_a_name(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_lines_are_those_of_the_file(folder: Path) -> None:
    found = [(one.number, one.where, one.fields) for one in read_requests(Path("prompts.txt"))]
    assert found[1] == (2, "prompts: 'prompts.txt', line 4: ", {"prompt": "a blue square"})
