"""docs/extending.md is true: the package that it shows is installed, and what it adds runs."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import cli
from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files.extensions import Registry
from runtime.forecasting.parts import PREDICTORS, SCHEDULES, add_schedule
from runtime.forecasting.presets import load_preset
from runtime.forecasting.streams import STREAM_TRAITS
from runtime.parallel.kernels import KERNELS, add_kernel, resolve
from runtime.request.config import Config
from runtime.request.video_request import VideoRequest
from runtime.sampling.streams import STREAMS, add_stream
from spectrum import paper_schedule
from tests.places import ROOT
from tests.stopping import InterruptedHereError, generate

Make = Callable[..., VideoRequest]
CPU = torch.device("cpu")
STEPS, COMPUTED = 6, [0, 1, 4]


def blocks() -> dict[str, str]:
    """The page's blocks of code that are files: name → content."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return dict(found)


def install(folder: Path, files: dict[str, str]) -> None:
    """Lay a package into a folder as pip would: its files, and what it announces."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages may be laid into; what they have added is gone after the test."""
    known = [(table, dict(table)) for table in (SCHEDULES, PREDICTORS, STREAM_TRAITS, KERNELS, STREAMS)]
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for table, before in known:
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("lockstep_more", "broken"):
            del sys.modules[name]


@pytest.fixture
def mine(packages: Path) -> str:
    """The page's preset, with the page's package installed."""
    install(packages, blocks())
    return str(packages / "mine.yaml")


def test_a_schedule_a_predictor_and_a_stream_run_from_a_preset(
    engine: Engine, small: Make, mine: str, tmp_path: Path
) -> None:
    request = small(spectrum=mine, steps=STEPS)
    result, expected = generate(engine, request)
    assert result.computed == {"cond": COMPUTED, "uncond": COMPUTED}
    assert result.features_kept == 1  # the last value is all that its predictor remembers
    assert result.errors.keys() == {1, 4}
    guided = tmp_path / "guided.yaml"
    guided.write_text((tmp_path / "mine.yaml").read_text().replace("half", "guided"))
    usual, similar = generate(engine, small(spectrum=str(guided), steps=STEPS))
    assert usual.forecaster_bytes == 2 * result.forecaster_bytes > 0
    assert 0 < np.mean((similar.astype(float) - expected) ** 2) < 1.0  # PSNR above 48 dB

    kept = tmp_path / "checkpoints"
    with pytest.raises(InterruptedHereError):
        generate(engine, request, Checkpoints(kept, every=1), until=2)
    resumed, frames = generate(engine, request, Checkpoints(kept, every=1, resume=True))
    assert resumed.resumed_at > 0
    assert np.array_equal(frames, expected)


def test_a_video_is_a_function_of_the_code_that_was_added(mine: str, packages: Path) -> None:
    before = load_preset(mine).identity
    assert before["sources"].keys() == {"stream", "schedule", "predictor"}
    source = packages / "lockstep_more" / "every.py"
    source.write_text(source.read_text() + "\n# edited\n")
    now = load_preset(mine).identity
    assert {name for name in before if before[name] != now[name]} == {"sources"}
    assert {name for name, of in before["sources"].items() if of != now["sources"][name]} == {"schedule"}
    assert "sources" not in load_preset("paper").identity


def test_a_kernel_runs_by_its_name(engine: Engine, small: Make, config: Config, mine: str) -> None:
    other = Engine(config.model_copy(update={"attention": "exact"}))
    request = small(spectrum="off", steps=2)
    result, frames = generate(other, request)
    assert result.plan.attention == "exact"
    assert np.mean((frames.astype(float) - generate(engine, request)[1]) ** 2) < 0.5
    assert resolve("exact", CPU, torch.bfloat16, ring=2) == "exact"
    with pytest.raises(BadRequestError, match="'exact' given; it runs on cpu only"):
        resolve("exact", torch.device("cuda"), torch.bfloat16, ring=1)


def test_a_command_is_one_of_locksteps(mine: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["presets"]) == 0
    assert "paper" in capfd.readouterr().out.split()
    assert cli.run(["--help"]) == 0
    assert re.search(r"^  presets +List the shipped presets\.$", capfd.readouterr().out, re.MULTILINE)
    assert cli.run(["presetz"]) == 2
    assert "No such command" in capfd.readouterr().err


def test_a_track_forecasts_in_any_program() -> None:
    names: dict[str, object] = {}
    exec(compile(blocks()["any_sampler.py"], "any_sampler.py", "exec"), names)
    assert names["calls"] == 2 * paper_schedule(20).nfe
    assert isinstance(names["x"], torch.Tensor) and names["x"].isfinite().all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule: {kind: every}", "kind: 'every' given; it must be one of full, paper, explicit, error"),
        (
            "schedule: {kind: full}\npredictor: {kind: last}",
            "'last' given; it must be one of chebyshev, linear",
        ),
        ("schedule: {kind: full}\nstream: half", "'half' given; it must be one of feature, velocity, guided"),
        ("schedule: {}", "kind: missing; it must be one of full"),
        ("schedule: {kind: [full]}", "kind: a list given; it must be one of full"),
    ],
)
def test_what_nobody_has_added_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(BadRequestError, match=re.escape(said)):
        load_preset(str(path))


def test_settings_of_what_was_added_are_checked(mine: str, packages: Path) -> None:
    path = packages / "wrong.yaml"
    for text, said in (
        ("schedule: {kind: every, apart: 0}", r"line 1: schedule\.every\.apart: 0 given; should be greater"),
        ("schedule: {kind: every, apat: 2}", r"schedule\.every\.apat: unknown field; did you mean apart\?"),
        (
            "schedule: {kind: evry}",
            "'evry' given; it must be one of full, paper, explicit, error, every, planned",
        ),
        (
            "stream: half\nschedule: {kind: every}\nuncond: {kind: full}",
            "uncond: a half stream covers both branches",
        ),
    ):
        path.write_text(text)
        with pytest.raises(BadRequestError, match=said):
            load_preset(str(path))


def test_a_package_that_is_broken_is_named(
    packages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = (
        '[project]\nname = "sad"\nversion = "1"\n'
        '[project.entry-points."lockstep.parts"]\nx = "broken.part"\n'
        '[project.entry-points."lockstep.commands"]\ncry = "broken.part:cry"\n'
    )
    install(packages, {"pyproject.toml": project, "broken/part.py": "import no_such_thing\n"})
    path = tmp_path / "some.yaml"
    path.write_text("schedule: {kind: every}")
    with pytest.raises(
        BadRequestError, match=r"'broken\.part' of the package 'sad' cannot be imported \(Modul"
    ):
        load_preset(str(path))
    assert cli.run(["cry"]) == 2
    assert "of the package 'sad' cannot be imported" in capfd.readouterr().err
    assert cli.run(["--help"]) == 0
    listed = " ".join(capfd.readouterr().out.split())
    assert "cry lockstep.commands: 'broken.part:cry' of the package 'sad' cannot be imported" in listed
    assert load_preset("paper").forecasts  # it is in nobody's way who does not ask for it


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a schedule 'paper' already"):
        add_schedule(type("Mine", (SCHEDULES["paper"],), {"__module__": __name__}))
    with pytest.raises(ValueError, match="there is a stream 'guided' already"):
        add_stream("guided")(type("Mine", (), {}))
    for name in ("math", "auto", "xfuser:MINE"):
        with pytest.raises(ValueError, match=name):
            add_kernel(name)(lambda query, key, value: (query, None))
    with pytest.raises(ValueError, match=r'Mine\.kind must be Literal\["NAME"\]'):
        add_schedule(type("Mine", (SCHEDULES["paper"].__base__,), {"__module__": __name__}))
    again: Registry[int] = Registry("number", {"one": 1})
    again.add("one", 1)  # a module that is imported twice adds nothing new
