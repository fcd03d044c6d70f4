"""Models in other layouts work with every command that names a model: queued, rehearsed, priced and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from launch import cli
from runtime.jobs.job import Job, inputs_of
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees
from runtime.request.config import Config, ModelFiles, load_config
from runtime.request.memory import Memory
from tests.conditioned import denoised_on
from tests.jobs import make_job
from tests.originals import mapping, write_original, write_reference, write_single_files
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("cached")
TINY = ["--size", "64x64", "--frames", "5", "--steps", "2", "--max-sequence-length", "32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in three layouts, each with a config."""
    root = tmp_path_factory.mktemp("layouts")
    reference = write_reference(root / "reference", "t2v")
    made = {
        "reference": reference,
        "original": write_original(reference, root / "original"),
        "files": write_single_files(reference, root / "files"),
    }
    for name, folder in made.items():
        model = mapping(folder) if name == "files" else str(folder)
        text = {"model": model, "dtype": {"transformer": "float32"}, "defaults": DEFAULTS}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(text))
    return {name: root / f"{name}.yaml" for name in made}


DEFAULTS = {"width": 64, "height": 64, "frames": 5, "steps": 2, "spectrum": "off", "max_sequence_length": 32}


@pytest.mark.parametrize("name", ["original", "files"])
def test_the_video_is_that_of_diffusers_layout(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    digests = []
    for config in (folders["reference"], folders[name]):
        out = tmp_path / f"{config.stem}.mp4"
        assert cli.run(["generate", "a red circle", "--config", str(config), "--out", str(out)]) == 0
        digests.append(json.loads(out.with_suffix(".json").read_text())["frames_sha256"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["original", "files"])
def test_it_is_rehearsed_as_in_diffusers_layout(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    seen = []
    for config in (folders["reference"], folders[name]):
        assert cli.run(["rehearse", "--config", str(config), *TINY, "--json"]) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["model"].pop("name") == load_config(str(config)).model_name
        seen.append(told)
    assert seen[0] == seen[1]


def test_a_film_is_priced(
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shot = {"id": "one", "prompt": "a red circle", "config": str(folders["files"])}
    film = {"title": "One", "shots": [shot]}
    (tmp_path / "film.yaml").write_text(yaml.safe_dump(film))
    words = [str(tmp_path / "film.yaml"), "--out", str(tmp_path / "film"), "--dry-run", "--gpu", "h100"]
    assert cli.run(["storyboard", *words]) == 0
    assert "1 shots, 5 frames" in " ".join(capfd.readouterr().out.split()).replace("1 shot,", "1 shots,")


@pytest.mark.parametrize("name", ["original", "files"])
def test_what_it_is_read_from_is_shown(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.run(["doctor", "--model", str(folders[name])]) == 0
    said = capfd.readouterr().out
    parts = {"original": ("Wan2.1_VAE.pth", "models_t5_umt5"), "files": ("wan_2.1_vae", "umt5_xxl_fp16")}
    assert "a WanPipeline, sha256:" in said
    assert all(part in said for part in ("transformer", "float32", *parts[name]))


def test_a_job_travels_with_the_users_own_paths(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(folders["files"]))
    assert isinstance(config.model, ModelFiles)
    monkeypatch.chdir(Path(config.model.transformer).parent)
    relative = config.model.model_copy(update={"transformer": Path(config.model.transformer).name})
    job = make_job(tmp_path / "a.mp4", config=str(folders["original"]))
    moved = Job.from_json(job.absolute().to_json())
    assert moved.config.model == str(folders["original"].with_suffix(""))
    assert moved.planned().recipe.parts["model"].startswith("sha256:")
    assert inputs_of(config.model_copy(update={"model": relative}), job.request, job.preset).keys() >= {
        Path(file) for file in relative.named.values()
    }


def latents(ranks: Ranks, config: Config) -> torch.Tensor:
    return denoised_on(ranks, config, config.request("a red circle", guidance=3.0), Degrees())


@pytest.mark.parametrize("name", ["original", "files"])
def test_ranks_share_it_as_in_diffusers_layout(folders: dict[str, Path], name: str) -> None:
    made = []
    for config in (folders["reference"], folders[name]):
        sharded = load_config(str(config)).model_copy(update={"memory": Memory(transformer="shard")})
        made.append(run_ranks(2, latents, sharded))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*made, strict=True))
