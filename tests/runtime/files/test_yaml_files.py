"""YAML of users: taken as it is meant, or refused with its line; never a traceback, never for long."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from runtime.errors import BadRequestError
from runtime.files.text import beside
from runtime.files.yaml import YamlFile
from runtime.film.storyboard import load_storyboard
from runtime.forecasting.presets import load_preset
from runtime.request.config import load_config

CONFIG = """\
model: wan-tiny
fps: 8
defaults:
  width: 96
  height: 96
  frames: 17
"""
FILM = "title: T\nwidth: 64\nheight: 48\nshots:\n  - {id: a, prompt: x, frames: 5}\n"


class Inner(BaseModel, extra="forbid"):
    name: str
    size: Annotated[float, Field(le=10, allow_inf_nan=False)] = 1.0


class Outer(BaseModel, extra="forbid"):
    title: str = ""
    other: str | None = "nothing"
    count: Annotated[int, Field(le=10**6)] = 0
    on: bool = False
    inner: Inner | None = None
    many: list[Inner] = []
    words: list[str] = []


def parse(folder: Path, text: str | bytes) -> Outer:
    path = folder / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return YamlFile.read(path, "config").parse(Outer)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("title: off", "title", "off"),
        ("title: no", "title", "no"),
        ("title: 2001", "title", "2001"),
        ("title: 1.50", "title", "1.50"),
        ("title: 007", "title", "007"),
        ("title: 1e3", "title", "1e3"),
        ("title: true", "title", "true"),
        ("title: 12:30", "title", "12:30"),
        ("title: 2024-05-01", "title", "2024-05-01"),
        ("title: 2024-02-30", "title", "2024-02-30"),
        ("title: 0b_", "title", "0b_"),
        ("title: !!str 5", "title", "5"),
        ("title: =", "title", "="),
        ("other: null", "other", None),
        ("other: ~", "other", None),
        ("other: 5", "other", "5"),
        ("words: [no, 12:30, 007]", "words", ["no", "12:30", "007"]),
        ("count: 021", "count", 21),
        ("count: -7", "count", -7),
        ("on: on", "on", True),
        ("on: no", "on", False),
        ("on: true", "on", True),
        ("\ufefftitle: x", "title", "x"),
        ("title: x\r\ncount: 2\r\n", "count", 2),
        ("x: &x {name: 1}\ninner: *x", None, "line 1: x: unknown field"),
        ("many: [&x {name: 1, size: 3}, {<<: *x, name: b}, {<<: [*x]}]", "many", [
            Inner(name="1", size=3), Inner(name="b", size=3), Inner(name="1", size=3)]),
        ("titel: x", None, "line 1: titel: unknown field; did you mean title?"),
        ("title: T\ninner: {name: x, sise: 1}", None, "line 2: inner.sise: unknown field; did you mean"),
        ("title: T\n\ninner:\n  name: x\n  size: .inf", None, "line 5: inner.size: inf given; should be"),
        ("title: T\ninner: {name: x, size: 1e400}", None, "line 2: inner.size: inf given; should"),
        ("title: T\nmany:\n- name: x\n- name: [x]", None, "line 4: many.1.name: a list given; should"),
        ("title: null", None, "line 1: title: None given; should be text"),
        ("count: 1\ncount: 2", None, "line 2: it is not valid YAML: count is given twice, first in line 1"),
        ("inner: {name: a, name: b}", None, "line 1: it is not valid YAML: name is given twice"),
        ("title: !!bool abc", None, "line 1: it is not valid YAML: it has the tag !!bool; leave it out"),
        ("title: !!timestamp abc", None, "has the tag !!timestamp"),
        ("title: !!python/object:os.system x", None, "has the tag !!python/object:os.system"),
        ("inner: !x {}", None, "has the tag !x"),
        ("title: a\n---\ntitle: b", None, "line 2: it is not valid YAML: a second document begins here"),
        ("title: a: b", None, "line 1: it is not valid YAML: mapping values are not allowed in this"),
        ("title: 'a", None, "line 1: it is not valid YAML"),
        ("? [a]\n: b", None, "line 1: it is not valid YAML: a key must be a word"),
        ("title: x\ninner: *nothing", None, "line 2: it is not valid YAML: *nothing refers to no anchor"),
        ("inner: &a {name: *a}", None, "*a refers to no anchor that ended before it"),
        ("inner: {<<: x}", None, "<< needs a mapping"),
        ("", None, "it is empty"),
        ("# nothing\n", None, "it is empty"),
        ("- 1", None, "line 1: value: a list given; should be a mapping"),
        ("text", None, "line 1: value: 'text' given; should be a mapping"),
        ("title: x\n\tcount: 1", None, "line 2: it is not valid YAML"),
        (b"title: x\ncount: \xff", None, "line 2: it is not UTF-8 (byte 0xff)"),
        ("title: x".encode("utf-16"), None, "line 1: it is not UTF-8"),
        (b"title: x\nother: a\0b", None, "line 2: it is not valid YAML: it has the character U+0000"),
        ("title: x\nother: a\x1bb", None, "line 2: it is not valid YAML: it has the character U+001B"),
        ("count: " + "9" * 5000, None, "count: '9999"),
        ("count: 1" + "0" * 90, None, "count: a number with very many digits given"),
        ("%YAML 9.9\n---\ntitle: x", None, "line 1: it is not valid YAML"),
    ],
)  # fmt: skip
def test_it_is_taken_as_meant_or_refused_with_its_line(
    tmp_path: Path, text: str | bytes, field: str | None, value: object
) -> None:
    if field is not None:
        assert getattr(parse(tmp_path, text), field) == value
        return
    with pytest.raises(BadRequestError) as caught:
        parse(tmp_path, text)
    said = str(caught.value)
    assert str(value) in said
    assert str(tmp_path / "a.yaml") in said and "\n" not in said and len(said) < 400


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 3000, "- " * 3000, "\n".join(
    " " * depth + "a:" for depth in range(2000)
)])  # fmt: skip
def test_what_is_nested_too_deep_is_refused_at_once(tmp_path: Path, text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(BadRequestError, match="nested more than 50 levels deep"):
        parse(tmp_path, text)
    assert time.perf_counter() - began < 5


def test_aliases_do_not_multiply_without_bound(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(BadRequestError, match="more than 500000 values"):
        parse(tmp_path, "\n".join(["a0: &a0 x", *levels]))
    with pytest.raises(BadRequestError, match="nested more than 50 levels deep"):
        deep = [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
        parse(tmp_path, "\n".join(["a0: &a0 x", *deep]))


@pytest.mark.parametrize("load", [load_config, load_preset, lambda name: load_storyboard(Path(name))])
def test_what_is_no_file_of_a_reasonable_size_is_refused(
    tmp_path: Path, load: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(load)
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.yaml")
    with Path("huge.yaml").open("wb") as file:
        file.truncate(2**40)
    Path("folder.yaml").mkdir()
    Path("loop.yaml").symlink_to("loop.yaml")
    for name, said in (
        ("pipe.yaml", "it is a pipe or a device"),
        ("/dev/zero", "it is a pipe or a device"),
        ("huge.yaml", "larger than 8 MiB"),
        ("folder.yaml", "it is a folder"),
        ("loop.yaml", "it cannot be read"),
        ("no/such.yaml", "it cannot be read: No such file"),
        ("a" * 300 + ".yaml", "it cannot be read: File name too long"),
        ("a\0b.yaml", "it cannot be read: embedded null"),
        ("~nobody-of-this-name/a.yaml", "it cannot be read"),
    ):
        with pytest.raises(BadRequestError, match=said):
            load(name)


def test_files_that_a_config_names_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir("/")
    text = (
        CONFIG
        + "  spectrum: presets/mine.yaml\nlora: [{file: style.safetensors}, {file: ~/more.safetensors}]\n"
    )
    for model, expected in (
        ("models/mine", tmp_path / "models" / "mine"),
        ("./none", tmp_path / "none"),
        ("../mine", tmp_path.parent / "mine"),
        ("~/mine", home / "mine"),
        ("/abs/mine", "/abs/mine"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("wan-tiny", "wan-tiny"),
    ):
        (tmp_path / "mine.yaml").write_text(text.replace("wan-tiny", model))
        config = load_config(str(tmp_path / "mine.yaml"))
        assert config.model == str(expected)
        files = [one.file for one in config.lora]
        assert files == [str(tmp_path / "style.safetensors"), str(home / "more.safetensors")]
        assert config.defaults.spectrum == str(tmp_path / "presets" / "mine.yaml")


def test_a_folder_s_parent_is_that_of_where_a_link_leads(tmp_path: Path) -> None:
    """As for every other program: `cat link/../a` is about the folder in which the linked one lies."""
    (tmp_path / "real" / "configs").mkdir(parents=True)
    (tmp_path / "real" / "mine").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link").symlink_to(tmp_path / "real" / "configs")
    (tmp_path / "real" / "configs" / "a.yaml").write_text(
        CONFIG.replace("wan-tiny", "../mine") + "  spectrum: ../mine.yaml\nlora: {file: style.safetensors}\n"
    )
    config = load_config(str(tmp_path / "home" / "link" / "a.yaml"))
    assert config.model == str(tmp_path / "real" / "mine")
    assert config.defaults.spectrum == str(tmp_path / "real" / "mine.yaml")
    assert config.lora[0].file == str(tmp_path / "home" / "link" / "style.safetensors")  # as it is named
    assert beside("..", tmp_path / "home" / "link") == str(tmp_path / "real")


def test_a_calibration_lies_beside_its_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    preset = "schedule: {kind: planned, nfe: 9}\npredictor: {kind: calibrated}\nstream: guided\ncalibration: "
    for named, expected in (
        ("./cal.json", tmp_path / "sub" / "cal.json"),
        ("cal.json", tmp_path / "sub" / "cal.json"),
        ("../cal.json", tmp_path / "cal.json"),
        ("wan-tiny", "wan-tiny"),
    ):
        (tmp_path / "sub" / "mine.yaml").write_text(preset + named)
        assert load_preset("sub/mine.yaml").calibration == str(expected)


def test_errors_of_configs_and_presets_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG.replace("frames: 17", "frames: 18"))
    with pytest.raises(BadRequestError, match=r"a\.yaml, line 6: defaults\.frames: 18 given; must be 4k"):
        load_config(str(path))
    path.write_text("stream: guided\nschedule:\n  kind: paper\n  wramup: 3\n")
    with pytest.raises(BadRequestError, match=r"line 4: schedule\.paper\.wramup: .* did you mean warmup"):
        load_preset(str(path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("prompt: x", "prompt: x, spectrum: no", "line 5, shot 'a': spectrum: 'no' given"),
        ("id: a", "id: A", "line 5, shot 'A': id: 'A' given; must have at most 60 lower case letters"),
        ("prompt: x", "prompt: ''", "line 5, shot 'a': prompt: '' given; must not be empty"),
        (
            "prompt: x",
            'prompt: "\\0"',
            "line 5, shot 'a': prompt: '\\x00' given; must be text; at character 1",
        ),
        ("title: T", "title: [a]", "line 1: title: a list given; should be text"),
        ("title: T", 'title: "a\\nb"', "line 1: title: 'a\\nb' given; must be a single line"),
        ("title: T", "title: T\nno: x", "line 2: no: unknown field"),
        ("width: 64", "width: 65", "line 2: width: 65 given; must be a multiple of 16"),
        ("height: 48", "height: 48\ndefaults: {steps: 0}", "line 4: defaults.steps: 0 given"),
        ("height: 48", "height: 48\ndefaults: {spectrum: none}", "line 4: spectrum: 'none' given"),
        (
            "frames: 5}",
            "frames: 5}\n  - {id: a, prompt: y}",
            "line 4: shots: the ids a are used more than once",
        ),
        ("frames: 5}", "seconds: 3600}", "line 5, shot 'a': frames: 28801 given"),
        (
            "frames: 5}",
            "frames: 5, title: a, title: b}",
            "line 5: it is not valid YAML: title is given twice",
        ),
    ],
)
def test_a_storyboard_is_wrong_in_a_line_and_shot(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "film.yaml"
    path.write_text(FILM.replace(old, new))
    with pytest.raises(BadRequestError) as caught:
        load_storyboard(path)
    assert said in str(caught.value)


@pytest.mark.parametrize("id", ["no", "on", "007", "5"])
def test_ids_and_titles_are_text(tmp_path: Path, id: str) -> None:
    path = tmp_path / "film.yaml"
    own = f"defaults: {{spectrum: off}}\nshots:\n  - {{id: {id}, prompt: 42, title: 12:30, frames: 5}}\n"
    path.write_text(FILM.partition("shots:")[0].replace("T", "2024-02-30") + own)
    board, (shot,) = load_storyboard(path)
    assert board.title == "2024-02-30"
    assert (shot.shot.id, shot.shot.title, shot.request.prompt) == (id, "12:30", "42")
    assert shot.request.spectrum == "off"


def test_problems_that_all_shots_have_are_told_once_and_of_many_the_first(tmp_path: Path) -> None:
    path = tmp_path / "film.yaml"
    shots = "".join(f"  - {{id: s{n}, prompt: x, frames: 5, seed: -1}}\n" for n in range(100))
    path.write_text(FILM.partition("  - ")[0] + shots)
    with pytest.raises(BadRequestError) as caught:
        load_storyboard(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 41 and lines[-1] == "and 60 more"
