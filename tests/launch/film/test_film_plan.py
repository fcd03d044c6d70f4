"""What a film is said to take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

from launch import cli
from launch.film.dry_run import dry_run_table, estimate, estimate_all, profile_of
from launch.film.shots import Film, plan_film
from runtime.profile import ModelProfile
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.settings import RehearsedProfile
from runtime.request.config import Config, Lora
from spectrum import paper_schedule
from tests.conditioned import config_of, sampled, write_two_experts
from tests.runtime.models.wan.test_lora_experts import write as write_lora

FILM = """\
title: Three shots
defaults: {steps: 6, spectrum: "off"}
shots:
  - {id: one, prompt: a}
  - {id: two, prompt: b}
  - {id: long, prompt: c, frames: 33}
"""


_OFF = ("compile", "fuse_projections", "fuse_forecasts", "batch_guidance", "overlap_exchanges")
SAME = dict.fromkeys(_OFF, False) | {"quantization": "none"}


@pytest.fixture
def film(tmp_path: Path) -> Film:
    (tmp_path / "film.yaml").write_text(FILM)
    return plan_film(tmp_path / "film.yaml", out=tmp_path / "film")


def timed(film: Film, **changes: object) -> None:
    """A report of a shot that is not the film's, with a second for each window of a computed step."""
    request = film.shots[0].request.model_dump()
    report = {
        "request": request,
        "model": {"name": "wan-tiny"},
        "performance": SAME,
        "topology": {"world": 1},
        "windows": 2,
        "step_seconds": {"computed_median": 2.0, "forecast_median": None},
    }
    path = film.out / "shots" / "other.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | changes))


def told(film: Film, replicas: int = 1, price: float | None = None) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(dry_run_table(estimate_all(film, replicas, price)))
    return " ".join(capture.get().replace("│", " ").split())


def test_times_are_those_of_shots_of_the_kind(film: Film) -> None:
    assert estimate(film, 0).seconds is None
    timed(film)
    windows = film.shots[2].windows
    assert windows > 1
    assert [estimate(film, number).seconds for number in (0, 1, 2)] == [6.0, 6.0, 6.0 * windows]
    compared = replace(film, compare=True)
    assert estimate(compared, 0).seconds == 12.0


def test_steps_that_a_second_expert_begins_with_are_counted(config: Config, tmp_path: Path) -> None:
    two = sampled(config_of(config, write_two_experts("WanPipeline", tmp_path / "two")), "unipc", 12.0)
    (tmp_path / "two.yaml").write_text(two.model_dump_json(exclude_none=True))
    board = "title: x\nshots:\n  - {id: one, prompt: a, config: ./two.yaml, steps: 20, spectrum: paper}\n"
    (tmp_path / "film.yaml").write_text(board)
    film = plan_film(tmp_path / "film.yaml", out=tmp_path / "film")
    timesteps = ModelProfile(two).fresh_sampler(film.shots[0].request).timesteps
    first = int((timesteps >= 875).sum())
    expected = paper_schedule(first).nfe + paper_schedule(20 - first, warmup=2).nfe
    assert estimate(film, 0).nfe == expected != paper_schedule(20).nfe


def test_what_was_never_timed_is_rehearsed(film: Film) -> None:
    gpu = load_gpu("h100")
    one, two, long = (estimate(film, number, gpu).seconds for number in range(3))
    assert one is not None and long is not None
    assert one == two and long == film.shots[2].windows * one > 0
    console = Console(width=200)
    with console.capture() as capture:
        console.print(dry_run_table(estimate_all(film, gpu=gpu)))
    assert "unknown" not in capture.get()
    assert "estimated by a rehearsal on NVIDIA H100" in " ".join(capture.get().split())


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "another"}},
        {"topology": {"world": 2}},
        {"performance": {**SAME, "quantization": "fp8"}},
        {"performance": {**SAME, "batch_guidance": True}},
        {"performance": {**SAME, "overlap_exchanges": True}},
        {"request": {"width": 64}},
        {"windows": None},
        {"windows": -2},
        {"windows": 1e-320},
        {"windows": True},
        {"step_seconds": {"computed_median": 10**400, "forecast_median": None}},
        {"step_seconds": {"computed_median": float("nan"), "forecast_median": None}},
        {"step_seconds": [], "x": json.loads("[" * 900 + "]" * 900)},
    ],
)
def test_reports_of_other_models_ranks_and_sizes_say_nothing(film: Film, changes: dict[str, object]) -> None:
    timed(film, **changes)
    assert estimate(film, 0).seconds is None
    todo = "to do: 0.0 s of denoising on 1 replica, 0.0 rank-seconds, plus shots whose time is not known"
    assert todo in told(film)


def test_a_shot_that_may_batch_guidance_takes_times_of_shots_that_did(film: Film, tmp_path: Path) -> None:
    (tmp_path / "batched.yaml").write_text(
        "model: wan-tiny\nbatch_guidance: auto\ndefaults: {width: 64, height: 48, frames: 5}\n"
    )
    path = tmp_path / "batched-film.yaml"
    path.write_text(FILM.replace("defaults: {", "defaults: {config: batched.yaml, "))
    batched = plan_film(path, out=tmp_path / "batched")
    for did, computed in ((False, 2.0), (True, 3.0)):
        steps = {"computed_median": computed, "forecast_median": None}
        timed(batched, performance={**SAME, "batch_guidance": did}, step_seconds=steps)
        assert estimate(batched, 0).seconds == computed / 2 * 6


def test_replicas_share_the_time_and_not_the_cost(film: Film) -> None:
    timed(film)
    total = 12.0 + estimate(film, 2).seconds  # type: ignore[operator]
    assert f"to do: {total:.1f} s of denoising on 1 replica, {total:.1f} rank-seconds" in told(film)
    said = told(film, replicas=2, price=36.0)
    assert "one 17 1 6 6.0 6.0 0.0600 to do" in said
    last = 6.0 + estimate(film, 2).seconds  # type: ignore[operator]
    expected = f"{last:.1f} s of denoising on 2 replicas, {total:.1f} rank-seconds, {total / 100:.4f} in cost"
    assert f"to do: {expected}" in said


def test_what_makes_a_film_faster_is_said(film: Film, tmp_path: Path) -> None:
    assert "performance" not in told(film)
    (tmp_path / "fast.yaml").write_text(
        "model: wan-tiny\nperformance: fast\ncompile: false\ndefaults: {width: 64, height: 48, frames: 5}\n"
    )
    path = tmp_path / "faster.yaml"
    path.write_text(FILM.replace("defaults: {", "defaults: {config: fast.yaml, "))
    said = told(plan_film(path, out=tmp_path / "faster"))
    assert "performance fast (fused projections, fused forecasts, guidance in one batch: auto)" in said


def test_the_headings_fit_a_narrow_terminal(film: Film) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(dry_run_table(estimate_all(film, price=36.0)))
    assert "…" not in capture.get()


def test_ranks_that_work_together_cost_each(film: Film) -> None:
    pair = replace(film, ranks=2)
    timed(pair, topology={"world": 2})
    assert (estimate(pair, 0).seconds, estimate(pair, 0).rank_seconds) == (6.0, 12.0)


def test_what_many_shots_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(name: str, load: Callable[[str], object]) -> Callable[[str], object]:
        return lambda given: (read.append(f"{name} {given}"), load(given))[1]

    for where in ("runtime.film.storyboard.open_config", "runtime.profile.load_preset"):
        module, _, name = where.rpartition(".")
        monkeypatch.setattr(where, noted(where, getattr(import_module(module), name)))
    shots = "".join(f"  - {{id: s{number}, prompt: a}}\n" for number in range(40))
    (tmp_path / "film.yaml").write_text(f"title: Forty\ndefaults: {{spectrum: planned-14}}\nshots:\n{shots}")
    film = plan_film(tmp_path / "film.yaml", out=tmp_path / "film")
    assert "40 shots" in told(film)
    assert len(read) == len(set(read)) == 2
    assert len({one.recipe.digest for one in film.shots}) == 40


def test_a_table_of_very_many_shots_says_how_many_more_there_are(tmp_path: Path) -> None:
    shots = "".join(f"  - {{id: s{number}, prompt: a, frames: 5}}\n" for number in range(777))
    (tmp_path / "film.yaml").write_text(f'title: Many\ndefaults: {{spectrum: "off"}}\nshots:\n{shots}')
    said = told(plan_film(tmp_path / "film.yaml", out=tmp_path / "film"))
    assert "777 shots, 3885 frames" in said
    assert said.count("to do") == 500 + 1 and "… 277 more" in said


def test_a_model_that_is_not_here_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings of published models are known, and those of others are a few small files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    board = "title: x\ndefaults: {config: wan2.2-t2v-14b-480p}\nshots:\n  - {id: one, prompt: a}\n"
    (tmp_path / "film.yaml").write_text(board)
    words = ["storyboard", str(tmp_path / "film.yaml"), "--out", str(tmp_path / "film")]
    assert cli.run([*words, "--dry-run", "--json"]) == 0
    [shot] = json.loads(capsys.readouterr().out)["shots"]
    assert (shot["frames"], shot["nfe"], shot["state"]) == (81, 13, "to do")
    assert cli.run(words) == 2  # the film itself needs the weights
    assert "it could not be downloaded" in capsys.readouterr().err
    (tmp_path / "film.yaml").write_text(board.replace("14b-480p", "14b-480p, lora: {file: none}"))
    assert cli.run([*words, "--dry-run"]) == 2
    assert "none' given; it cannot be read" in capsys.readouterr().err


def test_of_settings_alone_a_shot_has_the_same_files(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in the download cache has the revision, sampler and LoRAs of the one that is loaded."""
    two = sampled(config_of(config, write_two_experts("WanPipeline", tmp_path / "two")), "unipc", 12.0)
    lora = Lora(file=write_lora(tmp_path / "ink.safetensors", 0), expert="low")
    two = two.model_copy(update={"lora": (lora,)})
    monkeypatch.setattr("launch.film.dry_run.is_local", lambda _: False)
    monkeypatch.setattr("launch.film.dry_run.settings_of", lambda *_: None)
    request = two.request("x", spectrum="paper", steps=20)
    known, loaded = profile_of(two), ModelProfile(two)
    assert isinstance(known, RehearsedProfile)
    preset = loaded.check(request)
    assert known.recipe(request, preset, None) == loaded.recipe(request, preset, None)
