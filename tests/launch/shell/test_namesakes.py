"""Other packages called `runtime`, `launch` or `spectrum`: where they do harm, what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.shell.exits import explain
from launch.shell.namesakes import in_the_way
from tests.places import ROOT


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder whose modules come first, as those of a script or of `-m` do."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["runtime.py", "runtime/__init__.py"])
def test_the_command_names_a_namesake(name: str, tmp_path: Path) -> None:
    namesake = tmp_path / name
    namesake.parent.mkdir(exist_ok=True)
    namesake.write_text("answer = 42\n")
    done = ran(tmp_path, "-m", "launch", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lockstep: the package 'runtime' is {str(namesake)!r}, which is not Lock")
    assert "rename or uninstall it" in done.stderr


def test_folders_without_an_init_do_no_harm(tmp_path: Path) -> None:
    names = ("launch", "runtime", "spectrum")
    for name in names:
        (tmp_path / name).mkdir()
    look = "import launch, runtime, spectrum; print(launch.__file__, runtime.__file__, spectrum.__file__)"
    done = ran(tmp_path, "-c", look)
    assert done.stdout.split() == [
        str(ROOT / name / "__init__.py") for name in ("launch", "runtime", "spectrum")
    ]


def test_a_job_that_meets_a_namesake_later_names_it(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        from spectrum import no_such_name  # noqa: F401
    except ImportError as error:
        assert explain(error) == 3
    said = capfd.readouterr().err
    assert "lockstep: the package 'spectrum' is" in said and "or is incomplete: rename" in said
    assert in_the_way(ImportError("no numpy", name="numpy")) == in_the_way(ValueError("spectrum")) == ""


def test_one_that_cannot_be_imported_itself_is_named(tmp_path: Path) -> None:
    """PyPI's `spectrum` imports SciPy, and overwrites the file of Lockstep's package."""
    (tmp_path / "spectrum").mkdir()
    namesake = tmp_path / "spectrum" / "__init__.py"
    namesake.write_text("import no_such_scipy\n")
    code = "from launch import cli; raise SystemExit(cli.run(['plan', 'wan-tiny', '--nfe', '8']))"
    done = ran(tmp_path, "-c", code)
    assert done.returncode == 3
    assert f"lockstep: the package 'spectrum' is {str(namesake)!r}, which is not Lockstep's" in done.stderr


@pytest.mark.slow
def test_a_notebook_is_told_of_one(tmp_path: Path) -> None:
    (tmp_path / "spectrum.py").write_text("answer = 42\n")
    (tmp_path / "mine.py").write_text("from runtime import load\n")
    done = ran(tmp_path, "mine.py")
    assert done.returncode == 1
    assert f"'spectrum' ({tmp_path / 'spectrum.py'}). This 'spectrum' is not Lockstep's" in done.stderr
