"""The house's rules: imports run one way, rooms see only the rooms below, each library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.places import ROOT

FORBIDDEN = {
    "spectrum": ("runtime", "launch", "ray", "torch.distributed", "diffusers", "transformers"),
    "runtime": ("launch", "ray"),
    "launch": ("torch.distributed",),
}
# Package → the folder of it that may import a library that is forbidden to the rest.
EXEMPT = {"spectrum": ("spectrum/diffusers", "diffusers")}
# Library → the only folders that may import it.
HOMES = {
    "torch.distributed": ("runtime/parallel",),
    "ray": ("launch/cluster", "launch/serve", "launch/http/deployment.py"),
}
GROUND = "errors"
# Room of runtime/ → the rooms that it may import beside itself and the ground; a file of the root is a room.
RUNTIME: Mapping[str, str] = {
    "errors": "",
    "files": "",
    "versions": "",
    "request": "files",
    "parallel": "files",
    "media": "files request",
    "models": "files parallel request",
    "forecasting": "files request",
    "recipe": "files forecasting parallel request versions",
    "checkpoint": "files parallel recipe",
    "sampling": "checkpoint files forecasting media models parallel recipe request",
    "profile": "forecasting models recipe request",
    "engine": "checkpoint forecasting media models parallel profile recipe request sampling versions",
    "reports": "files forecasting media sampling versions",
    "jobs": (
        "checkpoint engine files forecasting media models parallel profile recipe rehearsal reports request "
        "sampling"
    ),
    "measure": "checkpoint engine files forecasting jobs media reports request sampling versions",
    "film": "files forecasting media models profile recipe reports request versions",
    "rehearsal": "engine files models parallel profile request sampling",
    "notebook": "engine files forecasting jobs measure media reports request sampling",
}
# Room of launch/ → the rooms of launch/ that it may import.
LAUNCH: Mapping[str, str] = {
    "shell": "",
    "cluster": "shell",
    "serve": "cluster shell",
    "film": "cluster serve shell",
    "commands": "cluster serve shell",
    "http": "commands serve shell",
    "torchrun": "commands shell",
    "ray_job": "commands shell",
    "cli": "cluster commands film http shell",
    "__main__": "cli shell",
}
ROOMS = {"runtime": RUNTIME, "launch": LAUNCH}
SAMPLING_SEES = ("runtime.models.base", "runtime.models.course", "runtime.models.sampler")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> Iterator[tuple[Path, str]]:
    """Every module of a package with its room."""
    for path in sorted((ROOT / package).rglob("*.py")):
        inside = path.relative_to(ROOT / package)
        if inside != Path("__init__.py"):
            yield path, inside.parts[0].removesuffix(".py")


def below(path: Path, name: str) -> bool:
    """Whether a module's path is in one of a library's homes."""
    return any(path.is_relative_to(ROOT / home) for home in HOMES[name])


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        for banned in FORBIDDEN[package]
        if (name == banned or name.startswith(banned + ".")) and not exempt(package, path, banned)
    ]
    assert not wrong


def exempt(package: str, path: Path, library: str) -> bool:
    folder, allowed = EXEMPT.get(package, ("", ""))
    return library == allowed and path.is_relative_to(ROOT / folder)


def test_mathematics_does_not_see_its_integrations() -> None:
    """`import spectrum` needs torch and numpy alone."""
    mathematics = [path for path, room in modules("spectrum") if room != "diffusers"]
    names = [name for path in mathematics for name in imported(path)]
    assert not [name for name in names if name.startswith("spectrum.diffusers")]


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_see_only_what_the_table_says(package: str) -> None:
    table = ROOMS[package]
    wrong, used = [], set()
    for path, room in modules(package):
        assert room in table, f"{path.relative_to(ROOT)} is in no room of the table"
        for name in imported(path):
            parts = name.split(".")
            if parts[0] != package or len(parts) < 2 or parts[1] in (room, GROUND):
                continue
            used.add((room, parts[1]))
            if parts[1] not in table[room].split():
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong
    assert used == {(room, other) for room, others in table.items() for other in others.split()}


@pytest.mark.parametrize("package", ROOMS)
def test_the_table_has_no_circle(package: str) -> None:
    TopologicalSorter({room: others.split() for room, others in ROOMS[package].items()}).prepare()


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if (name == library or name.startswith(library + ".")) and not below(path, library)
    ]
    assert not wrong


def test_sampling_knows_no_model() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "runtime" / "sampling").rglob("*.py")
        for name in imported(path)
        if name.startswith("runtime.models.") and not name.startswith(SAMPLING_SEES)
    ]
    assert not wrong


def test_each_family_is_reached_through_the_registry_alone() -> None:
    """What is particular to a family stays in its folder: nobody imports from there, and few ask for one.

    A rehearsal takes Wan's models apart, and knows no others.
    """
    models = ROOT / "runtime" / "models"
    folders = [path.parent for path in models.glob("*/family.py")]
    assert folders
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        for folder in folders
        if f"{name}.".startswith(f"runtime.models.{folder.name}.")
        and not path.is_relative_to(folder)
        and not path.is_relative_to(ROOT / "runtime" / "rehearsal")
    ]
    wrong += [
        f"{path.relative_to(ROOT)} asks the registry"
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name == "runtime.models.registry" and not path.is_relative_to(models)
    ]
    assert not wrong


def test_no_file_is_two_nouns() -> None:
    long = [
        path
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        if path.read_text().count("\n") > 400
    ]
    assert not long


def test_test_files_have_names_of_their_own() -> None:
    """Without packages pytest imports them by their bare names, and refuses a second of one name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
