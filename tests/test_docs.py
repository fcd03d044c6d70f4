"""What the documentation says to run, to read and to write is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from pydantic import BaseModel

from launch.cli import cli
from launch.commands.ray_job import job
from launch.commands.torchrun import rank
from runtime.forecasting.parts import (
    PREDICTORS,
    SCHEDULES,
    CalibratedPart,
    FittedSchedulePart,
    Part,
    PlannedSchedulePart,
    UniversalPart,
    UniversalSchedulePart,
)
from runtime.forecasting.presets import Preset, load_preset
from runtime.models.configs import open_config
from runtime.request.config import Config, load_config
from runtime.sampling.coordinator import RECORD_BYTES
from spectrum import StepKind
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
        for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.search(r"lockstep |-m launch", line) else []
            for at in range(len(words)):
                for length in (2, 1):
                    entry = " ".join(words[at : at + length])
                    if entry in ENTRIES:
                        given = words[at + length :]
                        yield entry, given[: given.index(">")] if ">" in given else given
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


def test_the_command_is_written_in_one_form() -> None:
    """As `lockstep`; only a job of Ray's runs the module, which may be nothing but its working directory."""
    other = re.compile(r"bin/lockstep [a-z-]|(?<!source )\.venv/bin/|python -m launch [a-z-]")
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if other.search(line) and "ray job submit" not in line]


def test_scripts_and_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets, page
        assert all((ROOT / name).exists() for name in re.findall(r"(?<!/)\bscripts/\w+\.py", text)), page


def test_nothing_tells_to_install_a_package_of_this_name_from_a_registry() -> None:
    name = re.search(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert name is not None
    sources = [
        path for folder in ("launch", "runtime", "spectrum") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    for path in [*PAGES, *sources]:
        assert not re.search(rf"pip install '?{name[1]}", path.read_text(encoding="utf-8")), path


def parts_in(annotation: Any) -> list[type[BaseModel]]:
    """Models that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inner in get_args(annotation) for part in parts_in(inner)]


def fields_of(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of a model and of its parts by its path, with its default as a page writes it."""
    for name, field in model.model_fields.items():
        chosen = [part for part in parts_in(field.annotation) if issubclass(part, Part)]  # by its kind
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            written = "required"
        elif isinstance(default, BaseModel):
            content = default.model_dump(exclude_unset=True) or "as below"
            written = f"`{{kind: {content['kind']}}}`" if isinstance(content, dict) else content
        else:
            written = f"`{json.dumps([*default] if isinstance(default, tuple) else default)}`"
            written = written if default == "" else written.replace('"', "")
        yield path + name, written
        for part in [] if chosen else parts_in(field.annotation):
            yield from fields_of(part, f"{path}{name}.")


def rows(page: str) -> list[list[str]]:
    """First two cells of every row about a field."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        [cell.strip() for cell in line.split("|")[1:3]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def test_every_field_of_a_config_is_on_its_page_with_its_default() -> None:
    expected = dict(fields_of(Config))
    expected |= dict.fromkeys(
        ["defaults", *(f"defaults.{name}" for name in ("width", "height", "frames"))], "usual for the model"
    )
    expected["bounds"] = "Wan's"
    assert rows("configs.md") == [[f"`{name}`", default] for name, default in expected.items()]


def test_every_field_of_a_preset_is_on_its_page_with_its_default() -> None:
    parts: list[type[Part]] = [*SCHEDULES.values(), PlannedSchedulePart, FittedSchedulePart]
    parts += [UniversalSchedulePart, *PREDICTORS.values(), CalibratedPart, UniversalPart]
    expected = [[f"`{name}`", default] for name, default in fields_of(Preset)]
    for part in parts:
        [kind] = get_args(part.model_fields["kind"].annotation)
        fields = [(name, default) for name, default in fields_of(part, f"{kind}.") if name != f"{kind}.kind"]
        expected += [[f"`{kind}`", ""], *([f"`{name}`", default] for name, default in fields)]
    assert rows("presets.md") == expected


def test_the_examples_of_configs_and_presets_are_valid(tmp_path: Path) -> None:
    for page in ("configs.md", "presets.md"):
        for block in blocks(ROOT / "docs" / page, "yaml"):
            (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    mine = load_config(str(tmp_path / "mine.yaml"))
    assert mine.defaults.spectrum == str(tmp_path / "fast.yaml")
    assert open_config(str(tmp_path / "own.yaml")).defaults.steps == 30
    preset = load_preset(str(tmp_path / "fast.yaml"))
    assert preset.stream == "guided"
    said = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    [nfe] = re.findall(r"With 50 steps, (\d+) are computed", " ".join(said.split()))
    assert preset.expected_kinds(50).count(StepKind.COMPUTE) == int(nfe)


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
