"""Modules of Lockstep's own in other processes, whatever lies in the folder of the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[3])
SHOWN = "import subprocess; from runtime.files.interpreter import interpreter; "
STARTED = SHOWN + "raise SystemExit(subprocess.run([*interpreter(), '-m', 'this']).returncode)"


def started(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a process in a folder, which starts another one of the module `this`."""
    return subprocess.run(
        [sys.executable, *options, "-c", STARTED], cwd=folder, env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_module_of_the_users_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "this.py").write_text("raise SystemExit('foreign')")
    ended = started(tmp_path, "-P")  # as the installed command is
    assert ended.returncode == 0 and "foreign" not in ended.stderr and "Zen" in ended.stdout


def test_it_is_where_this_process_has_its_modules_from_there(tmp_path: Path) -> None:
    """A checkout that is not installed, as in a Ray job."""
    (tmp_path / "this.py").write_text("print('from here')")
    assert started(tmp_path).stdout == "from here\n"
