"""An interrupted generation goes on from its checkpoint and ends in the same bits."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.checkpoint.manifests import VERSION, complete_steps, manifest_name
from runtime.checkpoint.reader import restore
from runtime.checkpoint.writer import CheckpointWriter, Snapshot
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError, JobFailedError
from runtime.jobs.batch import Batch
from runtime.jobs.run import run_job
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees, Topology
from runtime.request.config import Config, Window, load_config
from runtime.request.outputs import Outputs
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from runtime.sampling.result import Result
from tests.jobs import job_of, make_job
from tests.ranks import die, run_ranks, watch_ranks
from tests.stopping import InterruptedHereError, generate, interrupt

Make = Callable[..., VideoRequest]
Undisturbed = Callable[[VideoRequest], tuple[Result, Frames]]
STEPS = 10
SMALL = {"width": 64, "height": 48, "frames": 5, "steps": STEPS, "max_sequence_length": 32, "seed": 7}
PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> Undisturbed:
    """What a request comes to; each is run once."""
    known: dict[str, tuple[Result, Frames]] = {}

    def made(request: VideoRequest) -> tuple[Result, Frames]:
        name = request.model_dump_json()
        if name not in known:
            known[name] = generate(engine, request)
        return known[name]

    return made


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The name of a preset with this schedule."""

    def make(text: str) -> str:
        path = tmp_path_factory.mktemp("presets") / "mine.yaml"
        path.write_text(f"schedule: {text}\n")
        return str(path)

    return make


@pytest.mark.parametrize("kind", ["unipc", "euler", "dpm++"])
def test_every_sampler_goes_on_in_the_same_bits(
    small: Make, config: Config, kind: str, tmp_path: Path
) -> None:
    scheduler = SamplerConfig(kind=kind, shift=5.0)  # type: ignore[arg-type]
    engine = Engine(config.model_copy(update={"scheduler": scheduler}))
    request = small(steps=STEPS, spectrum="paper")
    expected = generate(engine, request)[1]
    interrupt(engine, request, tmp_path, until=5)
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at == 5  # step 5 was forecast; step 4 is the last that was computed
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("until", range(1, STEPS))
def test_it_does_not_matter_where(
    engine: Engine, small: Make, undisturbed: Undisturbed, tmp_path: Path, until: int
) -> None:
    request = small(steps=STEPS, spectrum="paper")
    whole, expected = undisturbed(request)
    interrupt(engine, request, tmp_path, until)
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert 0 < result.resumed_at <= until + 1
    assert np.array_equal(frames, expected)
    assert result.digests == whole.digests
    assert result.computed == whole.computed
    assert result.errors == whole.errors
    assert [s.index for s in result.steps] == list(range(STEPS))
    assert result.forecaster_bytes == whole.forecaster_bytes


@pytest.mark.parametrize(
    "text",
    [
        "{kind: error, tolerance: 0.2, warmup: 2, budget: 8}",
        "{kind: full}",
        "{kind: paper}\nuncond: {kind: full}",
        "{kind: paper}\nstream: velocity",
        "{kind: paper}\nstream: guided\npredictor: {kind: linear}",
        "{kind: universal}\nstream: guided\npredictor: {kind: universal}",
    ],
)
def test_every_schedule_goes_on(
    engine: Engine, small: Make, tmp_path: Path, schedule: Callable[[str], str], text: str
) -> None:
    request = small(steps=STEPS, spectrum=schedule(text))
    undisturbed, expected = generate(engine, request)
    interrupt(engine, request, tmp_path, until=7)
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at > 3
    assert result.digests == undisturbed.digests
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize(
    ("more", "stopped"),
    [("", False), ("", True), ("\nuncond: {kind: error, tolerance: 9, warmup: 3}", False)],
    ids=["killed", "stopped", "branches apart"],
)
def test_a_run_by_its_errors_reports_the_same_evaluations_resumed_or_not(
    engine: Engine, small: Make, tmp_path: Path, schedule: Callable[[str], str], more: str, stopped: bool
) -> None:
    """Interrupted before, in and after steps that it skips."""
    text = "{kind: error, tolerance: 9, warmup: 2, longest: 3}" + more
    request = small(steps=STEPS, spectrum=schedule(text))

    def report(until: int | None = None, **given: Any) -> dict[str, Any]:
        def after(record: StepRecord) -> None:
            if record.index == until and not stopped:
                raise InterruptedHereError
            if record.index == until:
                engine.command(Command.STOP)

        outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json", overwrite=True)
        run_job(engine, job_of(engine, request, outputs, **given), lambda *_: nullcontext(after))
        told: dict[str, Any] = json.loads(outputs.report.read_text())
        for name in ("kind", "error"):
            told[name] = [step[name] for step in told["step_log"]]
        return told

    whole = report()
    skipped = "".join(kind[0] for kind in whole["kind"]).index("ffc")  # two steps, before a computed one
    assert whole["nfe"] == {branch: len(steps) for branch, steps in whole["computed"].items()}
    for last in (skipped - 1, skipped, skipped + 2):
        root, until = tmp_path / str(last), last - 2 if stopped else last  # a stop is agreed on a step ahead
        with pytest.raises(CancelledError if stopped else InterruptedHereError):
            report(until, checkpoints=Checkpoints(root, every=1))
        resumed = report(checkpoints=Checkpoints(root, every=1, resume=True))
        assert 0 < resumed["resumed_at"] <= last + 1
        assert resumed["resumed_at"] == last + 1 or not stopped
        for name in ("nfe", "computed", "decision_digest", "kind", "error", "frames_sha256"):
            assert resumed[name] == whole[name], (last, name)


def test_a_generation_that_was_told_to_stop_loses_no_step(
    engine: Engine, small: Make, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    request = small(steps=STEPS, spectrum="paper")
    whole, expected = undisturbed(request)

    def stop(record: StepRecord) -> None:
        if record.index == 4:
            engine.command(Command.STOP)

    with pytest.raises(CancelledError, match="stopped after step 6"):
        engine.generate(request, [FrameBuffer()], stop, Checkpoints(tmp_path, every=100))
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at == 7
    assert result.digests == whole.digests
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("at", [4, 7])  # the decision of a computed and of a forecast step is dropped
def test_a_step_before_which_it_was_cancelled_counts_once(
    engine: Engine, small: Make, undisturbed: Undisturbed, tmp_path: Path, at: int
) -> None:
    request = small(steps=STEPS, spectrum="paper")
    whole, expected = undisturbed(request)

    def cancel(record: StepRecord) -> None:
        if record.index == at:
            engine.command(Command.CANCEL)

    with pytest.raises(CancelledError, match=f"cancelled before step {at + 2}"):
        engine.generate(request, [FrameBuffer()], cancel, Checkpoints(tmp_path, every=100))
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at == at + 2
    assert (result.digests, result.computed) == (whole.digests, whole.computed)
    assert np.array_equal(frames, expected)


def test_after_the_last_step_only_the_decode_is_left(engine: Engine, small: Make, tmp_path: Path) -> None:
    class BrokenError(Exception):
        pass

    class Broken:
        def write(self, frames_THW3: Frames) -> None:
            raise BrokenError

    request = small(steps=9, spectrum="paper")  # whose last step is computed
    undisturbed, expected = generate(engine, request)
    with pytest.raises(BrokenError):
        engine.generate(request, [Broken()], checkpoints=Checkpoints(tmp_path, every=1))
    left = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(BrokenError):
        engine.generate(request, [Broken()], checkpoints=Checkpoints(tmp_path, every=1, resume=True))
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == left  # not written again
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=1, resume=True))
    assert result.resumed_at == 9 and result.computed["cond"][-1] == 8
    assert result.digests == undisturbed.digests and len(result.digests) == 1
    assert np.array_equal(frames, expected)


def test_manifests_of_two_attempts_are_no_checkpoint(tmp_path: Path) -> None:
    """Only one rank of the first wrote step 7; the second is interrupted when only the other has."""

    def write(rank: int, *steps: int, resumed: int | None = None) -> None:
        writer = CheckpointWriter(tmp_path, "{}", Topology(cfg=2), rank, every=1)
        if resumed is not None:
            writer.resume(resumed)
        for step in steps:
            shared = {"decisions of": resumed} if rank == 0 else {}
            writer.finish(Snapshot(step, shared, {}, {"cond": {step: torch.zeros(1, 1, 1)}}))

    write(0, 3, 5)
    write(1, 3, 5, 7)
    assert complete_steps(tmp_path) == [5, 3]
    write(1, resumed=5)
    write(0, 7, resumed=5)
    assert complete_steps(tmp_path) == [5, 3]
    write(1, 7, resumed=5)
    assert complete_steps(tmp_path) == [7, 5]


def test_interrupted_again_and_again(
    engine: Engine, small: Make, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    request = small(steps=STEPS, spectrum="paper")
    expected = undisturbed(request)[1]
    interrupt(engine, request, tmp_path, until=2)
    for until in (4, 8):
        with pytest.raises(InterruptedHereError):
            generate(engine, request, Checkpoints(tmp_path, every=1, resume=True), until)
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=1, resume=True))
    assert result.resumed_at > 6
    assert np.array_equal(frames, expected)


@pytest.fixture(scope="module")
def interrupted(engine: Engine, small: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a generation that was interrupted after step 8; for copies of them."""
    folder = tmp_path_factory.mktemp("interrupted")
    interrupt(engine, small(steps=STEPS, spectrum="paper"), folder, until=8)
    return folder


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(f"*/{pattern}"), key=lambda path: path.name)


@pytest.mark.parametrize("pattern", ["part-*.pt", "manifest-*.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "gone"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(
    engine: Engine,
    small: Make,
    undisturbed: Undisturbed,
    interrupted: Path,
    tmp_path: Path,
    pattern: str,
    harm: str,
) -> None:
    request = small(steps=STEPS, spectrum="paper")
    expected = undisturbed(request)[1]
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    path = newest(tmp_path, pattern)
    content = path.read_bytes()
    middle = len(content) // 2
    match harm:
        case "cut":
            path.write_bytes(content[:middle])
        case "flip":
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at == 7  # 8 without the damage: steps 6 and 8 were computed last
    assert np.array_equal(frames, expected)


def test_a_manifest_cannot_name_files_of_other_folders(
    engine: Engine, small: Make, interrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(interrupted, kept)
    path = newest(kept, "manifest-*.json")
    manifest = json.loads(path.read_text())
    outside = tmp_path / manifest["last"]
    outside.write_bytes((path.parent / manifest["last"]).read_bytes())
    manifest["parts"][str(outside)] = manifest["parts"].pop(manifest["last"])
    manifest["last"] = str(outside)
    path.write_text(json.dumps(manifest))
    result, _ = generate(
        engine, small(steps=STEPS, spectrum="paper"), Checkpoints(kept, every=4, resume=True)
    )
    assert result.resumed_at == 7 and "which is not a part of a checkpoint" in caplog.text


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's disk that fails for a moment."""
    kept, listed = tmp_path / "kept", Path.iterdir
    shutil.copytree(interrupted, kept)

    def failing(path: Path) -> Iterator[Path]:
        if path.parent == kept:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", failing)
    for checkpoints in (Checkpoints(kept, every=1, resume=resume) for resume in (False, True)):
        assert checkpoints.left and checkpoints.newest is None
        with pytest.raises(BadRequestError, match=r"^checkpoints: .*kept' given; Input/output error"):
            checkpoints.check()
        with pytest.raises(BadRequestError, match="Input/output error"), checkpoints.locked():
            pass
    monkeypatch.undo()
    assert Checkpoints(kept, every=1).newest == 8


def test_with_nothing_whole_it_starts_again(
    engine: Engine, small: Make, undisturbed: Undisturbed, interrupted: Path, tmp_path: Path
) -> None:
    request = small(steps=STEPS, spectrum="paper")
    expected = undisturbed(request)[1]
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*/part-*"):
        path.write_bytes(b"nonsense")
    result, frames = generate(engine, request, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at == 0
    assert np.array_equal(frames, expected)


def test_checkpoints_of_another_request_are_not_used(engine: Engine, small: Make, tmp_path: Path) -> None:
    interrupt(engine, small(steps=STEPS), tmp_path, until=8)
    other = small(steps=STEPS, seed=8)
    result, frames = generate(engine, other, Checkpoints(tmp_path, every=4, resume=True))
    assert result.resumed_at == 0
    assert np.array_equal(frames, generate(engine, other)[1])


def test_old_checkpoints_are_removed_and_features_are_written_once(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    request = small(steps=STEPS, spectrum="off")
    interrupt(engine, request, tmp_path, until=8)
    assert len(list(tmp_path.glob("*/manifest-*"))) == 2
    assert len(list(tmp_path.glob("*/part-*"))) == 2  # nothing is remembered
    result, _ = generate(engine, small(steps=STEPS, spectrum="paper"), Checkpoints(tmp_path / "b", every=1))
    features = result.forecaster_bytes
    assert features < result.checkpoint_bytes < 2 * features + 40_000 * (result.nfe + 1)


class SmallFiles:
    """As if the disk were full, for files beyond so many bytes."""

    def __init__(self, size: int):
        self._size = size

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_a_full_disk_is_a_clear_error(engine: Engine, small: Make, tmp_path: Path) -> None:
    with (
        SmallFiles(4096),
        pytest.raises(JobFailedError, match=r"checkpoints: cannot write in .*: File too large") as raised,
    ):
        generate(engine, small(steps=STEPS), Checkpoints(tmp_path, every=1))
    assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.glob("*/*")) == []


def test_what_cannot_be_kept_is_said_and_not_lost(
    engine: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in the writing thread ends the job in its own."""
    monkeypatch.setattr("runtime.sampling.resume.sampler_state", lambda sampler: {"state": lambda: sampler})
    said = r"checkpoints: cannot write in .*local.*--checkpoint-every 0 \(in Python: .* turns checkpoints off"
    with pytest.raises(JobFailedError, match=said) as raised:
        generate(engine, small(steps=STEPS), Checkpoints(tmp_path, every=1))
    assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.glob("*/*")) == []


def test_a_slow_disk_leaves_no_checkpoint_out(
    engine: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or ranks whose disks are slow at different times might never have one in common."""
    save, written = torch.save, []

    def slowly(content: Any, file: Any) -> None:
        time.sleep(0.2)
        save(content, file)
        written.append(file.name)

    monkeypatch.setattr("runtime.checkpoint.writer.torch.save", slowly)
    result, _ = generate(engine, small(steps=STEPS, spectrum="paper"), Checkpoints(tmp_path, every=1))
    assert len(written) == len({*result.computed["cond"], STEPS - 1})


def test_a_folder_that_cannot_be_written_to_is_refused() -> None:
    with pytest.raises(BadRequestError, match="checkpoints: cannot write in '/proc/mine'"):
        Checkpoints(Path("/proc/mine"), every=4).check()


def test_what_another_job_left_is_not_lost_by_accident(engine: Engine, small: Make, tmp_path: Path) -> None:
    interrupt(engine, small(steps=STEPS), tmp_path, until=5)
    fresh, again = Checkpoints(tmp_path, every=4), Checkpoints(tmp_path, every=4, overwrite=True)
    with pytest.raises(
        BadRequestError, match=r"resume=True\) resumes from them, --overwrite .* starts again"
    ):
        fresh.check()
    with (
        pytest.raises(BadRequestError, match=r"--resume \(in Python: resume=True\) resumes from them"),
        fresh.locked(),
    ):
        pass  # they may have come after the check
    Checkpoints(tmp_path, every=4, resume=True).check()
    again.check()
    with Checkpoints(tmp_path, every=4, resume=True).locked():
        assert list(tmp_path.glob("*/part-*"))
    with again.locked():
        assert not list(tmp_path.glob("*/part-*"))


def test_two_jobs_cannot_use_one_folder(tmp_path: Path) -> None:
    root = tmp_path / "kept"
    said = f"another job is using .*process {os.getpid()}"
    with Checkpoints(root, every=4).locked():
        with pytest.raises(BadRequestError, match=said), Checkpoints(root, every=4, resume=True).locked():
            pass
        Checkpoints(root, every=4).remove()  # does nothing: the folder is in use
        with pytest.raises(BadRequestError, match=said), Checkpoints(root, every=4, resume=True).locked():
            pass
    assert not root.exists()
    Checkpoints(root, every=4).remove()


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Who waits with the removed file open takes the one that is there now."""
    checkpoints, opened = Checkpoints(tmp_path / "kept", every=4), []
    flock = fcntl.flock

    def late(file: Any, operation: int) -> None:
        if not opened:  # its holder leaves and another comes between opening and locking
            opened.append(file)
            (tmp_path / "kept" / "lockstep.lock").unlink()
            (tmp_path / "kept" / "lockstep.lock").touch()
        flock(file, operation)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fcntl, "flock", late)
        lock = checkpoints._hold()
    assert "process" in (tmp_path / "kept" / "lockstep.lock").read_text()
    assert os.path.samestat(os.fstat(lock.fileno()), (tmp_path / "kept" / "lockstep.lock").stat())
    lock.close()


def test_a_lock_that_is_not_lockstep_s_is_refused_and_stays(tmp_path: Path) -> None:
    lock = tmp_path / "lockstep.lock"
    lock.write_text("my notes")
    kept = Checkpoints(tmp_path, every=4)
    with pytest.raises(BadRequestError, match="is not Lockstep's"), kept.locked():
        pass
    kept.remove()
    assert lock.read_text() == "my notes"
    lock.unlink()
    lock.symlink_to(tmp_path / "none" / "lock")
    with pytest.raises(BadRequestError, match="is not Lockstep's"), kept.locked():
        pass
    assert lock.is_symlink()


FOREIGN = (
    "thesis.tex", "photos/p.jpg", "lock", "part-00001-0.pt", "manifest-00001-0.json", "identity.json",
    "0123456789abcdef/notes.txt", "0123456789abcdef/sub/part-00001-0.pt", "a.checkpoints",
)  # fmt: skip


def plant(folder: Path) -> dict[Path, bytes]:
    """Files that are not Lockstep's, however they are called."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    (folder / "empty").mkdir()
    return {folder / name: (folder / name).read_bytes() for name in FOREIGN}


def test_nothing_that_is_not_lockstep_s_is_ever_removed(engine: Engine, small: Make, tmp_path: Path) -> None:
    mine = plant(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "part-00001-0.pt").write_text("mine")
    (tmp_path / "fedcba9876543210").symlink_to(outside)
    request = small(steps=STEPS)
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json", overwrite=True)

    def stop(record: StepRecord) -> None:
        if record.index >= 4:
            raise InterruptedHereError

    for options in ({"overwrite": True}, {"resume": True}, {"overwrite": True}):
        checkpoints = Checkpoints(tmp_path, every=1, **options)
        checkpoints.check()
        with pytest.raises(InterruptedHereError):
            run_job(
                engine,
                job_of(engine, request, outputs, checkpoints=checkpoints),
                lambda *_: nullcontext(stop),
            )
        assert checkpoints.newest is not None and checkpoints.newest >= 3
    bad = Outputs(tmp_path / "a.avi", tmp_path / "a.json")
    with pytest.raises(BadRequestError):
        run_job(
            engine, job_of(engine, request, bad, checkpoints=Checkpoints(tmp_path, every=1, overwrite=True))
        )
    done = run_job(
        engine, job_of(engine, request, outputs, checkpoints=Checkpoints(tmp_path, every=1, resume=True))
    )
    assert done.resumed_at >= 4
    Checkpoints(tmp_path, every=1).remove()
    assert {path: path.read_bytes() for path in mine} == mine
    assert (outside / "part-00001-0.pt").read_text() == "mine" and (tmp_path / "empty").is_dir()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*(name.split("/")[0] for name in FOREIGN), "empty", "outside", "fedcba9876543210"} | {
        "a.mp4", "a.json", "a.png"
    }  # fmt: skip


def test_jobs_that_share_a_folder_do_not_meet(tmp_path: Path) -> None:
    folders = {
        Checkpoints.folder_of(tmp_path / name, tmp_path / "all")
        for name in ("a.mp4", "one/a.mp4", "b.mp4", "x" * 240 + ".mp4")
    }
    assert len(folders) == 4 and {folder.parent for folder in folders} == {tmp_path / "all"}
    for folder in folders:
        Checkpoints(folder, every=1).check()
    same = Checkpoints.folder_of(tmp_path / "one" / ".." / "a.mp4", tmp_path / "all")
    assert same in folders
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    other = Checkpoints.folder_of(tmp_path / "link" / ".." / "a.mp4", tmp_path / "all")
    assert other == Checkpoints.folder_of(tmp_path / "elsewhere" / "a.mp4", tmp_path / "all") not in folders
    assert Checkpoints.folder_of(tmp_path / "a.mp4", None) == tmp_path / "a.checkpoints"


def test_checkpoints_of_an_edited_request_are_kept_and_what_differs_is_said(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    root, request = tmp_path / "kept", small(steps=STEPS, spectrum="paper")
    interrupt(engine, request, root, until=6)
    before = {path: path.read_bytes() for path in root.glob("*/*")}
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json")
    resume = Checkpoints(root, every=1, resume=True)
    edits = {
        "prompt was .*'a red circle moving left on a black background', now it is '.*'": {
            "prompt": f"{request.prompt} at night"
        },
        "seed was 7, now it is 8": {"seed": 8},
        "preset.*was .*, now it is": {"spectrum": "off"},
        "seed was 7, now it is 9; steps was 10, now it is 9": {"seed": 9, "steps": 9},
    }
    for said, edit in edits.items():
        with pytest.raises(BadRequestError, match=f"belong to another request: .*{said}.*They are kept"):
            run_job(engine, job_of(engine, request.model_copy(update=edit), outputs, checkpoints=resume))
    assert {path: path.read_bytes() for path in root.glob("*/*")} == before
    assert run_job(engine, job_of(engine, request, outputs, checkpoints=resume)).resumed_at == 7
    assert not root.exists()


def test_windows_cut_otherwise_and_other_code_are_another_request(
    engine: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = small(steps=STEPS, frames=25)

    def use_window(window: Window) -> None:
        changed = engine.config.model_copy(update={"window": window})
        monkeypatch.setattr(engine, "config", changed)
        monkeypatch.setattr(engine.profile, "config", changed)

    window = Window(frames=13, overlap=4)
    use_window(window)
    first = engine.recipe(engine.plan(request))
    wider = Window(frames=13, overlap=8)
    use_window(wider)
    assert engine.recipe(engine.plan(request)) != first
    use_window(window)
    assert engine.recipe(engine.plan(request)) == first
    monkeypatch.setattr("runtime.recipe.code_version", lambda: "another")
    assert engine.recipe(engine.plan(request)) != first


def test_a_retry_of_a_job_that_may_overwrite_removes_what_is_another_s(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    """The first attempt may have died before it could."""
    root = tmp_path / "kept"
    interrupt(engine, small(steps=STEPS, seed=8), root, until=6)
    retry = Checkpoints(root, every=1, resume=True, overwrite=True)
    outputs = Outputs(tmp_path / "a.mp4", tmp_path / "a.json")
    assert run_job(engine, job_of(engine, small(steps=STEPS), outputs, checkpoints=retry)).resumed_at == 0


def test_nothing_to_resume_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Batch([make_job(tmp_path / "a.mp4", resume=True)]).check_files()
    assert "there is no checkpoint in" in caplog.text and "starting at the first step" in caplog.text
    assert not (tmp_path / "a.checkpoints").exists()


def test_manifests_of_another_group_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    """A step counts once all ranks of one group have it; a former group was larger and had it, too."""

    def manifest(rank: int, topology: Topology) -> None:
        content = {"version": VERSION, "step": 7, "topology": asdict(topology)}
        (tmp_path / manifest_name(7, rank)).write_text(json.dumps(content))

    for rank in range(4):
        manifest(rank, Topology(cfg=2, ring=1, ulysses=2))
    assert complete_steps(tmp_path) == [7]
    manifest(0, Topology(cfg=2, ring=1, ulysses=1))
    assert complete_steps(tmp_path) == []
    manifest(1, Topology(cfg=2, ring=1, ulysses=1))
    assert complete_steps(tmp_path) == [7]


@pytest.mark.parametrize("content", ["[" * 5000, "null", "[]", '{"parts": []}', "{"])
def test_a_damaged_manifest_is_no_checkpoint_and_stops_no_other(content: str, tmp_path: Path) -> None:
    alone = Topology(cfg=1, ring=1, ulysses=1)
    (tmp_path / manifest_name(0, 0)).write_text(content)
    assert complete_steps(tmp_path) == []
    CheckpointWriter(tmp_path, "{}", alone, 0, 1).finish(Snapshot(1, {}, {}, {"cond": {}}))
    assert complete_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("cut", ""),
        ("another version", "was written by another version of Lockstep"),
        ("a broken disk", "cannot read .*: Input/output error"),
    ],
)
def test_what_is_of_use_to_others_is_kept_and_what_is_to_nobody_is_made_again(
    harm: str, said: str, tmp_path: Path
) -> None:
    root, identity = tmp_path / "a.checkpoints", '{"request": {}}'
    fresh, resume = Checkpoints(root, every=1), Checkpoints(root, every=1, resume=True)
    folder = fresh.of(identity)
    folder.mkdir(parents=True)
    manifest = folder / manifest_name(7, 0)
    match harm:
        case "cut":
            manifest.write_text('{"version": 3, "st')
        case "another version":
            manifest.write_text(json.dumps({"version": VERSION + 1}))
        case "a broken disk":  # as whoever reads there hears
            manifest.symlink_to("/proc/self/mem")
    with pytest.raises(BadRequestError, match=r"\(in Python: resume=True\) starts at the first step|cannot"):
        fresh.check()
    assert os.path.lexists(manifest)
    if not said:
        resume.check()
        with resume.locked([identity]):
            assert resume.newest is None
        assert manifest.exists()  # until something is written in its place
        return
    for refused in (resume.check, lambda: resume.locked([identity]).__enter__()):
        with pytest.raises(BadRequestError, match=f"resume: .*{said}.*The checkpoints are kept"):
            refused()
        assert os.path.lexists(manifest)
    with Checkpoints(root, every=1, overwrite=True).locked([identity]):
        assert not os.path.lexists(manifest)


@pytest.mark.parametrize("content", ["[" * 5000, "null", '{"identity": [1]}', '{"identity": "x"}'])
def test_checkpoints_whose_request_is_not_known_are_refused(content: str, tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "a.checkpoints", every=1, resume=True)
    folder = kept.of("another")
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(content)
    (folder / manifest_name(0, 0)).write_text("{}")
    with pytest.raises(BadRequestError, match="do not match"), kept.locked(['{"request": {}}']):
        pass
    assert (folder / "identity.json").read_text() == content


def test_what_was_restored_no_longer_needs_its_files(tmp_path: Path) -> None:
    """Parts are mapped while they are read; another rank may remove or replace them right after."""
    values = {step: torch.randn(1, 300, 8).bfloat16() for step in range(3)}
    shared = {"latents": torch.randn(2, 3), "sampler": {"outputs": [torch.randn(4), None]}, "stream": {}}
    alone = Topology(cfg=1, ring=1, ulysses=1)
    writer = CheckpointWriter(tmp_path, "{}", alone, 0, 1)
    writer.finish(Snapshot(0, shared, {"sums": 1}, {"cond": values, "uncond": values}))
    restored = restore(tmp_path, alone, Ranks.alone(torch.device("cpu")), ("cond",))
    assert restored is not None and restored.history.keys() == {"cond"}
    (part,) = tmp_path.glob("part-*.pt")
    with part.open("r+b") as file:
        file.write(bytes(part.stat().st_size))
    assert all(torch.equal(restored.history["cond"][step], values[step]) for step in values)
    assert torch.equal(restored.shared["latents"], shared["latents"])
    assert torch.equal(restored.shared["sampler"]["outputs"][0], shared["sampler"]["outputs"][0])


def on_ranks(ranks: Ranks, degrees: Degrees, folder: Path, until: int | None, spectrum: str = "paper") -> Any:
    """Generate with checkpoints; rank 1 dies after step `until`."""
    engine = Engine(load_config("wan-tiny"), ranks, degrees)
    request = engine.config.request(PROMPT, **SMALL, spectrum=spectrum)

    def after(record: StepRecord) -> None:
        if record.index == until and ranks.rank == 1:
            die()

    sink = FrameBuffer()
    sinks = [sink] if ranks.is_leader else []
    checkpoints = Checkpoints(folder, every=1, resume=until is None)
    result = engine.generate(request, sinks, after, checkpoints)
    frames = sink.frames if ranks.is_leader else None
    return frames, result.resumed_at, result.digests, result.sent, result.errors


def on_slow_disks(ranks: Ranks, folder: Path) -> int:
    """The second rank's disk takes longer for the last checkpoint than ranks are waited for."""
    engine = Engine(load_config("wan-tiny"), ranks, Degrees(ulysses=2))
    request = engine.config.request(PROMPT, **{**SMALL, "steps": 2})
    save = torch.save

    def slowly(content: Any, file: Any) -> None:
        if ranks.rank == 1:
            time.sleep(6.0)
        save(content, file)

    torch.save = slowly
    sinks = [FrameBuffer()] if ranks.is_leader else []
    return engine.generate(request, sinks, checkpoints=Checkpoints(folder, every=100)).checkpoint_bytes


@pytest.mark.timeout(120)
def test_a_last_checkpoint_may_take_its_time(tmp_path: Path) -> None:
    outcomes = watch_ranks(2, on_slow_disks, tmp_path, timeout=3)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert all(outcome.result > 0 for outcome in outcomes)


def from_slow_disks(ranks: Ranks, folder: Path) -> int:
    """The second rank takes longer to read its checkpoint than ranks are waited for."""
    engine = Engine(load_config("wan-tiny"), ranks, Degrees(ulysses=2))
    request = engine.config.request(PROMPT, **{**SMALL, "steps": 3})
    sinks = [FrameBuffer()] if ranks.is_leader else []
    engine.generate(request, sinks, checkpoints=Checkpoints(folder, every=1))
    load = torch.load

    def slowly(*arguments: Any, **options: Any) -> Any:
        if ranks.rank == 1:
            time.sleep(6.0)
        return load(*arguments, **options)

    torch.load = slowly
    sinks = [FrameBuffer()] if ranks.is_leader else []
    return engine.generate(request, sinks, checkpoints=Checkpoints(folder, every=1, resume=True)).resumed_at


@pytest.mark.timeout(120)
def test_reading_a_checkpoint_may_take_its_time(tmp_path: Path) -> None:
    outcomes = watch_ranks(2, from_slow_disks, tmp_path, timeout=3)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert all(outcome.result == 3 for outcome in outcomes)


@pytest.fixture(scope="module")
def on_whole_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Degrees], Any]:
    """What `on_ranks` returns on ranks of which none dies; each number and arrangement is run once."""

    @cache
    def made(world: int, degrees: Degrees) -> Any:
        return run_ranks(world, on_ranks, degrees, tmp_path_factory.mktemp("whole"), None)[0]

    return made


@pytest.fixture(scope="module")
def alone() -> tuple[Frames, Result]:
    engine = Engine(load_config("wan-tiny"), Ranks.alone(torch.device("cpu")))
    sink = FrameBuffer()
    result = engine.generate(engine.config.request(PROMPT, **SMALL, spectrum="paper"), [sink])
    return sink.frames, result


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, Degrees(cfg=2)), (2, Degrees(cfg=2)), marks=pytest.mark.slow),
        ((2, Degrees(ulysses=2)), (2, Degrees(ulysses=2))),
        ((4, Degrees(cfg=2, ring=2)), (2, Degrees(ulysses=2))),
        pytest.param((2, Degrees(ulysses=2)), (3, Degrees(ring=3)), marks=pytest.mark.slow),
        ((2, Degrees(cfg=2)), (1, Degrees())),
    ],
    ids=str,
)
def test_ranks_that_died_are_replaced_by_as_many_or_others(
    tmp_path: Path,
    alone: tuple[Frames, Result],
    on_whole_ranks: Callable[[int, Degrees], Any],
    before: Any,
    after: Any,
) -> None:
    outcomes = watch_ranks(before[0], on_ranks, before[1], tmp_path, 7, timeout=10)
    assert outcomes[1].code == -9
    frames, resumed_at, digests, sent, errors = run_ranks(after[0], on_ranks, after[1], tmp_path, None)[0]
    undisturbed = on_whole_ranks(*after)
    assert resumed_at >= 5
    assert digests == undisturbed[2] == alone[1].digests * after[0]
    if before == after:
        assert np.array_equal(frames, undisturbed[0])
        assert (sent, errors) == undisturbed[3:]
    else:
        assert np.abs(frames.astype(int) - undisturbed[0]).max() <= 1
        assert errors == pytest.approx(undisturbed[4], rel=1e-3)
    assert np.abs(frames.astype(int) - alone[0]).max() <= 1


@pytest.mark.timeout(120)
def test_what_every_rank_has_whole_goes_on_with_any_ranks(tmp_path: Path) -> None:
    preset = tmp_path / "guided.yaml"
    preset.write_text("stream: guided\nschedule: {kind: paper}\npredictor: {kind: linear}\n")
    folder, split, spectrum = tmp_path / "kept", Degrees(cfg=2), str(preset)
    assert watch_ranks(2, on_ranks, split, folder, 7, spectrum, timeout=10)[1].code == -9
    copied = shutil.copytree(folder, tmp_path / "copy")
    undisturbed = run_ranks(2, on_ranks, split, tmp_path / "other", None, spectrum)[0]
    same = run_ranks(2, on_ranks, split, folder, None, spectrum)[0]
    fewer = run_ranks(1, on_ranks, Degrees(), copied, None, spectrum)[0]
    assert same[1] == fewer[1] >= 5
    assert np.array_equal(same[0], undisturbed[0]) and same[3:] == undisturbed[3:]
    assert np.abs(fewer[0].astype(int) - undisturbed[0]).max() <= 1


def test_what_is_older_is_removed_and_what_is_another_s_is_kept(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, every=1)
    interrupt(engine, small(steps=STEPS), tmp_path, until=0)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("part-mine-0.pt", "manifest-00000-mine-0.json", "part-1-0.pt"):
        (folder / name).write_text("mine")
    generate(engine, small(steps=STEPS), checkpoints)
    left = {path.name for path in folder.iterdir()}
    assert {"part-mine-0.pt", "manifest-00000-mine-0.json", "part-1-0.pt"} <= left
    assert manifest_name(0, 0) not in left


def test_a_job_that_fails_leaves_no_thread_that_writes(
    engine: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def slowly(content: Any, file: Any) -> None:
        time.sleep(0.5)
        save(content, file)

    def fail(record: StepRecord) -> None:
        raise InterruptedHereError

    monkeypatch.setattr(torch, "save", slowly)
    with pytest.raises(InterruptedHereError):
        engine.generate(small(steps=STEPS), [FrameBuffer()], fail, Checkpoints(tmp_path, every=1))
    assert "lockstep-checkpoint" not in [thread.name for thread in threading.enumerate()]
