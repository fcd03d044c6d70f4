"""The Containerfile copies all that the package is built of, and installs where its commands are found."""

from __future__ import annotations

import re
import tomllib

from tests.places import ROOT

TEXT = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def arguments(instruction: str) -> list[list[str]]:
    """Words of each line of an instruction, without its options."""
    lines = [line.split()[1:] for line in LINES if line.startswith(f"{instruction} ")]
    return [[word for word in words if not word.startswith("--")] for words in lines]


def test_it_copies_all_that_the_package_is_built_of() -> None:
    copied = set()
    for *sources, target in arguments("COPY"):
        assert target == "./" or [target] == sources, "a folder keeps its name"
        copied |= {*sources}
    assert all((ROOT / name).exists() for name in copied)
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    built = package["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*built["packages"], *built["force-include"], *package["project"]["license-files"]}
    assert copied == needed | {package["project"]["readme"], "pyproject.toml", "constraints.txt"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert not copied & {*ignored}


def test_its_command_is_on_the_path() -> None:
    [install] = [line for line in LINES if "pip install" in line]
    [environment] = re.findall(r"python3 -m venv (\S+)", install)
    [variables] = arguments("ENV")
    assert f"PATH={environment}/bin:$PATH" in variables
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [asked] = re.findall(r"'\.\[([\w,]+)\]'", install)
    assert {*asked.split(",")} <= extras["optional-dependencies"].keys()
    [[entry]] = [[word.strip('[]"') for word in words] for words in arguments("ENTRYPOINT")]
    assert entry in extras["scripts"]
