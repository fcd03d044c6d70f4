"""Models on disk: where they are, whether they are whole, and how they are loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, UMT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from runtime.configs import EMBEDDED_MODELS, Architecture, Config, Scheduler
from runtime.errors import BadRequestError

log = logging.getLogger(__name__)

_WEIGHTS = {  # component → stem of its weight file, as diffusers and transformers name it
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_HASHED_WHOLE = 64 * 2**20  # bytes; of larger files the revision takes in only the header and the size


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete model in diffusers layout on this machine.

    Attributes:
        name: what the user called it.
        path: the folder.
        revision: the repository's commit, or `sha256:…` over the folder's files.
    """

    name: str
    path: Path
    revision: str


def find_model(config: Config) -> ModelFolder:
    """Locate the config's model, fetching it if it is a repository, and check that its files are whole.

    Only headers and settings are read, so this is quick for any size of model.

    Raises:
        BadRequestError: there is no such model, it is not a text-to-video Wan, or a file is missing or
            corrupt.
    """
    local = find_local(config)
    path, commit = (local, None) if local else _download(config.model, config.revision)
    try:
        _check_folder(path, config.architecture)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadRequestError(f"model: {config.model!r} cannot be used: {error}") from None
    return ModelFolder(config.model, path, commit or _digest(path))


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


def _check_folder(path: Path, expected: Architecture | None) -> None:
    index = _read_json(path / "model_index.json")
    if index.get("_class_name") != "WanPipeline":
        raise ValueError(f"it is a {index.get('_class_name')}, only WanPipeline (text to video) is supported")
    if (index.get("transformer_2") or [None])[0] is not None:
        raise ValueError("it has two transformers (Wan2.2), which is not supported yet")
    _read_json(path / "scheduler" / "scheduler_config.json")
    tokenizer = path / "tokenizer"
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(f"{tokenizer}: holds neither tokenizer.json nor spiece.model")
    for component, stem in _WEIGHTS.items():
        _read_json(path / component / "config.json")
        for file in _weight_files(path / component, stem):
            _check_weights(file)
    transformer = _read_json(path / "transformer" / "config.json")
    if transformer.get("image_dim") is not None or transformer.get("in_channels") != transformer.get(
        "out_channels"
    ):
        raise ValueError("its transformer expects an image (I2V or VACE), which is not supported yet")
    if expected is not None:
        found = Architecture(
            layers=transformer.get("num_layers", 0),
            heads=transformer.get("num_attention_heads", 0),
            head_dim=transformer.get("attention_head_dim", 0),
            ffn_dim=transformer.get("ffn_dim", 0),
        )
        if found != expected:
            raise ValueError(f"its transformer has {found}, but the config expects {expected}")


def _read_json(path: Path) -> dict[str, Any]:
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
        return [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
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


def load_pipeline(folder: ModelFolder, config: Config, device: torch.device) -> WanPipeline:
    """Load every component in its configured dtype, straight from disk to `device`.

    The pipeline is only a container here: its prompt encoding, noise and scheduler are used, its loop is not.

    Raises:
        BadRequestError: the weights do not fit the configuration beside them.
    """
    path = folder.path
    disable_progress_bar()  # loading is one phase of ours, with its own line
    text_encoder, text_info = UMT5EncoderModel.from_pretrained(
        path / "text_encoder", dtype=config.dtype.of("text_encoder"), output_loading_info=True
    )
    transformer, transformer_info = WanTransformer3DModel.from_pretrained(
        path / "transformer", dtype=config.dtype.of("transformer"), output_loading_info=True
    )
    vae, vae_info = AutoencoderKLWan.from_pretrained(
        path / "vae", dtype=config.dtype.of("vae"), output_loading_info=True
    )
    for component, info in (
        ("text_encoder", text_info),
        ("transformer", transformer_info),
        ("vae", vae_info),
    ):
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise BadRequestError(
                f"model: {folder.name!r} cannot be used: {path / component} lacks {len(missing)} weights, "
                f"the first is {missing[0]}"
            )
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(path / "tokenizer"),
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=load_scheduler(folder, config.scheduler),
    )
    pipeline.to(device)
    log.info("loaded %s (%s) on %s", folder.name, folder.revision, device)
    return pipeline


def load_scheduler(folder: ModelFolder, choice: Scheduler) -> SchedulerMixin:
    """The sampler of `choice`, configured for flow matching from the model's own settings."""
    settings = _read_json(folder.path / "scheduler" / "scheduler_config.json")
    shift = choice.shift or settings.get("flow_shift") or settings.get("shift") or 1.0
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    match choice.kind:
        case "unipc":
            return UniPCMultistepScheduler.from_config({**_shared(settings), **flow})
        case "dpm++":
            return DPMSolverMultistepScheduler.from_config(
                {**_shared(settings), **flow, "algorithm_type": "dpmsolver++"}
            )
        case "euler":
            return FlowMatchEulerDiscreteScheduler.from_config({**_shared(settings), "shift": shift})
        case _:
            import diffusers

            kind = getattr(diffusers, str(settings.get("_class_name")), None)
            if kind is None:
                raise BadRequestError(
                    f"model: {folder.name!r} cannot be used: unknown scheduler {settings.get('_class_name')}"
                )
            own_shift = {} if choice.shift is None else {"flow_shift": shift, "shift": shift}
            return kind.from_config({**settings, **own_shift})


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that mean the same to every sampler."""
    return {key: settings[key] for key in ("num_train_timesteps",) if key in settings}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the current accelerator, or the CPU where there is none.

    Raises:
        BadRequestError: there is no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequestError(
            f"device: {name!r} given; it must be auto, cpu, or such as cuda or cuda:1"
        ) from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
    if (device.index or 0) >= count:
        raise BadRequestError(f"device: {name!r} given; this machine has {count} {device.type} devices")
    return device
