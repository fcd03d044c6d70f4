"""Models that are offered are read once, and again when they have changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from launch.http import profiles
from launch.http.auth import Keys
from launch.http.catalog import Catalog
from launch.http.service import Service
from launch.serve.queue import Queue
from runtime.models import folder as folders
from runtime.models.configs import open_config
from runtime.request.config import EMBEDDED_MODELS, Config, load_config, shipped
from tests.serving import Api


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A config of its own, for a copy of wan-tiny."""
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", tmp_path / "model")
    told = yaml.safe_load(shipped("wan-tiny.yaml").read_text())
    path = tmp_path / "copied.yaml"
    path.write_text(yaml.safe_dump({**told, "model": str(tmp_path / "model")}))
    return path


@pytest.fixture
def api(tmp_path: Path, copied: Path) -> Api:
    return Api(Service.on(Queue(tmp_path / "queue"), Catalog.of([str(copied)]), Keys(None)))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of models, each time that one is hashed."""
    found: list[Path] = []
    real = folders.folder_digest

    def counted(path: Path) -> str:
        found.append(path)
        return real(path)

    monkeypatch.setattr(folders, "folder_digest", counted)
    return found


def test_a_model_is_hashed_once_and_again_when_a_file_has_changed(
    api: Api, tmp_path: Path, hashed: list[Path]
) -> None:
    for number in range(5):
        api.create(seed=number)
        api.client.get("/v1/models")
    assert 1 <= len(hashed) <= 2  # the profile's, and that of the list of models
    before = len(hashed)
    settings = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text() + "\n")
    api.create()
    assert len(hashed) > before
    models = [entry.job.recipe.parts["model"] for entry in api.queue.entries() if entry.job.recipe]
    assert len(models) == 6 and len({*models[:5]}) == 1 and models[5] != models[0]


def test_a_job_is_planned_with_the_recipe_that_its_ranks_will_find(api: Api) -> None:
    api.create()
    [entry] = api.queue.entries()
    profile = profiles.profile_of(entry.job.config)
    assert profile is not None and entry.job.recipe is not None
    assert entry.job.recipe == profile.recipe(entry.job.request, entry.job.preset, None)
    entry.job.planned().recipe.check_same(entry.job.recipe)  # type: ignore[union-attr]


def test_a_model_was_created_when_its_newest_file_was_written(api: Api, tmp_path: Path) -> None:
    newest = max(path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*"))
    assert api.client.get("/v1/models/copied").json()["created"] == newest // 10**9


def test_a_model_that_is_not_here_has_the_time_of_its_config() -> None:
    name = "wan2.1-t2v-14b-480p"
    config: Config = load_config(name)
    assert profiles.profile_of(config) is None and profiles.revision_of(config) is None
    assert profiles.written_at(config, name) == int(shipped(f"{name}.yaml").stat().st_mtime)


def test_models_are_offered_without_configs(tmp_path: Path) -> None:
    """By the name of the folder, with what is usual for its kind, in jobs, too."""
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", tmp_path / "my-own")
    catalog = Catalog.of(models=[str(tmp_path / "my-own"), "wan2.2-tiny"])
    api = Api(Service.on(Queue(tmp_path / "queue"), catalog, Keys(None)))
    own, two = api.client.get("/v1/models").json()["data"]
    assert (own["id"], two["id"], two["experts"]) == ("my-own", "wan2.2-tiny", 2)
    usual = open_config(model=str(tmp_path / "my-own"))
    assert own["defaults"]["size"] == f"{usual.defaults.width}x{usual.defaults.height}"
    for model in (own, two):  # what is offered is accepted
        offered = [one["id"] for one in model["presets"]]
        assert {"off", "paper"} <= {*offered} and ("planned-14" in offered) == (model is own)
        for preset in offered:
            asked = {"prompt": "x", "model": model["id"], "spectrum": preset}
            assert api.client.post("/v1/videos/estimate", json=asked).status_code == 200, asked
    assert api.create()["model"] == "my-own" and api.create(model="wan2.2-tiny")["model"] == "wan2.2-tiny"
    assert [entry.job.config.model for entry in api.queue.entries()] == [
        str(tmp_path / "my-own"),
        "wan2.2-tiny",
    ]
    assert [*Catalog.of().models] == ["wan-tiny"] and [
        *Catalog.of(["wan-tiny"], models=["wan2.2-tiny"]).models
    ] == [
        "wan-tiny",
        "wan2.2-tiny",
    ]


def test_a_repository_is_offered_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its settings are needed here, of the revision that was asked for."""
    asked = []

    def settings(model: object, revision: str | None) -> Path:
        asked.append((model, revision))
        return EMBEDDED_MODELS / "wan-tiny"

    for module in ("runtime.models.configs.settings_of", "launch.http.profiles.settings_folder"):
        monkeypatch.setattr(module, settings)
    catalog = Catalog.of(models=["someone/wan-of-mine"], revision="v1")
    api = Api(Service.on(Queue(tmp_path / "queue"), catalog, Keys(None)))
    assert api.client.get("/v1/models/wan-of-mine").json()["created"] > 0
    assert {*asked} == {("someone/wan-of-mine", "v1")}
