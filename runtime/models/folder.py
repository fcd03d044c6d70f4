"""Models on disk: where they are, and whether they are whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from safetensors import SafetensorError

from runtime.errors import BadRequestError
from runtime.files.text import read_json, user_path
from runtime.models.settings import (
    ImageEncoderSettings,
    ModelIndex,
    TextEncoderSettings,
    TransformerSettings,
    VaeSettings,
    empty_model,
)
from runtime.models.wan.lora import read_lora
from runtime.models.weight_files import WeightFiles
from runtime.request.config import EMBEDDED_MODELS, Architecture, Config, embedded_models, is_embedded
from runtime.request.video_request import VideoRequest

_EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


class ModelKind(StrEnum):
    """What a model makes videos from, by the name of its pipeline in diffusers."""

    TEXT = "WanPipeline"
    IMAGE = "WanImageToVideoPipeline"
    VACE = "WanVACEPipeline"

    @property
    def transformer(self) -> str:
        """Class of its transformer in diffusers."""
        return "WanVACETransformer3DModel" if self is ModelKind.VACE else "WanTransformer3DModel"


_TEXT_BESIDE_IMAGE = 512  # text tokens, where image tokens stand before them: `WanAttnProcessor` counts on it
_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the revision takes in the header and samples
_SAMPLES, _SAMPLE = 63, 2**20
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


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
        revision = commit or folder_digest(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadRequestError(f"model: {config.model!r} cannot be used: {error}") from None
    for lora in config.lora:
        file = read_lora(lora)
        file.check(_shapes(path / "transformer", kind.transformer))
        revision += f"+{file.digest}"
    return ModelFolder(config.model, path, revision, kind)


def local_revision(config: Config) -> str | None:
    """The revision of a model that lies on this machine, unchecked; None if it would be fetched.

    Raises:
        BadRequestError: a LoRA cannot be read.
    """
    path = find_local(config)
    return (
        None
        if path is None
        else "+".join([folder_digest(path), *(read_lora(lora).digest for lora in config.lora)])
    )


def find_local(config: Config) -> Path | None:
    """The folder of an embedded model, or of a model on disk; None if it has to be fetched.

    Raises:
        BadRequestError: it is a file, or a folder that may not be looked into.
    """
    name = config.model
    embedded = [EMBEDDED_MODELS / name] if is_embedded(name) else []
    for path in (*embedded, *([user_path(name)] if name else [])):
        try:
            if path.is_dir():
                return path
            if path.is_file():
                raise BadRequestError(
                    f"model: {name!r} given; it is a single file, a folder in diffusers layout is needed, "
                    f"such as the repository {_EXAMPLE}"
                )
        except OSError as error:
            raise BadRequestError(f"model: {name!r} cannot be used: {error.strerror}") from None
    return None


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    embedded = ", ".join(embedded_models())
    if not _REPOSITORY.fullmatch(repository):
        raise BadRequestError(
            f"model: {repository!r} given; there is no such folder here, and it is neither embedded "
            f"({embedded}) nor named like a Hugging Face repository, such as {_EXAMPLE}"
        )
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
    """Which kind of model it holds, whose settings are well-formed, and whose weights are what they say."""
    if not (path / "model_index.json").is_file() and _is_original(path):
        raise ValueError(
            f"it is in the layout of Wan's own repositories; one in diffusers layout is needed: {_EXAMPLE}"
        )
    index = ModelIndex.read(path / "model_index.json")
    if index.pipeline not in list(ModelKind):
        raise ValueError(f"it is a {index.pipeline}; supported are {', '.join(ModelKind)}")
    kind = ModelKind(index.pipeline)
    if index.has_two_transformers:
        raise ValueError("it has two transformers (Wan2.2), which is not supported yet")
    read_json(path / "scheduler" / "scheduler_config.json")
    tokenizer = path / "tokenizer"
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(f"{tokenizer}: holds neither tokenizer.json nor spiece.model")
    transformer = TransformerSettings.read(path / "transformer" / "config.json")
    _check_conditioning(kind, transformer)
    if expected is not None:
        found = Architecture(
            layers=transformer.num_layers,
            heads=transformer.num_attention_heads,
            head_dim=transformer.attention_head_dim,
            ffn_dim=transformer.ffn_dim,
        )
        if found != expected:
            raise ValueError(f"its transformer has {found}, but the config expects {expected}")
    vae = VaeSettings.read(path / "vae" / "config.json")
    text = TextEncoderSettings.read(path / "text_encoder" / "config.json")
    if vae.z_dim != transformer.channels:
        raise ValueError(f"its VAE has {vae.z_dim} channels, its transformer predicts {transformer.channels}")
    if text.d_model != transformer.text_dim:
        raise ValueError(
            f"its text encoder gives {text.d_model} channels, its transformer takes {transformer.text_dim}"
        )
    _check_weights(path, kind)
    return kind


def _check_weights(path: Path, kind: ModelKind) -> None:
    """Compare the headers of all weight files with the models that the settings describe."""
    for component, model in (("transformer", kind.transformer), ("vae", "AutoencoderKLWan")):
        folder = path / component
        WeightFiles(folder, _DIFFUSERS_WEIGHTS).check(_shapes(folder, model))
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    settings = path / "text_encoder" / "config.json"
    wanted = empty_model(lambda: UMT5EncoderModel(UMT5Config.from_dict(read_json(settings))), settings)
    WeightFiles(path / "text_encoder", "model").check(wanted, complete=False)  # some are tied to others
    if kind is ModelKind.IMAGE:
        read_json(path / "image_processor" / "preprocessor_config.json")
        folder = path / "image_encoder"
        ImageEncoderSettings.read(folder / "config.json")
        given = read_json(folder / "config.json")
        wanted = empty_model(
            lambda: CLIPVisionModel(CLIPVisionConfig.from_dict(given)), folder / "config.json"
        )
        WeightFiles(folder, "model").check(wanted, prefix="vision_model.", complete=False)


def _shapes(folder: Path, model: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the weights of a component that is a class of diffusers, by its settings."""
    import diffusers  # not where only names are asked for: it takes seconds

    settings = folder / "config.json"
    return empty_model(lambda: getattr(diffusers, model).from_config(read_json(settings)), settings)


def _is_original(path: Path) -> bool:
    """Whether a folder is one of Wan's own: its VAE and text encoder are pickled beside the weights."""
    return any(path.glob("Wan2*_VAE.pth")) or any(path.glob("models_t5_*.pth"))


def _check_conditioning(kind: ModelKind, transformer: TransformerSettings) -> None:
    """Refuse a transformer that takes what it is conditioned on otherwise than Wan2.1's do."""
    has_image = transformer.image_dim is not None
    extra = transformer.in_channels - transformer.channels
    has_control = transformer.vace_layers is not None
    named = transformer.class_name or kind.transformer
    if has_control != (kind is ModelKind.VACE) or named != kind.transformer:
        raise ValueError(f"it is a {kind}, but its transformer is a {named}")
    if kind is not ModelKind.IMAGE and (has_image or extra):
        raise ValueError(f"its transformer expects an image beside its latents, which a {kind} does not give")
    if kind is ModelKind.IMAGE and not (has_image and extra):
        raise ValueError("it takes an image otherwise than Wan2.1's I2V, which is not supported yet")


def folder_digest(path: Path) -> str:
    """SHA-256 over names, sizes and content of the folder's files.

    Of a file above 64 MB count its name, its size, its first MB (for safetensors the header: every weight's
    name, type and place) and 62 MB more, in pieces of 1 MB spread evenly to its end.
    """
    digest = hashlib.sha256()
    for file in sorted(
        p for p in path.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors", ".model"}
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= _HASHED_WHOLE:
                digest.update(handle.read())
                continue
            for number in range(_SAMPLES):
                handle.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE))
    return f"sha256:{digest.hexdigest()[:16]}"
