"""A conversion makes the whole folder or none of it, and goes on where it was interrupted."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from runtime.errors import BadRequestError, JobFailedError
from runtime.models.folder import find_model
from runtime.models.layouts.convert import Conversion, plan_conversion
from runtime.models.layouts.shards import Slot, split, write_shard
from runtime.models.layouts.target import MANIFEST
from runtime.request.config import Config, ModelFiles
from tests.originals import (
    assert_same,
    assert_same_component,
    config_for,
    mapping,
    scaled,
    state_of,
    write_original,
    write_reference,
    write_single_files,
)
from tests.ranks import PROCESSES

pytestmark = pytest.mark.usefixtures("cached")
COMPONENTS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("reference") / "t2v", "t2v")


@pytest.fixture(scope="module")
def original(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(reference, tmp_path_factory.mktemp("original") / "t2v")


class KilledError(Exception):
    """Stands for a kill."""


def interrupt_at(word: str, count: int) -> object:
    """A callback that raises the `count`-th time that something is done that has `word` in its name."""
    seen = []

    def on_progress(doing: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if word in doing:
            seen.append(doing)
            if len(seen) == count:
                raise KilledError

    return on_progress


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(model: str | ModelFiles, folder: Path, **own: object) -> Conversion:
    conversion = plan_conversion(model, folder, **{"largest": 2**19, **own})  # type: ignore[arg-type]
    conversion.target.check()
    conversion.run()
    return conversion


def test_the_folder_is_the_model_in_diffusers_layout(
    config: Config, reference: Path, original: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    conversion = convert(str(original), folder)
    assert conversion.target.is_done()
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    for name in COMPONENTS:
        found, expected = state_of(folder / name), state_of(reference / name)
        assert found.keys() == expected.keys()
        assert all(found[key].dtype == expected[key].dtype for key in expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert_same(find_model(config_for(config, str(folder))), reference, torch.bfloat16)
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.tokenizer("a red circle").input_ids
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_two_conversions_make_the_same_bytes(original: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(str(original), tmp_path / name)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("word", "count"), [("writing transformer", 1), ("writing vae", 1), ("verifying", 2)]
)
def test_an_interrupted_conversion_goes_on(original: Path, tmp_path: Path, word: str, count: int) -> None:
    folder, whole = tmp_path / "made", tmp_path / "whole"
    convert(str(original), whole)
    conversion = plan_conversion(str(original), folder, largest=2**19)
    with pytest.raises(KilledError):
        conversion.run(interrupt_at(word, count))  # type: ignore[arg-type]
    assert not folder.exists()
    finished = conversion.target.finished()
    assert len(finished) == len(conversion.files) or word != "verifying"
    kept = {name: (conversion.target.partial / name).stat().st_ino for name in finished}
    written: list[str] = []
    again = plan_conversion(str(original), folder, largest=2**19)
    again.target.check()
    again.run(lambda doing, done, total: written.append(doing))
    assert not {f"writing {name}" for name in finished}.intersection(written)
    assert {name: (folder / name).stat().st_ino for name in finished} == kept
    assert content(folder) == content(whole)


def convert_and_die(original: str, folder: str) -> None:
    """Be killed in the middle of a weight file."""

    def on_progress(doing: str, done: int, total: int) -> None:
        if "-00002-of-" in doing:
            os.kill(os.getpid(), signal.SIGKILL)

    plan_conversion(original, Path(folder), largest=2**19).run(on_progress)


def test_a_killed_conversion_goes_on_and_leaves_nothing(original: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "made", tmp_path / "whole"
    convert(str(original), whole)
    for _ in range(2):  # the second goes on from the first, and dies at the same place
        process = PROCESSES.Process(target=convert_and_die, args=(str(original), str(folder)))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not folder.exists()
    again = plan_conversion(str(original), folder, largest=2**19)
    assert again.target.finished().keys() < content(whole).keys()
    assert list(again.target.partial.rglob(".*.part*"))  # what was half-written is not taken for whole
    again.target.check()
    again.run()
    assert content(folder) == content(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"made", "whole"}


def test_a_half_written_folder_is_not_a_model(config: Config, original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    conversion = plan_conversion(str(original), folder, largest=2**19)
    with pytest.raises(KilledError):
        conversion.run(interrupt_at("verifying", 1))  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="there is no folder"):
        find_model(config_for(config, str(folder)))


def test_a_file_that_is_not_on_disk_as_it_was_written_is_found(original: Path, tmp_path: Path) -> None:
    conversion = plan_conversion(str(original), tmp_path / "made", largest=2**19)
    with pytest.raises(KilledError):
        conversion.run(interrupt_at("verifying", 1))  # type: ignore[arg-type]
    damaged = conversion.target.partial / "vae" / "diffusion_pytorch_model.safetensors"
    if not damaged.is_file():
        damaged = next((conversion.target.partial / "vae").glob("*-00001-of-*.safetensors"))
    bytes_ = bytearray(damaged.read_bytes())
    bytes_[-1] ^= 1
    damaged.write_bytes(bytes_)
    with pytest.raises(JobFailedError, match=r"vae/.* is not on disk as it was written; it was removed"):
        conversion.run()
    assert not (tmp_path / "made").exists()
    conversion.run()
    assert conversion.target.is_done()


def test_a_finished_folder_is_done_and_others_are_refused(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    convert(str(original), folder)
    assert plan_conversion(str(original), folder, largest=2**19).target.is_done()
    with pytest.raises(BadRequestError, match="it is not empty"):
        plan_conversion(str(original), folder, dtype="bfloat16").target.is_done()
    (tmp_path / "file").touch()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    for name, said in (("file", "it is not a folder"), ("theirs", "it is not empty, it holds 'thesis.txt'")):
        with pytest.raises(BadRequestError, match=said):
            plan_conversion(str(original), tmp_path / name).target.is_done()
    (tmp_path / "empty").mkdir()
    convert(str(original), tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_what_is_left_of_another_conversion_and_others_files_are_kept(original: Path, tmp_path: Path) -> None:
    conversion = plan_conversion(str(original), tmp_path / "made", largest=2**19)
    with pytest.raises(KilledError):
        conversion.run(interrupt_at("verifying", 1))  # type: ignore[arg-type]
    other = plan_conversion(str(original), tmp_path / "made", dtype="bfloat16")
    with pytest.raises(
        BadRequestError, match="an unfinished conversion of another model, or in another dtype"
    ):
        other.target.check()
    theirs = conversion.target.partial / "vae" / "mine.txt"
    theirs.write_text("x")
    with pytest.raises(BadRequestError, match=re.escape("holds vae/mine.txt; remove that folder")):
        conversion.target.check()
    assert theirs.read_text() == "x"
    beside = tmp_path / ".else.converting"
    beside.mkdir()
    (beside / "model_index.json").write_text("theirs")
    with pytest.raises(BadRequestError, match=r"which holds model_index\.json; remove that folder"):
        plan_conversion(str(original), tmp_path / "else").target.check()


def test_a_folder_within_the_model_is_refused(original: Path, reference: Path) -> None:
    for model in (original, reference):
        with pytest.raises(BadRequestError, match="it is in the model"):
            plan_conversion(str(model), model / "made")
        with pytest.raises(BadRequestError, match="it is not empty"):
            plan_conversion(str(model), model).target.is_done()


def test_a_folder_is_made_by_one_process_at_a_time(original: Path, tmp_path: Path) -> None:
    conversion = plan_conversion(str(original), tmp_path / "made")
    with (
        conversion.target.being_made(),
        pytest.raises(BadRequestError, match=r"process .* is converting a model"),
    ):
        conversion.run()


def test_a_full_disk_is_told_before_anything_is_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = plan_conversion(str(original), tmp_path / "made")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": conversion.size - 1}))
    with pytest.raises(BadRequestError, match=r"GiB are to be written, and .* GiB are free there"):
        conversion.target.check()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_meanwhile_is_no_folder(reference: Path, tmp_path: Path) -> None:
    original = write_original(reference, tmp_path / "original")
    conversion = plan_conversion(str(original), tmp_path / "made", largest=2**19)
    part = next(original.glob("*-00002-of-00002.safetensors"))

    def touch(doing: str, done: int, total: int) -> None:
        if "writing vae" in doing:
            part.write_bytes(part.read_bytes())

    with pytest.raises(JobFailedError, match="changed"):
        conversion.run(touch)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_is_that_of_the_whole_one_loaded_so(
    config: Config, reference: Path, original: Path, tmp_path: Path, dtype: str
) -> None:
    folder = tmp_path / "made"
    convert(str(original), folder, dtype=dtype)
    state = state_of(folder / "transformer")
    assert state["blocks.0.attn1.to_q.weight"].dtype == getattr(torch, dtype)
    assert state["blocks.0.norm2.weight"].dtype == torch.float32  # as it is loaded in any dtype
    found = find_model(config_for(config, str(folder)))
    for name in ("transformer", "text_encoder"):
        assert_same_component(found, reference, name, getattr(torch, dtype))
    assert state_of(folder / "vae")["encoder.conv_in.weight"].dtype == torch.float32


def test_float8_becomes_bfloat16_and_runs_as_before(config: Config, reference: Path, tmp_path: Path) -> None:
    single = write_single_files(reference, tmp_path / "single", scaled)
    folder = tmp_path / "made"
    convert(ModelFiles(**mapping(single)), folder)
    assert {one.dtype for one in state_of(folder / "transformer").values()} == {torch.bfloat16}
    assert_same(find_model(config_for(config, ModelFiles(**mapping(single)))), folder, torch.float32)


def test_a_model_in_diffusers_layout_is_converted_to_another_dtype(reference: Path, tmp_path: Path) -> None:
    convert(str(reference), tmp_path / "made", dtype="bfloat16")
    found, expected = (state_of(one / "transformer") for one in (tmp_path / "made", reference))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key].to(found[key].dtype)) for key in expected)


def test_what_is_no_weight_is_copied_and_what_overflows_is_told(tmp_path: Path) -> None:
    positions, large = torch.arange(7), torch.full((3,), 1e5)
    slots = [Slot("positions", "int64", (7,)), Slot("large", "float32", (3,))]
    made = {"positions": positions, "large": large}
    write_shard(tmp_path / "whole.safetensors", slots, made.__getitem__)
    assert all(torch.equal(one, made[key]) for key, one in load_file(tmp_path / "whole.safetensors").items())
    half = [Slot("large", "float16", (3,))]
    with pytest.raises(ValueError, match="large overflows float16"):
        write_shard(tmp_path / "half.safetensors", half, made.__getitem__)


def private_memory() -> int:
    """Bytes of memory of this process that are not of mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_a_few_tensors_are_in_memory_at_a_time(reference: Path, tmp_path: Path) -> None:
    """134 MB are converted, the largest tensor of which has 6 MB."""
    large = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=32, ffn_dim=2048, num_layers=8,
    )  # fmt: skip
    folder = Path(shutil.copytree(reference, tmp_path / "large"))
    large.save_pretrained(folder / "transformer")
    del large
    original = write_original(folder, tmp_path / "original")
    gc.collect()
    conversion = plan_conversion(str(original), tmp_path / "made", dtype="bfloat16")
    before, seen = private_memory(), []
    conversion.run(lambda doing, done, total: seen.append(private_memory()))
    assert conversion.size > 60e6 and len(seen) > 100
    assert max(seen) - before < conversion.size / 2


def test_the_manifest_names_every_weight_file(original: Path, tmp_path: Path) -> None:
    conversion = convert(str(original), tmp_path / "made")
    manifest = json.loads((tmp_path / "made" / MANIFEST).read_text())
    written = {
        str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*.safetensors")
    }
    assert manifest["files"].keys() == written
    assert manifest["of"] == {"revision": conversion.revision, "dtype": None}


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    state = {
        "narrow": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 3),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2.5, dtype=torch.float64),
    }
    slots = [
        Slot(name, str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in state.items()
    ]
    seen: list[int] = []
    write_shard(tmp_path / "a.safetensors", slots, state.__getitem__, seen.append)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert seen[-1] == sum(slot.size for slot in slots) == 6 + 24 + 0 + 8
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    sizes = [[slot.name for slot in shard] for shard in split(slots, 24)]
    assert sizes == [["narrow"], ["wide", "none"], ["number"]]
