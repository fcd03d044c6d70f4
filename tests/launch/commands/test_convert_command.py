"""`lockstep convert` on the command line: what it prints, and how it ends."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import yaml

from launch import cli
from runtime.files.atomic import PlainFile
from runtime.models.folder import find_model
from runtime.models.layouts.target import MANIFEST
from runtime.request.config import Config, load_config
from tests.originals import mapping, write_original, write_reference, write_single_files

pytestmark = pytest.mark.usefixtures("cached")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("reference") / "t2v", "t2v")


def test_it_prints_the_folder(
    config: Config, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original, made = write_original(reference, tmp_path / "original"), tmp_path / "made"
    assert cli.run(["convert", str(original), str(made)]) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{made}\n" and "verifying" in stderr
    found = find_model(config.model_copy(update={"model": str(made), "architecture": None}))
    assert found.path == made
    before = (made / MANIFEST).stat().st_ino
    assert cli.run(["convert", str(original), str(made)]) == 0
    assert capfd.readouterr() == (f"{made}\n", f"{made} exists already, converted from the same files\n")
    assert (made / MANIFEST).stat().st_ino == before
    assert cli.run(["convert", str(original), str(made), "--dtype", "float16"]) == 2
    assert "it is not empty" in capfd.readouterr().err


def test_a_config_names_single_files(
    reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_single_files(reference, tmp_path / "comfy")
    named = {name: str(Path(file).relative_to(folder)) for name, file in mapping(folder).items()}
    text = {"model": named, "defaults": {"width": 64, "height": 64, "frames": 5}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(text))
    config = load_config(str(folder / "mine.yaml"))
    assert config.model_name == str(folder / named["transformer"])
    assert cli.run(["convert", str(folder / "mine.yaml"), str(tmp_path / "made"), "--dtype", "bfloat16"]) == 0
    assert capfd.readouterr().out == f"{tmp_path / 'made'}\n"
    text["model"] = {"transformer": "a.safetensors", "vea": "b.safetensors"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(text))
    assert cli.run(["convert", str(folder / "mine.yaml"), str(tmp_path / "made")]) == 2
    said = capfd.readouterr().err
    assert "line 7: model.vea: unknown field; did you mean vae?" in said
    assert "model.vae: missing" in said


def test_a_disk_that_fails_exits_3(
    reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    write = PlainFile.write

    def fail(self: PlainFile, content: object) -> int:
        if "vae" in str(self.name):
            raise OSError(errno.EIO, "Input/output error", self.name)
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(PlainFile, "write", fail)
        assert cli.run(["convert", str(reference), str(made)]) == 3
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and "Input/output error" in stderr and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "lockstep: the same command continues from the files that are finished"
    assert not made.exists()
    assert cli.run(["convert", str(reference), str(made)]) == 0
    assert (made / MANIFEST).is_file()
