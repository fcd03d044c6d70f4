"""A model in any layout is the model in diffusers layout: every weight and every frame, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import import_protobuf

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files.text import read_json
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.folder import find_model, is_local, open_model
from runtime.models.loading import read_component
from runtime.request.config import EMBEDDED_MODELS, Config, ModelFiles
from tests.conditioned import write_image
from tests.originals import (
    KINDS,
    assert_same,
    config_for,
    mapping,
    original_transformer,
    scaled,
    state_of,
    unscaled,
    write_original,
    write_reference,
    write_single_files,
)

pytestmark = pytest.mark.usefixtures("cached")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("references")
    return {kind: write_reference(folder / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [write_original, write_single_files])
def test_every_weight_is_that_of_diffusers_layout(
    config: Config,
    references: dict[str, Path],
    tmp_path: Path,
    write: Callable[[Path, Path], Path],
    kind: str,
    dtype: torch.dtype,
) -> None:
    folder = write(references[kind], tmp_path / "other")
    found = find_model(config_for(config, str(folder)))
    assert found.name == str(folder)
    assert_same(found, references[kind], dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_named_are_the_model(
    config: Config, references: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = write_single_files(references[kind], tmp_path / "other")
    found = find_model(config_for(config, ModelFiles(**mapping(folder))))
    assert found.name.endswith("wan2.1_t2v_1.3B_bf16.safetensors")
    assert_same(found, references[kind], torch.float32)


@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale for each row"])
def test_float8_is_multiplied_by_its_scale(
    config: Config, references: dict[str, Path], tmp_path: Path, rows: bool
) -> None:
    other = write_single_files(references["t2v"], tmp_path / "other", lambda state: scaled(state, rows=rows))
    weights = references["t2v"] / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = unscaled(scaled(original_transformer(load_file(weights)), rows=rows))
    names = dict(zip(original_transformer(load_file(weights)), load_file(weights), strict=True))
    reference = Path(shutil.copytree(references["t2v"], tmp_path / "reference"))
    save_file(
        {names[name]: value for name, value in expected.items()},
        reference / "transformer" / weights.name,
    )
    found = find_model(config_for(config, str(other)))
    for dtype in DTYPES:
        assert_same(found, reference, dtype)


def test_float8_that_lacks_its_scale_is_refused(
    config: Config, references: dict[str, Path], tmp_path: Path
) -> None:
    lost = "blocks.1.ffn.2.scale_weight"
    without = lambda state: {name: one for name, one in scaled(state).items() if name != lost}  # noqa: E731
    folder = write_single_files(references["t2v"], tmp_path / "other", without)
    with pytest.raises(
        BadRequestError, match=r"blocks\.1\.ffn\.2\.weight .* float8_e4m3fn and lacks its scale"
    ):
        find_model(config_for(config, str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_that_of_diffusers_layout(
    config: Config, references: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    write = write_single_files if kind == "vace" else write_original
    folder = write(references[kind], tmp_path / "other")
    image = str(write_image(tmp_path / "image.png")) if kind == "i2v" else None
    made = [frames(config_for(config, str(one)), image) for one in (references[kind], folder)]
    assert np.array_equal(*made)


def frames(config: Config, image: str | None) -> Frames:
    engine = Engine(config)
    own = {} if image is None else {"image": image, "max_sequence_length": 512}
    given = {
        "width": 64,
        "height": 64,
        "frames": 5,
        "steps": 3,
        "spectrum": "off",
        "max_sequence_length": 32,
        **own,
    }
    sink = FrameBuffer()
    engine.generate(config.request("a red circle", **given), [sink])
    return sink.frames


def test_a_revision_is_of_the_content_not_of_the_place(
    config: Config, references: dict[str, Path], tmp_path: Path
) -> None:
    first = write_original(references["t2v"], tmp_path / "a")
    second = Path(shutil.copytree(first, tmp_path / "somewhere" / "else"))
    revisions = [find_model(config_for(config, str(one))).revision for one in (first, second)]
    assert revisions[0] == revisions[1]
    part = next(second.glob("*-00002-of-00002.safetensors"))
    state = load_file(part)
    name = min(state)
    save_file(state | {name: state[name] + 1}, part)
    assert find_model(config_for(config, str(second))).revision != revisions[0]


def test_a_model_that_changes_after_it_was_looked_into_is_not_loaded(
    config: Config, references: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_original(references["t2v"], tmp_path / "other")
    found = find_model(config_for(config, str(folder)))
    part = next(folder.glob("*-00002-of-00002.safetensors"))
    part.write_bytes(part.read_bytes())
    with pytest.raises(BadRequestError, match="has changed since it was examined"):
        read_component(diffusers.WanTransformer3DModel, found, "transformer", torch.float32)


def test_what_stands_for_a_model_is_made_once(references: dict[str, Path], tmp_path: Path) -> None:
    folder = write_original(references["t2v"], tmp_path / "other")
    first, _ = open_model(str(folder), None)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert open_model(str(folder), None) == (first, None)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert sum(path.stat().st_size for path in first.rglob("*") if path.is_file()) < 2**20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "Wan2.1_VAE.pth").unlink(), "it holds no vae; found: "),
        (lambda f: (f / "models_t5_umt5-xxl-enc-bf16.pth").unlink(), "it holds no text_encoder"),
        (
            lambda f: drop(f / "models_t5_umt5-xxl-enc-bf16.pth", "blocks.1.ffn.fc2.weight"),
            "its text encoder lacks 1 weights, the first is encoder.block.1.layer.1.DenseReluDense.wo.weight",
        ),
        (lambda f: shutil.rmtree(f / "google"), "it holds no tokenizer (the folder google/umt5-xxl"),
        (
            lambda f: next(f.glob("*-00001-of-00002.safetensors")).unlink(),
            "diffusion_pytorch_model-00001-of-00002.safetensors is missing",
        ),
        (
            lambda f: shutil.copy(f / "Wan2.1_VAE.pth", f / "b.pth"),
            "it holds 2 files for the vae: Wan2.1_VAE.pth, b.pth",
        ),
        (lambda f: shutil.copytree(f / "google", f / "more"), "it holds several tokenizers"),
        (
            lambda f: (f / "Wan2.1_VAE.pth").write_bytes(b"junk"),
            "it holds no vae; found: {f}/Wan2.1_VAE.pth is corrupt, or not written by torch.save",
        ),
        (
            lambda f: torch.save({"a": Path("x")}, f / "Wan2.1_VAE.pth"),
            "holds more than weights and is not read, as it could run code",
        ),
        (
            lambda f: torch.save({"a": 1}, f / "Wan2.1_VAE.pth"),
            "does not hold a dictionary of tensors",
        ),
        (
            lambda f: add(f, "motion_encoder.dec.direction.weight"),
            "its transformer has 1 weights that Wan's text to video, image to video and VACE do not have, "
            "the first is motion_encoder.dec.direction.weight",
        ),
        (
            lambda f: only_packed(f),  # noqa: PLW0108 defined below
            "found: {f}/wan.gguf is a GGUF file, which is not read: use the safetensors file",
        ),
        (
            lambda f: edit(f / "config.json", num_heads=3),
            "256 channels, from which its number of heads does not",
        ),
    ],
)
def test_what_is_incomplete_or_unclear_is_told(
    config: Config, references: dict[str, Path], tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    folder = write_original(references["t2v"], tmp_path / "other")
    change(folder)
    with pytest.raises(BadRequestError, match="model: ") as caught:
        find_model(config_for(config, str(folder)))
    assert said.format(f=folder) in str(caught.value) and "\n" not in str(caught.value)


def only_packed(folder: Path) -> None:
    for part in folder.glob("*.safetensors"):
        part.unlink()
    (folder / "wan.gguf").write_bytes(b"GGUF")


def drop(file: Path, name: str) -> None:
    state = torch.load(file)
    del state[name]
    torch.save(state, file)


def add(folder: Path, name: str) -> None:
    part = next(folder.glob("*-00002-of-00002.safetensors"))
    save_file(load_file(part) | {name: torch.zeros(3)}, part)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(read_json(path) | values))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"lora_up": torch.zeros(1), "b": torch.zeros(1)}, "found: x.safetensors holds "),
        (
            {f"blocks.0.self_attn.{one}.weight": torch.zeros(2, 2, dtype=torch.uint8) for one in "qk"},
            "is stored as uint8, a kind of quantisation that is not read",
        ),
        ({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, "its transformer lacks patch_embedding.weight"),
    ],
)
def test_files_of_no_known_layout_are_told_with_what_they_hold(
    config: Config, tmp_path: Path, state: dict[str, torch.Tensor], said: str
) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(BadRequestError, match="model: ") as caught:
        find_model(config_for(config, str(tmp_path)))
    assert said in str(caught.value)
    assert "found: " not in said or all(name in str(caught.value) for name in state)


def test_a_named_file_must_hold_what_it_is_named_for(
    config: Config, references: dict[str, Path], tmp_path: Path
) -> None:
    named = mapping(write_single_files(references["t2v"], tmp_path / "other"))
    swapped = ModelFiles(**(named | {"vae": named["text_encoder"]}))
    with pytest.raises(
        BadRequestError, match=r"vae: umt5_xxl_fp16.safetensors holds .* which is not Wan's vae"
    ):
        find_model(config_for(config, swapped))
    gone = ModelFiles(**(named | {"vae": str(tmp_path / "gone.pth")}))
    assert is_local(config_for(config, gone))
    with pytest.raises(BadRequestError, match=r"vae: .*gone.pth is missing"):
        find_model(config_for(config, gone))


def sentencepiece() -> bytes:
    """A model of SentencePiece with three words and some letters, as its own library writes it."""
    model = import_protobuf().ModelProto()
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((f"▁{word}", 1) for word in ("a", "red", "circle"))]
    for number, (piece, kind) in enumerate([*pieces, *((letter, 1) for letter in "▁abcdeilr")]):
        one = model.pieces.add()
        one.piece, one.score, one.type = piece, -float(number), kind
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    content: bytes = model.SerializeToString()
    return content


def test_a_tokenizer_within_the_text_encoders_file_is_used(
    config: Config, references: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_single_files(references["t2v"], tmp_path / "other")
    shutil.rmtree(folder / "tokenizer")
    file = folder / "text_encoders" / "umt5_xxl_fp16.safetensors"
    state = load_file(file)
    save_file(state | {"spiece_model": torch.frombuffer(bytearray(sentencepiece()), dtype=torch.uint8)}, file)
    found = find_model(config_for(config, str(folder)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.path / "tokenizer")
    assert tokenizer("a red circle").input_ids == [3, 4, 5, 1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a bad").input_ids) == ["▁a", "▁", "b", "a", "d", "</s>"]
    assert_same(found, references["t2v"], torch.float32)
    (folder / "other").mkdir()
    (folder / "other" / "spiece.model").write_bytes(sentencepiece())
    named = ModelFiles(**mapping(folder), tokenizer=str(folder / "other"))
    again = find_model(config_for(config, named)).path / "tokenizer" / "tokenizer.json"
    assert again.read_text() == (found.path / "tokenizer" / "tokenizer.json").read_text()
    save_file(state | {"spiece_model": torch.full((9,), 255, dtype=torch.uint8)}, file)
    with pytest.raises(BadRequestError, match=r"its tokenizer is (damaged|empty)"):
        find_model(config_for(config, ModelFiles(**mapping(folder))))


def test_two_files_for_one_component_are_refused_by_name(
    config: Config, references: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_single_files(references["t2v"], tmp_path / "other")
    first = folder / "diffusion_models" / "wan2.1_t2v_1.3B_bf16.safetensors"
    shutil.copy(first, first.with_name("other.safetensors"))
    with pytest.raises(BadRequestError, match=r"two transformers: .*other\.safetensors.*high_noise"):
        find_model(config_for(config, str(folder)))


def test_an_ordinary_folder_is_opened_as_it_is(config: Config) -> None:
    tiny = EMBEDDED_MODELS / "wan-tiny"
    assert open_model(str(tiny), None) == (tiny, None)
    assert state_of(find_model(config).path / "vae")


def test_a_repository_of_wans_own_is_read_from_the_download_cache(
    config: Config, references: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V-1.3B"
    write_original(references["t2v"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find_model(config_for(config, "Wan-AI/Wan2.1-T2V-1.3B"))
    assert (found.name, found.revision) == ("Wan-AI/Wan2.1-T2V-1.3B", commit)
    assert_same(found, references["t2v"], torch.float32)
