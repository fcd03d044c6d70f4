"""What the command line does beyond its contract, which is in test_contract.py: advice, files, resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from runtime.request.config import shipped
from tests.forked import Command

PROMPT = "a red circle moving left on a black background"
SMALL = ["--size", "64x48", "--frames", "5", "--steps", "6", "--max-sequence-length", "32"]


def run(*arguments: str) -> int:
    return cli.run(list(arguments))


def test_an_input_is_never_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(shipped("wan-tiny.yaml"), tmp_path / "mine.json")
    shutil.copy(shipped("prompts", "general.txt"), tmp_path / "prompts.json")
    shutil.copy(shipped("calibrations", "wan-tiny.json"), tmp_path / "cal.yaml")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    config, video = ["--config", str(tmp_path / "mine.json")], str(tmp_path / "mine.mp4")
    prompts, calibration = str(tmp_path / "prompts.json"), str(tmp_path / "cal.yaml")
    for arguments, said in (
        (["generate", PROMPT, *config, "--out", video], "given for config: give another name"),
        (["compare", PROMPT, *config, "--out", video], "given for config: give another name"),
        (["calibrate", "--prompts", prompts, "--out", prompts], "given for prompts: give another name"),
        (
            ["plan", calibration, "--nfe", "9", "--preset", calibration],
            "given for calibration: give another name",
        ),
    ):
        assert run(*arguments, "--overwrite") == 2
        assert said in " ".join(capfd.readouterr().err.split())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plans_outputs_are_refused_by_their_names_before_any_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for picture, preset, said in (
        ("a.jpg", "a.yaml", "picture: 'a.jpg' given; the name must end in .png"),
        ("a", "a.yaml", "picture: 'a' given; the name must end in .png"),
        ("a.png", "a.txt", "preset: 'a.txt' given; the name must end in .yaml or .yml"),
        (
            "a.png",
            "a",
            "preset: 'a' given; the name must end in .yaml or .yml",
        ),
    ):
        assert run("plan", "wan-tiny", "--nfe", "9", "--picture", picture, "--preset", preset) == 2
        assert said in " ".join(capfd.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_the_home_folder_of_nobody_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", PROMPT, *SMALL, "--out", "~nobody-of-this-name/a.mp4") == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "no user's home folder is '~nobody-of-this-name'" in said and "./~nobody" in said
    assert not list(tmp_path.iterdir())


def test_a_queue_lies_where_it_stays_and_may_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "runtime_resources" / "working_dir_files"
    packed.mkdir(parents=True)
    monkeypatch.chdir(packed)
    out = ["--out", str(tmp_path / "a.mp4")]
    assert run("queue", "add", PROMPT, *SMALL, *out, "--queue", "mine") == 2
    assert "queue: 'mine' given; the job's working directory is deleted" in capfd.readouterr().err
    assert run("status", "--queue", "x" * 300) == 2
    assert run("status", "--queue", str(tmp_path / ("x" * 300))) == 2
    assert "File name too long" in capfd.readouterr().err
    assert list(packed.iterdir()) == []


def test_advice_is_given_where_it_is_true(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Other commands have no --resume, and nothing is said of checkpoints that are not there."""
    for arguments in (["plan", "nope", "--nfe", "3"], ["status", "--queue", str(tmp_path / "none")]):
        assert run(*arguments) == 2
        assert "--resume" not in capfd.readouterr().err
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/bin/false")
        compare = ["compare", PROMPT, *SMALL, "--preset", "paper", "--out", str(tmp_path / "c.mp4")]
        assert run(*compare) == 3
        assert "--resume" not in capfd.readouterr().err
        nothing_kept = [
            "generate",
            PROMPT,
            *SMALL,
            "--checkpoint-every",
            "0",
            "--out",
            str(tmp_path / "a.mp4"),
        ]
        assert run(*nothing_kept) == 3
    said = capfd.readouterr().err
    assert "there is no checkpoint: the same command starts again at the first step" in said
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_exits_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "  ") == 2
    assert "prompt: '  ' given; must not be empty" in capfd.readouterr().err
    assert run("generate") == 2


def test_an_existing_output_needs_overwrite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.mp4"
    out.write_text("mine")
    assert run("generate", PROMPT, *SMALL, "--out", str(out)) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert run("generate", PROMPT, *SMALL, "--out", str(out), "--overwrite") == 2
    assert f"out: {str(out)!r} is some other file, not an mp4" in capfd.readouterr().err
    assert out.read_text() == "mine"
    out.write_bytes(b"\0\0\0\x20ftypisom, another video")
    assert run("generate", PROMPT, *SMALL, "--out", str(out), "--overwrite") == 0
    assert out.stat().st_size > 500


def test_a_model_that_is_not_whole_exits_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "mine.yaml").write_text(
        f"model: {tmp_path}/model\ndefaults: {{width: 96, height: 96, frames: 17}}\n"
    )
    out = tmp_path / "a.mp4"
    assert run("generate", PROMPT, "--config", str(tmp_path / "mine.yaml"), "--out", str(out)) == 2
    assert "scheduler_config.json is missing" in capfd.readouterr().err
    assert not out.exists()


def test_a_failure_in_the_middle_exits_3_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/bin/false")  # ffmpeg dies at once
    assert run("generate", PROMPT, *SMALL, "--out", str(tmp_path / "a.mp4")) == 3
    said = capfd.readouterr().err
    assert "ffmpeg could not write the video" in said
    assert "the same command with --resume resumes from the last checkpoint" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.checkpoints"]


@pytest.mark.timeout(120)
def test_ctrl_c_exits_130_and_resume_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [PROMPT, "--out", str(tmp_path / "a.mp4"), "--steps", "40"]
    pipe = subprocess.PIPE
    with Command(["generate", *options], stderr=pipe, stdout=pipe) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 4/40" in line:
                process.send_signal(signal.SIGINT)
                break
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert "cancelled (stopped after step" in stderr and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.checkpoints"]

    assert run("generate", *options) == 2
    said = capfd.readouterr().err
    assert "--resume (in Python: resume=True) resumes from them, --overwrite" in said
    assert run("generate", *options, "--resume") == 0
    assert run("generate", PROMPT, "--steps", "40", "--out", str(tmp_path / "b.mp4")) == 0
    resumed, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert resumed["frames_sha256"] == whole["frames_sha256"]
    assert resumed["resumed_at"] >= 4 and whole["resumed_at"] == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("a")) == [
        "a.json",
        "a.mp4",
        "a.png",
    ]


@pytest.mark.timeout(120)
def test_a_killed_command_leaves_what_the_next_one_goes_on_from_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    options = ["--out", str(tmp_path / "a.mp4"), "--steps", "40", "--checkpoints", str(tmp_path)]
    command = ["generate", PROMPT, *options, "--checkpoint-every", "1"]
    with Command(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 8/40" in line:
                process.kill()
                break
    assert list(tmp_path.glob(".a.*.part.mp4"))  # nobody could remove it
    assert run(*command, "--resume") == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["resumed_at"] >= 4 and len(report["decision_digest"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png", "thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_as_many_steps_as_are_allowed_are_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """More than calibrations are of."""
    small = ["--size", "16x16", "--frames", "1", "--max-sequence-length", "8", "--guidance", "1"]
    options = ["--steps", "201", "--spectrum", "paper", "--out", str(tmp_path / "a.mp4")]
    assert run("generate", PROMPT, *small, *options) == 0, capfd.readouterr().err


def test_the_list_of_commands_is_by_purpose(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capfd.readouterr().out
    titles = re.findall(r"^(\w.*):$", said, re.MULTILINE)
    rooms = ["Make videos", "Serve many requests", "Measure and plan", "Models and this machine"]
    assert titles == ["Options", *rooms]
    listed = re.findall(r"^  (\w+) +[A-Z]", said.partition("Make videos:")[2], re.MULTILINE)
    assert sorted(listed) == sorted(cli.cli.commands)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, launch.cli as c; c.run(['generate', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


REFUSED = [
    ["compare", "a circle", "--preset", "nope"],
    ["compare", "a circle", "--config", "nope"],
    ["compare", "a circle", "--size", "5x5"],
    ["calibrate", "--config", "nope", "--out", "c.json"],
    ["calibrate", "--steps", "0", "--out", "c.json"],
    ["rehearse", "--model", "./nope"],
    ["rehearse", "--gpu", "nope"],
    ["serve", "--config", "nope"],
    ["serve", "--model", "./nope"],
    ["queue", "run", "--queue", "nope"],
    ["generate", "a circle", "--size", "5x5"],
    ["generate", "a circle", "--lora", "nope.safetensors"],
    ["generate", "a circle", "--lora", "."],
    ["storyboard", "nope.yaml", "--out", "film"],
    ["storyboard", "nope.yaml", "--out", "film", "--dry-run"],
    ["storyboard", "nope.yaml", "--out", "film", "--dry-run", "--gpu", "nope"],
    ["convert", "./nope", "folder"],
    ["convert", ".", "folder"],
    ["convert", "nope.yaml", "folder"],
    ["convert", "wan-tiny", "/"],
    ["doctor", "--model", "./nope"],
    ["doctor", "--model", "."],
    ["doctor", "--model", "nope.yaml"],
    ["plan", "nope"],
]


def test_what_is_refused_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys, launch.cli as c\n"
        f"for words in {REFUSED!r}:\n"
        "    assert c.run(words) == 2, words\n"
        "    assert not {'torch', 'ray'} & {*sys.modules}, words\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED = """
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["launch", "launch.torchrun", "launch.ray_job"])
def test_a_signal_during_the_first_imports_gives_no_traceback(module: str) -> None:
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", _INTERRUPTED, module]
    ended = subprocess.run(words, env=os.environ | root, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "lockstep: cancelled\n")


@pytest.mark.parametrize("module", ["launch", "launch.torchrun", "launch.ray_job"])
def test_a_deleted_current_folder_is_refused(module: str, tmp_path: Path) -> None:
    """Loading torch in one ends the process, with words about a library."""
    command = 'mkdir "$1" && cd "$1" && rmdir "$1" && exec "$0" -m "$2" plan wan-tiny --nfe 8'
    words = ["sh", "-c", command, sys.executable, str(tmp_path / "gone"), module]
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(words, env=os.environ | root, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr == "lockstep: the current folder was deleted; change to another one\n"
