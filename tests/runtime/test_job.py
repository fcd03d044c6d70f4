"""One request to files: videos, report and picture."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from matplotlib.figure import Figure
from PIL import Image

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, JobFailedError
from runtime.jobs.run import run_job
from runtime.media.mp4 import FrameBuffer
from runtime.media.raw import check_room
from runtime.reports.report import Report
from runtime.reports.run_picture import scale_errors, title_of
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import OnStep, StepRecord
from spectrum import StepKind
from tests.jobs import job_of

Make = Callable[..., VideoRequest]


def outputs(folder: Path, **changes: bool) -> Outputs:
    return Outputs(folder / "a.mp4", folder / "a.json", **changes)


def test_report_holds_the_contracts_fields(engine: Engine, small: Make, tmp_path: Path) -> None:
    run_job(engine, job_of(engine, small(spectrum="paper", steps=8), outputs(tmp_path)))
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["schema"] == 1
    assert set(report["request"]) >= {
        "prompt", "negative", "width", "height", "frames", "steps", "guidance", "seed", "max_sequence_length",
        "spectrum",
    }  # fmt: skip
    assert report["model"]["name"] == "wan-tiny"
    assert report["model"]["revision"] == engine.model.revision
    assert report["topology"] == {"world": 1, "cfg": 1, "ring": 1, "ulysses": 1}
    assert report["steps"] == 8
    assert report["computed"] == {"cond": [0, 1, 2, 3, 4, 6], "uncond": [0, 1, 2, 3, 4, 6]}
    assert report["nfe"] == {"cond": 6, "uncond": 6}
    assert len(report["decision_digest"]) == 1
    assert set(report["seconds"]) == {"load", "lora", "encode", "denoise", "decode", "write", "total"}
    parts = sum(report["seconds"][name] for name in ("load", "lora", "encode", "denoise", "decode", "write"))
    assert report["seconds"]["total"] == pytest.approx(parts)
    assert report["step_seconds"]["computed_median"] > report["step_seconds"]["forecast_median"] > 0
    assert report["forecaster"]["features_kept"] == 6
    assert report["collective_bytes"] == {"computed_step": 0, "forecast_step": 0}
    assert report["quality"] is None
    assert {"lockstep", "torch", "diffusers"} <= set(report["versions"])
    assert [step["kind"] for step in report["step_log"]].count("forecast") == 2
    assert Report.model_validate(report).to_json() == (tmp_path / "a.json").read_text().strip()


def test_without_guidance_there_is_no_unconditional_branch(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    report = run_job(engine, job_of(engine, small(guidance=1.0, spectrum="off"), outputs(tmp_path)))
    assert report.computed.uncond == []
    assert (report.nfe.cond, report.nfe.uncond) == (6, 0)


def test_files_are_made_for_every_video(engine: Engine, small: Make, tmp_path: Path) -> None:
    report = run_job(engine, job_of(engine, small(videos=2), outputs(tmp_path)))
    assert {p.name for p in tmp_path.iterdir()} == {"a-1.mp4", "a-2.mp4", "a.json", "a.png"}
    assert report.videos == [str(tmp_path / "a-1.mp4"), str(tmp_path / "a-2.mp4")]


def test_the_mp4_shows_the_generated_frames(engine: Engine, small: Make, tmp_path: Path) -> None:
    """Decoded again, the file is the full-precision frames but for the codec's loss."""
    request = small(spectrum="off", steps=20, guidance=3.0)
    run_job(engine, job_of(engine, request, outputs(tmp_path)))

    kept = FrameBuffer()
    engine.generate(request, [kept])
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(tmp_path / "a.mp4")]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    shown = np.frombuffer(data, np.uint8).reshape(kept.frames.shape)
    error = np.mean((shown.astype(float) - kept.frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 25


def test_the_picture_names_a_preset_without_its_folders(engine: Engine, small: Make, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("schedule: {kind: full}\n")
    report = run_job(engine, job_of(engine, small(spectrum=str(preset), steps=1), outputs(tmp_path)))
    assert "mine.yaml" in title_of(report) and str(tmp_path) not in title_of(report)


def test_the_picture_is_a_picture(engine: Engine, small: Make, tmp_path: Path) -> None:
    run_job(engine, job_of(engine, small(spectrum="paper", steps=8), outputs(tmp_path)))
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for colour in ((0x1F, 0x4E, 0x79), (0xF0, 0xA0, 0x30)):  # computed and forecast bars
        assert (np.abs(image.astype(int) - colour).sum(-1) < 12).sum() > 200


@pytest.mark.parametrize(
    "errors", [[0.013, 0.3], [0.1, 0.27], [0.2, 0.21], [1e-7, 3.0], [0.05], [0.4, 0.9, 0.0], [0.0]]
)
def test_the_labels_of_errors_have_room(errors: list[float]) -> None:
    figure = Figure(figsize=(9, 5.2), layout="constrained", dpi=130)
    axes = figure.subplots(2, 1)[1]
    axes.plot(range(len(errors)), errors)
    scale_errors(axes, errors)
    figure.savefig(io.BytesIO(), format="png")
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    shown = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    boxes = sorted((label.get_window_extent().y0, label.get_window_extent().y1) for label in shown)
    assert len(boxes) >= 2
    assert all(below[1] <= above[0] for below, above in pairwise(boxes))


def test_comparison_measures_against_the_full_sampler(engine: Engine, small: Make, tmp_path: Path) -> None:
    seen: list[str] = []

    @contextmanager
    def note(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        seen.append(f"{label}: {kinds.count(StepKind.FORECAST)} of {len(kinds)} forecast")
        yield lambda record: seen.append(record.kind)

    request = small(spectrum="paper", steps=12, width=96, height=96)
    report = run_job(engine, job_of(engine, request, outputs(tmp_path), compare=True), note)
    assert seen[0] == "off, seed 7: 0 of 12 forecast"
    assert seen[13] == "paper, seed 7: 4 of 12 forecast"
    assert len(seen) == 2 * 13
    assert report.quality is not None and report.comparison is not None
    assert 15 < report.quality.psnr < 100
    assert 0 < report.quality.ssim < 1
    assert report.comparison.ideal_speedup == pytest.approx(12 / report.nfe.cond)
    assert report.comparison.speedup > 0


def test_comparing_the_full_sampler_with_itself_is_perfect(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    request = small(spectrum="off", width=96, height=96, steps=2)
    report = run_job(engine, job_of(engine, request, outputs(tmp_path), compare=True))
    assert report.quality is not None
    assert report.quality.psnr == 100.0


@pytest.mark.parametrize(
    ("existing", "mine"),
    [
        ("a.mp4", b"\0\0\0\x18ftypisom"),
        ("a.json", b'{"decision_digest": [], "request": {}}'),
        ("a.png", b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_nothing_that_exists_is_replaced_without_leave(
    engine: Engine, small: Make, tmp_path: Path, existing: str, mine: bytes
) -> None:
    (tmp_path / existing).write_bytes(mine)
    with pytest.raises(BadRequestError, match=f"{existing}' exists"):
        run_job(engine, job_of(engine, small(), outputs(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == [existing]
    run_job(engine, job_of(engine, small(steps=1), outputs(tmp_path, overwrite=True)))
    assert (tmp_path / existing).read_bytes() != mine


def test_names_must_say_what_the_files_are(engine: Engine, small: Make, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"must end in \.mp4"):
        run_job(engine, job_of(engine, small(), Outputs(tmp_path / "a.avi", tmp_path / "a.json")))
    with pytest.raises(BadRequestError, match=r"must end in \.json"):
        run_job(engine, job_of(engine, small(), Outputs(tmp_path / "a.mp4", tmp_path / "a.txt")))


@pytest.mark.parametrize("when", [0, 3])
def test_an_interrupted_job_leaves_nothing(engine: Engine, small: Make, tmp_path: Path, when: int) -> None:
    def cancel(record: StepRecord) -> None:
        if record.index == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(
            engine, job_of(engine, small(spectrum="paper"), outputs(tmp_path)), lambda *_: nullcontext(cancel)
        )
    assert list(tmp_path.iterdir()) == []


def test_an_ffmpeg_that_stops_ends_the_job_within_the_busy_timeout(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    impatient = Engine(engine.config.model_copy(update={"busy_timeout": 1.0}))

    def stop(record: StepRecord) -> None:
        started: list[psutil.Process] = []
        while record.index == 0 and not started:
            children = psutil.Process().children(recursive=True)
            started = [child for child in children if "ffmpeg" in child.name()]
        for ffmpeg in started:
            ffmpeg.suspend()

    with pytest.raises(JobFailedError, match=r"ffmpeg could not write the video \(it did nothing for 1 s"):
        run_job(impatient, job_of(impatient, small(), outputs(tmp_path)), lambda *_: nullcontext(stop))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_while_a_job_runs_is_kept(engine: Engine, small: Make, tmp_path: Path) -> None:
    def appear(record: StepRecord) -> None:
        (tmp_path / "a.mp4").write_text("mine")

    with pytest.raises(JobFailedError, match=r"a\.mp4' was created by another process .*a\.2\.mp4"):
        run_job(engine, job_of(engine, small(), outputs(tmp_path)), lambda *_: nullcontext(appear))
    assert (tmp_path / "a.mp4").read_text() == "mine"
    assert (tmp_path / "a.2.mp4").stat().st_size > 500
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.2.mp4", "a.2.json", "a.2.png"}


@pytest.mark.parametrize("absolute", [False, True])
def test_a_job_knows_its_own_report_by_any_path(
    engine: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    request = small(steps=2, spectrum="off")
    job = job_of(engine, request, Outputs.named(Path("a.mp4")))
    assert not job.is_made()
    run_job(engine, job.absolute() if absolute else job)
    assert job.is_made() and job.absolute().is_made() is absolute
    other = request.model_copy(update={"seed": request.seed + 1})
    assert not job_of(engine, other, Outputs.named(Path("a.mp4"))).is_made()


def test_a_comparison_that_was_interrupted_reports_what_all_steps_took(
    engine: Engine, small: Make, tmp_path: Path
) -> None:
    request, root = small(spectrum="paper", steps=12), tmp_path / "kept"

    @contextmanager
    def interrupted(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        def after(record: StepRecord) -> None:
            if label.startswith("paper") and record.index == 7:
                raise KeyboardInterrupt

        yield after

    with pytest.raises(KeyboardInterrupt):
        kept = Checkpoints(root, every=1, overwrite=True)
        run_job(
            engine, job_of(engine, request, outputs(tmp_path), compare=True, checkpoints=kept), interrupted
        )
    full_steps: list[float] = []

    @contextmanager
    def note(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        yield lambda record: full_steps.append(record.index) if label.startswith("off") else None

    kept = Checkpoints(root, every=1, resume=True)
    report = run_job(engine, job_of(engine, request, outputs(tmp_path), compare=True, checkpoints=kept), note)
    assert full_steps == []  # all were taken from the checkpoint, with their times
    assert report.resumed_at >= 6 and report.comparison is not None
    ours = sum(step.seconds for step in report.step_log)
    assert report.comparison.speedup == pytest.approx(report.comparison.denoise_seconds / ours)
    slowest = max(step.seconds for step in report.step_log)
    assert report.comparison.denoise_seconds > 2 * slowest
    assert report.seconds.denoise < ours  # of this process alone


def test_temporary_files_that_do_not_fit_name_their_folder(
    engine: Engine, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with pytest.raises(BadRequestError, match=r"MB of raw frames do not fit in '.*temporary'.*\(set TMPDIR"):
        check_room(small(), 10**9)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    said = r"temporary files: cannot write in '.*temporary': File too large \(set TMPDIR"
    try:
        with pytest.raises(JobFailedError, match=said):
            run_job(engine, job_of(engine, small(), outputs(tmp_path), compare=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
