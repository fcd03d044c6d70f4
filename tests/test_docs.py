"""What the documentation says to run, to read and to write is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from launch.cli import cli
from launch.commands.ray_job import job
from launch.commands.torchrun import rank
from runtime.forecasting import presets
from runtime.forecasting.parts import PREDICTORS, SCHEDULES
from runtime.forecasting.presets import load_preset
from runtime.request import config as configs
from runtime.request.config import Config, load_config
from runtime.sampling.coordinator import RECORD_BYTES
from tests.places import ROOT
from tests.test_architecture import GROUND, ROOMS

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("runtime/models/*/README.md")])
ENTRIES = {
    "lockstep": cli,
    "-m launch": cli,
    "-m launch.ray_job": job,
    "-m launch.torchrun": rank,
}


def blocks(page: Path, kind: str = "") -> list[str]:
    """Contents of the page's fenced blocks of a kind."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for found, content in fences if found == kind]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of Lockstep's in the documentation, with what comes after its entry."""
    for page in PAGES:
        for line in "".join(blocks(page)).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.search(r"lockstep |-m launch", line) else []
            for at in range(len(words)):
                for length in (2, 1):
                    entry = " ".join(words[at : at + length])
                    if entry in ENTRIES:
                        yield entry, words[at + length :]
                        break


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`((?:spectrum|runtime|launch|scripts|tests|configs)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_commands_take_the_options_that_are_shown() -> None:
    shown = list(command_lines())
    assert {entry for entry, _ in shown} == set(ENTRIES)
    for entry, words in shown:
        command: click.Command = ENTRIES[entry]
        while isinstance(command, click.Group) and words != ["--help"]:
            command = command.commands[words.pop(0)]
        if words != ["--help"]:
            command.make_context(entry, words)


def test_scripts_and_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets, page
        assert all((ROOT / name).exists() for name in re.findall(r"(?<!/)\bscripts/\w+\.py", text)), page


def test_the_python_example_of_the_readme_runs_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    [example] = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capfd.readouterr().out == "14 of 50 steps computed\n"
    assert (tmp_path / "circle.mp4").read_bytes()[4:8] == b"ftyp"


def test_nothing_tells_to_install_a_package_of_this_name_from_a_registry() -> None:
    name = re.search(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert name is not None
    sources = [
        path for folder in ("launch", "runtime", "spectrum") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    for path in [*PAGES, *sources]:
        assert not re.search(rf"pip install '?{name[1]}", path.read_text(encoding="utf-8")), path


def parts(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and those that its fields are made of."""
    yield model
    for field in model.model_fields.values():
        for found in re.findall(r"runtime\.[\w.]+\.(\w+)", str(field.annotation)):
            part = getattr(presets, found, None) or getattr(configs, found)
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from parts(part)


@pytest.mark.parametrize("model", [Config, presets.Preset])
def test_every_field_is_explained(model: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    words = {word for quoted in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"[\w+]+", quoted)}
    chosen = [*SCHEDULES.values(), *PREDICTORS.values()] if model is presets.Preset else []
    fields = {name for part in [*parts(model), *chosen] for name in part.model_fields}
    explained_elsewhere = {"experts", "history", "size", "stride"}  # of `memory` and `tiles`: ranks.md
    assert fields - words - explained_elsewhere == set()


def test_the_examples_of_configs_are_valid(tmp_path: Path) -> None:
    for block in blocks(ROOT / "docs" / "configs.md", "yaml"):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    assert load_config(str(tmp_path / "mine.yaml")).defaults.spectrum == str(tmp_path / "fast.yaml")
    assert load_preset(str(tmp_path / "fast.yaml")).stream == "guided"


@pytest.mark.parametrize("page", ["scaling.md", "report.md"])
def test_pages_know_how_large_a_digest_message_is(page: str) -> None:
    assert f"{RECORD_BYTES} bytes" in (ROOT / "docs" / page).read_text(encoding="utf-8")


def floors(package: str) -> list[set[str]]:
    """Rooms of a package on each floor of the picture in docs/design.md, from the top."""
    picture = blocks(ROOT / "docs" / "design.md")[0]
    part = re.split(r"^(\w+)/.*\n", picture, flags=re.MULTILINE)
    drawn = dict(zip(part[1::2], part[2::2], strict=True))[package]
    return [set(re.findall(r"^  (\w+)", floor, re.MULTILINE)) for floor in drawn.split("↓") if floor.strip()]


@pytest.mark.parametrize("package", ROOMS)
def test_the_picture_of_the_rooms_is_the_table_of_imports(package: str) -> None:
    drawn = floors(package)
    assert sorted(room for floor in drawn for room in floor) == sorted(ROOMS[package])
    height = {room: -number for number, floor in enumerate(drawn) for room in floor}
    upwards = [
        f"{room} imports {other}"
        for room, others in ROOMS[package].items()
        for other in others.split()
        if other != GROUND and height[other] >= height[room]
    ]
    assert not upwards
