"""Models on disk: where they are, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runtime.configs import EMBEDDED_MODELS, Architecture, Config
from runtime.errors import BadRequestError
from runtime.lora import lora_digest
from runtime.request import VideoRequest


class ModelKind(StrEnum):
    """What a model makes videos from, by the name of its pipeline in diffusers."""

    TEXT = "WanPipeline"
    IMAGE = "WanImageToVideoPipeline"
    VACE = "WanVACEPipeline"


_WEIGHTS = {  # component → stem of its weight file, as diffusers and transformers name it
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_IMAGE_WEIGHTS = {"image_encoder": "model"}
_TEXT_BESIDE_IMAGE = 512  # text tokens, where image tokens stand before them: `WanAttnProcessor` counts on it
_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the revision takes in only the header and the size


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete model in diffusers layout on this machine.

    Attributes:
        name: what the user called it.
        path: the folder.
        kind: what it makes a video from: text; an image, too (I2V); or an image if there is one (VACE).
        revision: the repository's commit, or `sha256:…` over the folder's files; with that of a LoRA.
    """

    name: str
    path: Path
    revision: str
    kind: ModelKind = ModelKind.TEXT

    def refuses(self, request: VideoRequest) -> str:
        """Why it cannot serve a request, whatever its weights; empty if it can."""
        if self.kind is ModelKind.IMAGE and request.image is None:
            return f"image: missing; {self.name} makes videos from an image"
        if self.kind is ModelKind.TEXT and request.image is not None:
            return f"image: {request.image!r} given; {self.name} makes videos from text alone"
        if self.kind is ModelKind.IMAGE and request.max_sequence_length != _TEXT_BESIDE_IMAGE:
            return (
                f"max_sequence_length: {request.max_sequence_length} given; {self.name} tells text from "
                f"image by the text's length, which must be {_TEXT_BESIDE_IMAGE}"
            )
        return ""


def find_model(config: Config) -> ModelFolder:
    """Locate the config's model, fetching it if it is a repository, and check that its files are whole.

    Only headers and settings are read, so this is quick for any size of model.

    Raises:
        BadRequestError: there is no such model, it is no Wan that makes video from text or an image, a file
            is missing or corrupt, or the LoRA is none.
    """
    local = find_local(config)
    path, commit = (local, None) if local else _download(config.model, config.revision)
    try:
        kind = _check_folder(path, config.architecture)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadRequestError(f"model: {config.model!r} cannot be used: {error}") from None
    revision = commit or _digest(path)
    if config.lora is not None:
        revision += f"+{lora_digest(config.lora)}"
    return ModelFolder(config.model, path, revision, kind)


def find_local(config: Config) -> Path | None:
    """The folder of an embedded model, or of a model on disk; None if it has to be fetched."""
    for folder in (EMBEDDED_MODELS / config.model, Path(config.model)):
        if folder.is_dir():
            return folder
    return None


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    embedded = ", ".join(sorted(p.name for p in EMBEDDED_MODELS.iterdir() if p.is_dir()))
    try:
        path = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadRequestError(
            f"model: {repository!r} given; it is neither embedded ({embedded}) nor a folder, "
            f"and it could not be fetched as a Hugging Face repository: {reason}"
        ) from None
    return path, path.name


def _check_folder(path: Path, expected: Architecture | None) -> ModelKind:
    """Which kind of model it holds."""
    index = read_json(path / "model_index.json")
    if index.get("_class_name") not in list(ModelKind):
        raise ValueError(f"it is a {index.get('_class_name')}; supported are {', '.join(ModelKind)}")
    kind = ModelKind(index["_class_name"])
    if (index.get("transformer_2") or [None])[0] is not None:
        raise ValueError("it has two transformers (Wan2.2), which is not supported yet")
    read_json(path / "scheduler" / "scheduler_config.json")
    tokenizer = path / "tokenizer"
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(f"{tokenizer}: holds neither tokenizer.json nor spiece.model")
    weights = _WEIGHTS | (_IMAGE_WEIGHTS if kind is ModelKind.IMAGE else {})
    if kind is ModelKind.IMAGE:
        read_json(path / "image_processor" / "preprocessor_config.json")
    for component, stem in weights.items():
        read_json(path / component / "config.json")
        for file in _weight_files(path / component, stem):
            _check_weights(file)
    transformer = read_json(path / "transformer" / "config.json")
    _check_conditioning(kind, transformer)
    if expected is not None:
        found = Architecture(
            layers=transformer.get("num_layers", 0),
            heads=transformer.get("num_attention_heads", 0),
            head_dim=transformer.get("attention_head_dim", 0),
            ffn_dim=transformer.get("ffn_dim", 0),
        )
        if found != expected:
            raise ValueError(f"its transformer has {found}, but the config expects {expected}")
    return kind


def _check_conditioning(kind: ModelKind, transformer: dict[str, Any]) -> None:
    """Refuse a transformer that takes what it is conditioned on otherwise than Wan2.1's do."""
    has_image = transformer.get("image_dim") is not None
    extra = transformer.get("in_channels", 0) - transformer.get("out_channels", 0)
    has_control = "vace_layers" in transformer
    if has_control != (kind is ModelKind.VACE):
        raise ValueError(f"it is a {kind}, but its transformer is a {transformer.get('_class_name')}")
    if kind is not ModelKind.IMAGE and (has_image or extra):
        raise ValueError(f"its transformer expects an image beside its latents, which a {kind} does not give")
    if kind is ModelKind.IMAGE and not (has_image and extra):
        raise ValueError("it takes an image otherwise than Wan2.1's I2V, which is not supported yet")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return dict(content)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    return [folder / f"{stem}.safetensors"]


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt"):  # checks that the header covers the file exactly
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(
        p for p in path.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors", ".model"}
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_HASHED_WHOLE))
    return f"sha256:{digest.hexdigest()[:16]}"
