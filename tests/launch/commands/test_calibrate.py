"""`lockstep calibrate` and `lockstep plan`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli
from launch.commands.calibrate import plan_calibration, run_calibration
from launch.shell.terminal import Terminal
from runtime.engine import Engine
from runtime.errors import BadRequestError, JobFailedError
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.presets import load_preset
from runtime.measure.plans import make_plan
from runtime.reports.plan_picture import write_plan_picture
from runtime.request.config import shipped
from runtime.request.prompts import read_prompts
from runtime.sampling.denoise import StepRecord

SMALL = ["--size", "64x48", "--frames", "5", "--steps", "8", "--max-sequence-length", "32"]


def run(*arguments: str) -> int:
    return cli.run(list(arguments))


def prompts(folder: Path, count: int = 2) -> str:
    path = folder / "prompts.txt"
    lines = [f"a red square number {number}" for number in range(count)]
    path.write_text("# some\n\n" + "\n".join(lines) + "\n")
    return str(path)


def test_one_calibration_at_a_time_makes_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two with other settings would replace each other's finished runs."""
    out, lock = tmp_path / "mine.json", tmp_path / "mine.json.lock"
    words = ["calibrate", *SMALL, "--prompts", prompts(tmp_path), "--out", str(out)]
    given = {"prompts": tmp_path / "prompts.txt", "seed": 1000, "out": out, "overwrite": False}
    with plan_calibration("wan-tiny", **given).alone():
        assert lock.is_file() and run(*words) == 2
    assert f"{str(out)!r} is being made by another calibration (process " in capfd.readouterr().err
    assert not lock.exists()
    lock.write_text("process 1 on a machine that was killed\n")
    assert run(*words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "prompts.txt"}
    lock.write_text("mine")
    assert run(*words, "--overwrite") == 2
    assert "is not Lockstep's" in capfd.readouterr().err and lock.read_text() == "mine"


def test_calibrate_plan_and_generate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, preset = tmp_path / "mine.json", tmp_path / "mine.yaml"
    assert run("calibrate", *SMALL, "--prompts", prompts(tmp_path, 3), "--out", str(out)) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{out}\n"
    assert "3 videos, solvers of 2 steps; about" in stderr and "trial 3 of 3" in stderr
    (fit,) = load_calibration(str(out)).fits
    assert f"solver of 2 steps, pass {fit.passes} of {fit.passes}" in stderr and fit.passes >= 3
    assert "GB beside the result" in stderr
    assert [path.name for path in tmp_path.glob("mine*")] == ["mine.json"]
    assert load_calibration(str(out)).conditions.steps == 8
    picture = tmp_path / "plan.png"
    assert run("plan", str(out), "--nfe", "4", "--preset", str(preset), "--picture", str(picture)) == 0
    assert "4 of 8 steps" in " ".join(capfd.readouterr().out.split())  # wrapped anywhere
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert load_preset(str(preset)).calibration == str(out)
    video = tmp_path / "a.mp4"
    assert run("generate", "a red square", *SMALL, "--spectrum", str(preset), "--out", str(video)) == 0
    report = json.loads(video.with_suffix(".json").read_text())
    assert report["nfe"]["cond"] >= 4
    assert report["expectation"]["psnr"] is not None
    assert run("plan", str(out), "--seconds", "60", "--report", str(video.with_suffix(".json"))) == 0
    capfd.readouterr()
    assert run("calibrate", *SMALL, "--prompts", prompts(tmp_path), "--out", str(out)) == 2
    assert "exists" in capfd.readouterr().err


def test_solvers_that_are_added_are_those_of_one_calibration(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sensitivities, Gram matrices and trials stay as they are, to the bit."""
    words = ["calibrate", *SMALL, "--prompts", prompts(tmp_path)]
    whole, out = tmp_path / "whole.json", tmp_path / "mine.json"
    assert run(*words, "--budgets", "2,3,4", "--out", str(whole)) == 0
    assert run(*words, "--budgets", "3", "--out", str(out)) == 0
    before = json.loads(out.read_text())
    more = ["calibrate", "--max-sequence-length", "32", "--out", str(out), "--add-solvers"]
    capfd.readouterr()
    assert run(*more, "--budgets", "2,4") == 0
    said = capfd.readouterr().err
    assert "2 videos, solvers of 2, 4 steps" in said and "trial" not in said and "nudged" not in said
    after = json.loads(out.read_text())
    assert after["fits"] == json.loads(whole.read_text())["fits"]
    assert before.pop("fits") == after.pop("fits")[1:2] and before == after
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "whole.json", "prompts.txt"}
    kept = out.read_bytes()
    for extra, reason in {
        ("--budgets", "4,5"): "budgets: 4 given; the calibration has a solver of 4 steps",
        ("--budgets", "none"): "budgets: none given",
        ("--budgets", "5", "--steps", "9"): "it is for steps 8, not 9",
        ("--budgets", "5", "--overwrite"): "overwrite: given with --add-solvers",
        ("--budgets", "5", "--prompts", prompts(tmp_path)): "prompts: given with --add-solvers",
    }.items():
        assert run(*more, *extra) == 2
        assert reason in " ".join(capfd.readouterr().err.split())
    assert out.read_bytes() == kept


def test_solvers_are_not_added_to_a_calibration_that_has_changed_meanwhile(
    tmp_path: Path, engine: Engine
) -> None:
    out = tmp_path / "mine.json"
    assert run("calibrate", *SMALL, "--prompts", prompts(tmp_path), "--budgets", "3", "--out", str(out)) == 0
    given = {"prompts": None, "seed": 1000, "overwrite": False, "max_sequence_length": 32}
    given |= {"out": out, "budgets": (2,), "add_solvers": True}
    first = plan_calibration("wan-tiny", **given)
    other = load_calibration(str(out)).model_copy(update={"fits": []})
    other.write(out, overwrite=True)
    with pytest.raises(BadRequestError, match=r"another calibration wrote .* meanwhile"):
        first.run(first.calibrator(engine), engine)
    assert load_calibration(str(out)) == other
    content = json.loads(out.read_text())
    out.write_text(json.dumps(content | {"seeds": content["seeds"][:1]}))
    with pytest.raises(BadRequestError, match="2 prompts and 1 seeds"):
        plan_calibration("wan-tiny", **given)


def test_adding_solvers_resumes_after_an_interruption(tmp_path: Path) -> None:
    """The full runs, and the passes that were made, are not made again."""
    out = tmp_path / "mine.json"
    assert run("calibrate", *SMALL, "--prompts", prompts(tmp_path), "--budgets", "3", "--out", str(out)) == 0
    given = {"prompts": None, "seed": 1000, "overwrite": False, "max_sequence_length": 32}
    job = plan_calibration("wan-tiny", out=out, budgets=(4,), add_solvers=True, **given)
    engine, done = Engine(job.config), list[str]()

    def interrupted(name: str, _: StepRecord) -> None:
        done.append(name)
        if "pass 2" in name:
            raise JobFailedError("the machine was switched off")

    with pytest.raises(JobFailedError):
        job.run(job.calibrator(engine, interrupted), engine)
    assert out.with_name("mine.json.partial").is_file()
    names: list[str] = []
    job.run(job.calibrator(engine, lambda name, _: names.append(name)), engine)
    fits = load_calibration(str(out)).fits
    assert [fit.nfe for fit in fits] == [3, 4]
    passes = fits[1].passes
    assert {"video 1 of 2", f"solver of 4 steps, pass 1 of {passes}"} <= set(done) and passes > 2
    assert set(names) == {f"solver of 4 steps, pass {number} of {passes}" for number in range(2, passes + 1)}
    assert [path.name for path in tmp_path.glob("mine*")] == ["mine.json"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_calibrate_on_two_ranks_goes_on_after_an_interruption(tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    command = [sys.executable, "-m", "launch.cli", "calibrate", *SMALL, "--prompts", prompts(tmp_path)]
    command += ["--ranks", "2", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trial 2"):
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert sorted(path.name for path in tmp_path.glob("two*")) == [
        "two.json.partial",
        "two.json.partial.states",
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "video 1 of 2" not in done.stderr, time.monotonic() - began
    assert load_calibration(str(out)).seconds.ranks == 2


def test_a_plan_for_a_time_says_the_time_that_it_was_made_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a machine where a computed step takes a second, seven of 50 steps fit into eight."""
    report = tmp_path / "a.json"
    seconds = {"computed_median": 1.0, "forecast_median": 0.01}
    report.write_text(json.dumps({"step_seconds": seconds, "topology": {"world": 1}}))
    assert run("plan", "wan-tiny", "--seconds", "8", "--report", str(report)) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "7 of 50 steps" in said and "denoising 7.43 s" in said
    assert run("plan", "wan-tiny", "--report", str(report)) == 0
    assert "7.43" in capfd.readouterr().out


def test_a_psnr_that_is_unknown_has_no_unit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    few = json.loads(shipped("calibrations", "wan-tiny.json").read_text(encoding="utf-8"))
    few["trials"] = few["trials"][:2]
    calibration = tmp_path / "few.json"
    calibration.write_text(json.dumps(few))
    assert run("plan", str(calibration), "--nfe", "9") == 0
    assert "predicted PSNR unknown, denoising" in " ".join(capfd.readouterr().out.split())


def test_plan_shows_budgets(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "wan-tiny") == 0
    table = " ".join(capfd.readouterr().out.split())
    assert "plans for 50 steps" in table and "14" in table


def test_prompts_without_a_prompt_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = prompts(tmp_path, 0)
    assert run("calibrate", "--prompts", empty, "--out", str(tmp_path / "a.json")) == 2
    assert "it has no prompts" in capfd.readouterr().err


def test_prompts_are_read_as_they_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red circle\r\n# none\r\n\r\nto\u2028day\rlast".encode())
    assert list(read_prompts(path).values()) == ["a red circle", "to\u2028day", "last"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"one\ntwo \xff\n", "line 2: it is not UTF-8 (byte 0xff)"),
        (b"one\n\ntwo \0\n", "line 3: prompt: 'two \\x00' given; must be text; at character 5"),
        (b"one\n" + b"a" * 20_001, "line 2: prompt: 'aaaa"),
        (b"one\n\xe2\x80\x8b", "line 2: prompt: '\\u200b' given; must not be empty"),
    ],
)
def test_bad_prompts_are_named_with_their_line(
    tmp_path: Path, content: bytes, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    assert run("calibrate", "--prompts", str(path), "--out", str(tmp_path / "a.json")) == 2
    error = capfd.readouterr().err
    assert said in error and len(error) < 400
    assert [one.name for one in tmp_path.iterdir()] == ["p.txt"]


def test_a_foreign_partial_file_ends_with_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "a.json.partial"
    notes.write_text("mine")
    assert run("calibrate", "--prompts", prompts(tmp_path), "--out", str(tmp_path / "a.json")) == 2
    assert "is not an unfinished calibration" in capfd.readouterr().err
    assert notes.read_text() == "mine"
    notes.rename(tmp_path / "a.json.partial.states")
    assert run("calibrate", "--prompts", prompts(tmp_path), "--out", str(tmp_path / "a.json")) == 2
    assert "a.json.partial.states' is not a folder" in capfd.readouterr().err


def test_a_deadline_is_kept_as_far_as_it_can_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "64x48", "--frames", "5", "--steps", "30", "--max-sequence-length", "32"]
    out = tmp_path / "a.mp4"
    arguments = ["generate", "a red square", *options, "--out", str(out), "--overwrite"]
    assert run(*arguments, "--deadline", "0.01") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["computed"]["cond"] == [0, 1]  # before the first step nothing is known of time
    assert len(report["expectation"]["dropped"]) >= 7
    assert run(*arguments, "--deadline", "3600") == 0
    assert json.loads(out.with_suffix(".json").read_text())["expectation"]["dropped"] == []
    capfd.readouterr()
    assert run(*arguments, "--deadline", "1", "--spectrum", "off") == 2
    assert "deadline: 1 given; 'off' forecasts no step" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["wan-tiny", "wan2.2-tiny"])
def test_a_model_is_calibrated_with_prompts_of_its_kind(model: str, tmp_path: Path) -> None:
    """Whatever the config is called: the embedded models know shapes, and make noise of the rest."""
    config = tmp_path / "mine.yaml"
    config.write_text(shipped(f"{model}.yaml").read_text())
    given = {"prompts": None, "seed": 0, "out": tmp_path / "a.json", "overwrite": False}
    jobs = [plan_calibration(named, **given) for named in (model, str(config))]
    jobs.append(plan_calibration(None, model=model, **given))
    for job in jobs:
        asked = [request.prompt for request in job.requests]
        assert asked == list(read_prompts(shipped("prompts", "shapes.txt")).values())
        assert "a red square moving left on a black background" in asked


def test_what_is_found_is_kept_until_it_is_written(tmp_path: Path, engine: Engine) -> None:
    """Whatever keeps the result from being written, the same command has only to write it."""
    out = tmp_path / "a.json"
    given = {"size": (64, 48), "frames": 5, "steps": 4, "max_sequence_length": 32}
    job = plan_calibration(
        "wan-tiny", prompts=Path(prompts(tmp_path)), seed=0, out=out, overwrite=True, **given
    )
    quiet = Terminal(quiet=True)
    with pytest.raises(OSError) as caught:  # a folder comes in the way
        run_calibration(job, quiet, engine=engine, on_loaded=lambda _: out.mkdir())
    resumes = f"the same command resumes from {str(job.partial)!r}"
    assert caught.value.__notes__ == [f"move {str(out)!r} elsewhere; then {resumes}"]
    kept = job.partial.stat().st_mtime_ns
    out.rmdir()
    assert job.advice() == resumes
    run_calibration(job, quiet, engine=engine)
    assert load_calibration(str(out)).conditions.steps == 4
    assert kept and not job.partial.exists()


def test_a_picture_that_somebody_made_meanwhile_stays(tmp_path: Path) -> None:
    chosen, path = make_plan("wan-tiny", nfe=5, psnr=None, seconds=None, report=None), tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(JobFailedError, match="created by another process meanwhile"):
        write_plan_picture(chosen.calibration, chosen.choice, path, overwrite=False)
    assert path.read_text() == "mine"
