"""The command line's contract: exit codes, what goes to stdout and stderr, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from launch import cli
from runtime.request.config import shipped

PROMPT = "a red circle moving left on a black background"
SMALL = ["--size", "64x48", "--frames", "5", "--steps", "6", "--max-sequence-length", "32"]


def run(*arguments: str) -> int:
    return cli.run(list(arguments))


def test_generate_writes_files_and_prints_the_path_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sub" / "a.mp4"
    assert run("generate", PROMPT, *SMALL, "--out", str(out), "--seed", "3", "--spectrum", "paper-fast") == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{out}\n"
    assert "step 6/6" in stderr and "NFE" in stderr and "ETA" in stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["request"]["seed"] == 3
    assert report["request"]["spectrum"] == "paper-fast"
    assert report["request"]["steps"] == 6
    assert {p.suffix for p in out.parent.iterdir()} == {".mp4", ".json", ".png"}


def test_every_output_can_be_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, report, kept = tmp_path / "a.mp4", tmp_path / "reports" / "b.json", tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.tex").write_text("mine")
    options = ["--out", str(out), "--report", str(report), "--checkpoints", str(kept), "--videos", "2"]
    assert run("generate", PROMPT, *SMALL, *options, "--negative", "blue", "--checkpoint-every", "1") == 0
    assert capfd.readouterr().out == "".join(f"{tmp_path}/a-{number}.mp4\n" for number in (1, 2))
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {"a-1.mp4", "a-2.mp4", "reports/b.json", "reports/b.png", "kept/thesis.tex"}
    assert [path.name for path in kept.iterdir()] == ["thesis.tex"]
    assert json.loads(report.read_text())["request"]["negative"] == "blue"


def test_an_input_is_never_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(shipped("wan-tiny.yaml"), tmp_path / "mine.json")
    shutil.copy(shipped("prompts", "general.txt"), tmp_path / "prompts.json")
    shutil.copy(shipped("calibrations", "wan-tiny.json"), tmp_path / "cal.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    config, video = ["--config", str(tmp_path / "mine.json")], str(tmp_path / "mine.mp4")
    prompts, calibration = str(tmp_path / "prompts.json"), str(tmp_path / "cal.json")
    for arguments, said in (
        (["generate", PROMPT, *config, "--out", video], "given for config: give another name"),
        (["compare", PROMPT, *config, "--out", video], "given for config: give another name"),
        (["calibrate", "--prompts", prompts, "--out", prompts], "given for prompts: give another name"),
        (
            ["plan", calibration, "--nfe", "9", "--preset", calibration],
            "given for calibration: give another name",
        ),
        (["plan", "wan-tiny", "--nfe", "9", "--preset", "x", "--picture", "x"], "also the name of the"),
    ):
        assert run(*arguments, "--overwrite") == 2
        assert said in " ".join(capfd.readouterr().err.split())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


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


def test_same_seed_same_frames(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("generate", PROMPT, *SMALL, "--seed", seed, "--out", str(tmp_path / f"{name}.mp4")) == 0
        digests.append(json.loads((tmp_path / f"{name}.json").read_text())["frames_sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_compare_option_says_what_was_gained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            "generate", PROMPT, "--steps", "8", "--frames", "5", "--out", str(tmp_path / "a.mp4"), "--compare"
        )
        == 0
    )
    stderr = capfd.readouterr().err
    assert "faster than the full sampler (ideal 1.33×)" in " ".join(stderr.split())
    assert "PSNR" in stderr
    assert json.loads((tmp_path / "a.json").read_text())["quality"]["psnr"] > 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--spectrum", "nope"],
            "spectrum: 'nope' given; there is no such preset, it must be one of off, paper",
        ),
        (["--config", "nope"], "config: 'nope' given"),
        (["--size", "100x96"], "width: 100 given; must be a multiple of 16"),
        (["--size", "96"], "'96' is not WIDTHxHEIGHT"),
        (["--frames", "18"], "frames: 18 given; must be 4k + 1"),
        (["--steps", "0"], "steps: 0 given"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--guidance", "nan"], "guidance: nan given; should be a finite number"),
        (["--seed", "-1"], "seed: -1 given"),
        (["--out", "/proc/a.mp4"], "out: cannot write in '/proc'"),
        (["--out", "a.avi"], "must end in .mp4"),
        (["--out", ""], "'' given; a name is needed"),
        (["--out", "."], "out: '.' given; the name must end in .mp4"),
        (["--out", "caf\udce9.mp4"], "its byte 0xe9 is not UTF-8"),
        (["--negative", "caf\udce9"], "its byte 0xe9 is not UTF-8"),
        (["--out", "/dev/null/a.mp4"], "out: cannot write in '/dev/null'"),
        (["--out", "x" * 252 + ".mp4"], "File name too long"),
        (["--report", "a.txt"], "report: 'a.txt' given; the name must end in .json"),
        (["--checkpoints", "/proc/mine"], "checkpoints: cannot write in '/proc/mine"),
        (
            ["--spectrum", "LATE", "--steps", "6"],
            "spectrum: the preset does not fit 6 steps: computed step 9",
        ),
        (["--ranks", "0"], "0 is not in the range 1<=x<=65536"),
        (["--ranks", "2", "--launcher", "inline"], "it runs a single rank, 2 need ray or torchrun"),
        (["--ulysses", "7"], "ulysses: 7 given; the model has 6 heads"),
        (["--ranks", "4", "--ring", "3"], "ranks: 4 given; ring 3 cannot make that number"),
        (["--cfg", "2", "--guidance", "1"], "cfg: 2 given; without guidance there is one branch"),
        (["--timeout", "0"], "'0' given; a number from 1 to 604800 is needed"),
        (["--launcher", "ssh"], "'ssh' is not one of"),
    ],
)
def test_a_bad_request_exits_2_and_starts_nothing(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runtime.engine.Engine.__init__", lambda *_: pytest.fail("a model was loaded"))
    late = tmp_path_factory.mktemp("presets") / "late.yaml"
    late.write_text("schedule: {kind: explicit, computed: [0, 9]}\n")
    assert run("generate", PROMPT, *(str(late) if a == "LATE" else a for a in arguments)) == 2
    stdout, stderr = capfd.readouterr()
    assert said in " ".join(stderr.split())
    assert stdout == ""
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
    assert out.read_text() == "mine"
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
    command = [sys.executable, "-m", "launch", "generate", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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
    assert "--resume resumes from them, --overwrite starts again" in capfd.readouterr().err
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
    command = [sys.executable, "-m", "launch", "generate", PROMPT, *options, "--checkpoint-every", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 8/40" in line:
                process.kill()
                break
    assert list(tmp_path.glob(".a.*.part.mp4"))  # nobody could remove it
    assert run(*command[3:], "--resume") == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["resumed_at"] >= 4 and len(report["decision_digest"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png", "thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_as_many_steps_as_are_allowed_are_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """More than calibrations are of."""
    small = ["--size", "16x16", "--frames", "1", "--max-sequence-length", "8", "--guidance", "1"]
    options = ["--steps", "201", "--spectrum", "paper", "--out", str(tmp_path / "a.mp4")]
    assert run("generate", PROMPT, *small, *options) == 0, capfd.readouterr().err


def test_resume_needs_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.mp4")]
    assert run("generate", PROMPT, *out, "--resume", "--checkpoint-every", "0") == 2
    assert "there is nothing to resume from" in capfd.readouterr().err


def commands(group: click.Group, *names: str) -> Iterator[tuple[list[str], click.Command]]:
    """Every command below a group, with the words that call it."""
    yield list(names), group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield [*names, name], command


def test_the_list_of_commands_is_by_purpose(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capfd.readouterr().out
    titles = re.findall(r"^(\w.*):$", said, re.MULTILINE)
    assert titles == ["Options", "Make videos", "Serve many requests", "Measure and plan", "This machine"]
    listed = re.findall(r"^  (\w+) +[A-Z]", said.partition("Make videos:")[2], re.MULTILINE)
    assert sorted(listed) == sorted(cli.cli.commands)


def test_help_is_helpful(capfd: pytest.CaptureFixture[str]) -> None:
    """The list of commands cuts no sentence, and every option says what it is."""
    for names, command in commands(cli.cli):
        assert run(*names, "--help") == 0
        said = capfd.readouterr().out
        assert said.startswith(" ".join(["Usage: lockstep", *names]))
        assert "..." not in said.replace("]...", "").replace("S...", "")  # those are arguments
        assert [one.name for one in command.params if isinstance(one, click.Option) and not one.help] == []


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, launch.cli as c; c.run(['generate', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
