"""Every table fits 80 columns, and cuts no name."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import RenderableType

from launch import cli
from launch.commands.compare import comparison_table
from launch.commands.doctor import examine
from launch.commands.doctor_models import Component, Fit, ModelFindings, fits_table, model_table
from launch.commands.plan import overview, overview_table, steps_table
from launch.film.dry_run import dry_run_table, estimate_all
from launch.film.shots import plan_film
from launch.serve.entries import State
from launch.serve.queue import Queue
from launch.serve.status import tables
from launch.shell.terminal import Terminal
from runtime.measure.compare import Compared, Comparison
from runtime.measure.plans import make_plan
from runtime.media.quality import Quality
from runtime.rehearsal.machine import load_gpu
from runtime.request.config import available, load_config
from tests.jobs import TINY, make_job

LONGEST = max(available("."), key=len)
WIDTH = 80


def shown(parts: Iterable[RenderableType]) -> str:
    """What is printed on a terminal of 80 columns; nothing is cut."""
    out = StringIO()
    console = Terminal(width=WIDTH, file=out)
    for part in parts:
        console.print(part)
    said = out.getvalue()
    assert max(map(len, said.splitlines())) <= WIDTH
    assert "…" not in said
    return said


def test_doctor() -> None:
    said = shown(examine())
    assert all(name in said for name in available("."))
    assert all(word in said for word in ("heads", "weights", "to download", "planned-experts-14"))


def test_what_fits_a_gpu_and_what_a_model_is() -> None:
    changes = {"memory.transformer": "offload", "memory.text_encoder": "free"}
    found = {LONGEST: {1: Fit(None, {}), 2: Fit(2**35, changes), 4: Fit(2**34, changes), 8: Fit(2**33, {})}}
    said = shown([fits_table(load_gpu("h100"), found)])
    assert all(word in said for word in (LONGEST, "32.0", "text_encoder", "transformer"))
    file = "/a/long/way/to/the/folder/diffusion_pytorch_model-00001-of-00012.safetensors"
    parts = [Component("transformer_2", 14_288_491_584, ["BF16", "F32"], [file])]
    model = ModelFindings(f"./{LONGEST}", "WanImageToVideoPipeline", "sha256:0123", parts)
    said = shown([model_table(model)])
    assert "transformer_2" in said and "14,288,491,584" in said


def test_plans() -> None:
    said = shown([overview_table("wan-tiny", overview("wan-tiny"))])
    assert all(word in said for word in ("planned", "fitted", "54.6 (48.1)", "computed steps"))
    for method in ("planned", "fitted"):
        assert "expected error" in shown([steps_table(make_plan("wan-tiny", nfe=8, method=method))])


def test_a_comparison() -> None:
    names = ["off", "planned-experts-14", "a-preset-of-my-own-with-a-long-name.yaml"]
    tiny, quality = load_config("wan-tiny"), Quality(45.12, 0.9987, 98.7)
    comparison = Comparison(tiny, dict.fromkeys(names), [tiny.request("x")])  # type: ignore[arg-type]
    comparison.results += [
        Compared("x", 0, name, 14, 50, 1234.5, None if name == "off" else quality, 46.0) for name in names
    ]
    said = shown([comparison_table(comparison)])
    assert names[1] in said and "45.1" in said and "98.7" in said


def test_a_dry_run(tmp_path: Path) -> None:
    board = tmp_path / "film.yaml"
    longest = "shot-" * 12  # as long as an id may be
    shots = f"[{{id: {longest}, prompt: a, frames: 801}}, {{id: b, prompt: b}}]"
    board.write_text(f"title: A film\nshots: {shots}\n")
    said = shown([dry_run_table(estimate_all(plan_film(board, out=tmp_path / "film"), price=36.0))])
    column = "".join(line.strip().split(" ")[0] for line in said.splitlines())
    assert longest in column.replace("b", "")
    assert "preset best-14 (calibrated for this model, sampler and size)" in " ".join(said.split())


def test_a_queue(tmp_path: Path) -> None:
    name, owner = "n" * 30, "o" * 20
    with closing(Queue(tmp_path / "queue")) as queue:
        job = make_job(tmp_path / ("v" * 60 + ".mp4"), **TINY).absolute()
        queue.submit(job, name=name, owner=owner, priority=1_000_000, seconds=3600.0)
        queue.cancel(1)
        said = shown(tables(queue, tuple(State)))
    letters = {letter: sum(line.count(letter * 3) for line in said.splitlines()) for letter in "nov"}
    assert all(letters.values())
    assert said.count("n" * 5) and "".join(said.split()).count("v") >= 60


def test_a_rehearsal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    words = "--size 64x48 --frames 5 --steps 6 --ranks 2 --topologies --gpu h100"
    assert cli.run(["rehearse", *words.split()]) == 0
    said: Any = capfd.readouterr().out
    assert "…" not in said
    assert all(len(line) <= WIDTH for line in said.splitlines() if line.startswith(("│", "┃", "┏", "└")))
    assert "cfg × ring ×" in said and "read and written, GB" in said
