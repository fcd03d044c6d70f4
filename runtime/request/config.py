"""Configs: one YAML file per model and resolution, and the location of the shipped ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from runtime.errors import BadRequestError
from runtime.files.kinds import check_kind_of_file
from runtime.files.problems import nearest
from runtime.files.text import beside, is_file, user_path
from runtime.files.yaml import YamlFile
from runtime.request.bounds import NUMBER, Bounds
from runtime.request.memory import Memory
from runtime.request.performance import PROFILES, BatchGuidance, Performance, Profile, Quantization
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import (
    FileName,
    FrameCount,
    Guidance,
    Pixels,
    StepCount,
    Text,
    TextTokens,
    VideoRequest,
)

if TYPE_CHECKING:  # it takes seconds
    import torch

DEFAULT = "wan-tiny"
"""Name of the config that is used if neither a config nor a model is given."""

_HERE = Path(__file__).resolve().parent.parent
EMBEDDED_MODELS = _HERE / "models"

AUTO = "auto"
"""In place of a preset's name: which one suits a request is decided for it; see `forecasting.usual`."""

_Dtype = Literal["float32", "bfloat16", "float16"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dtypes(_Part):
    """Precision of each component.

    Attributes:
        transformer: what its weights are kept in.
        compute: what its steps compute in; by default what its weights are kept in.
    """

    transformer: _Dtype = "bfloat16"
    compute: _Dtype | None = None
    text_encoder: _Dtype = "bfloat16"
    vae: _Dtype = "float32"
    image_encoder: _Dtype = "float32"

    def of(self, component: Literal["transformer", "text_encoder", "vae", "image_encoder"]) -> torch.dtype:
        return _dtype(getattr(self, component))

    @property
    def computed(self) -> torch.dtype:
        """Compute dtype of the transformer."""
        return _dtype(self.compute or self.transformer)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class ModelFiles(_Part):
    """A model whose components are named one by one, in any layout that is read: docs/models.md.

    Attributes:
        transformer: file of its transformer; of two experts, the one for high noise.
        transformer_2: file of the expert for low noise.
        vae, text_encoder, image_encoder: files of these components.
        tokenizer: folder or file of the tokenizer; not needed if the text encoder's file holds it.
    """

    transformer: FileName
    transformer_2: FileName | None = None
    vae: FileName
    text_encoder: FileName
    image_encoder: FileName | None = None
    tokenizer: FileName | None = None

    @property
    def named(self) -> dict[str, str]:
        """Component → its file, of those that are named."""
        return {name: file for name, file in self.model_dump().items() if file is not None}

    def beside(self, folder: Path) -> Self:
        """Copy with absolute paths; they are relative to `folder`."""
        return self.model_copy(update={name: beside(file, folder) for name, file in self.named.items()})

    def __str__(self) -> str:
        return self.transformer


def _form(given: Any) -> str:
    return "<files>" if isinstance(given, dict | ModelFiles) else "<name>"


ModelName = Annotated[
    Annotated[FileName, Tag("<name>")] | Annotated[ModelFiles, Tag("<files>")], Discriminator(_form)
]


class Defaults(_Part):
    """Default values of a request's fields; see `VideoRequest`."""

    width: Pixels
    height: Pixels
    frames: FrameCount
    steps: StepCount = 50
    guidance: Guidance = 5.0
    guidance_2: Guidance | None = None
    negative: Text = ""
    max_sequence_length: TextTokens = 512
    spectrum: FileName = AUTO


class Architecture(_Part):
    """Shape of the transformer, stated so that topologies and costs are known without its weights."""

    layers: Annotated[int, Field(ge=1, le=10_000), NUMBER]
    heads: Annotated[int, Field(ge=1, le=10_000), NUMBER]
    head_dim: Annotated[int, Field(ge=1, le=10_000), NUMBER]
    ffn_dim: Annotated[int, Field(ge=1, le=10_000_000), NUMBER]


class Tiles(_Part):
    """Spatial tiles of VAE decoding, in pixels, shared by the ranks; they overlap by size − stride."""

    size: Annotated[int, Field(ge=16, le=8192, multiple_of=8), NUMBER] = 256
    stride: Annotated[int, Field(ge=8, le=8192, multiple_of=8), NUMBER] = 192

    @model_validator(mode="after")
    def _overlap(self) -> Self:
        if self.stride > self.size:
            raise ValueError(f"stride {self.stride} must not be above size {self.size}")
        return self


Decoding = Literal["whole", "tiles", "halo", "auto"]


class Window(_Part):
    """Number of frames that the model sees at a time: a longer video is made of overlapping windows."""

    frames: Annotated[int, Field(ge=2, le=4001), NUMBER]
    overlap: Annotated[int, Field(ge=1, le=4000), NUMBER]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.overlap >= self.frames - 1:
            raise ValueError(f"overlap {self.overlap} must be less than frames {self.frames} - 1")
        return self


class Lora(_Part):
    """LoRA weights that are merged into a transformer when it is loaded, or later for another request.

    Attributes:
        file: the safetensors file.
        scale: factor of its weights.
        expert: of two transformers, the one for `high` or for `low` noise; None for both.
    """

    file: FileName
    scale: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False), NUMBER] = 1.0
    expert: Literal["high", "low"] | None = None


def _many(given: Any) -> Any:
    """Convert a single value, or null, to a list."""
    if given is None:
        return ()
    return given if isinstance(given, list | tuple) else (given,)


Loras = Annotated[tuple[Lora, ...], BeforeValidator(_many)]


class Config(_Part):
    """A model and the settings that it is run with.

    Attributes:
        model: an embedded model's name, a folder in diffusers layout or that of Wan's own repositories, a
            Hugging Face repository, or the files of its components. Files and folders that the config names
            are relative to its own folder, and `~` is the user's home.
        revision: commit or tag of the repository; None for a folder.
        lora: one LoRA or a list, merged into the transformer in this order when it is loaded.
        architecture: expected shape of the transformers; a model that differs is refused.
        bounds: what the model can make; by default what Wan's family can. A model whose family cannot make
            all of it is refused.
        dtype: precision of each component.
        scheduler: the sampler.
        device: `auto` is the accelerator if there is one.
        attention: kernel of the self-attention; see `runtime.parallel.kernels.resolve`.
        performance: profile that the next six fields, and `attention: auto`, follow: `exact` computes what
            diffusers does, `fast` differs from it by rounding, and `fastest` by quantisation as well.
        compile: compile each transformer block with `torch.compile`; by default as the profile says.
        fuse_projections: compute query, key and value in one matrix product; by default as the profile says.
        fuse_forecasts: take a run of forecast steps of a guided stream, and the sampler's with them, as one
            weighted sum; by default as the profile says.
        batch_guidance: evaluate both branches of guidance as one batch: `never`, `always`, or `auto`, if that
            is expected to be faster; by default as the profile says.
        overlap_exchanges: send values and keys to the other ranks while what follows is computed.
        quantization: number format of the blocks' linear layers; by default as the profile says.
        memory: location of weights and histories while they are not in use.
        decode: what the VAE decodes on which ranks: `whole` frames on the first; `tiles`, shared by all;
            strips of whole frames on all, each with its neighbours' rows (`halo`), which also encode images;
            or `auto`. By default tiles if there are any, else whole frames.
        tiles: tiles of VAE decoding.
        window: window of longer videos; None evaluates any video as a whole.
        busy_timeout: limit in seconds for a single long task of a rank that the others wait for: loading,
            encoding, decoding a part of the frames, writing.
        fps: frames per second of the mp4.
        defaults: default values of a request's fields.
    """

    model: ModelName
    revision: FileName | None = None
    lora: Loras = ()
    architecture: Architecture | None = None
    bounds: Bounds = Bounds()
    dtype: Dtypes = Dtypes()
    scheduler: SamplerConfig = SamplerConfig()
    device: FileName = "auto"
    attention: FileName = "auto"
    performance: Profile = "exact"
    compile: bool | None = None
    fuse_projections: bool | None = None
    fuse_forecasts: bool | None = None
    batch_guidance: BatchGuidance | None = None
    overlap_exchanges: bool | None = None
    quantization: Quantization | None = None
    memory: Memory = Memory()
    decode: Decoding | None = None
    tiles: Tiles | None = None
    window: Window | None = None
    busy_timeout: Annotated[float, Field(ge=1, le=7 * 86400, allow_inf_nan=False), NUMBER] = 1800.0
    fps: Annotated[int, Field(ge=1, le=240), NUMBER] = 16
    defaults: Defaults

    @model_validator(mode="after")
    def _as_many_steps_as_listed(self) -> Self:
        try:
            self.scheduler.check_steps(self.defaults.steps)
        except ValueError as error:
            raise ValueError(f"defaults.{error}") from None
        return self

    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        self.bounds.check(self.defaults.model_dump(), ("defaults",))
        window, step = self.window, self.bounds.frames
        if window is not None and ((window.frames - 1) % step or window.overlap % step):
            raise ValueError(
                f"window.frames {window.frames} must be {self.bounds.frame_rule}, "
                f"and window.overlap {window.overlap} a multiple of {step}"
            )
        return self

    @property
    def model_name(self) -> str:
        """Name of the model, for messages and reports."""
        return str(self.model)

    @property
    def decoding(self) -> Decoding:
        """What the VAE decodes: see `decode`."""
        return self.decode or ("whole" if self.tiles is None else "tiles")

    @property
    def performs(self) -> Performance:
        """What makes its steps faster: the profile, with what this config says otherwise."""
        given = {
            "compile": self.compile,
            "fuse_projections": self.fuse_projections,
            "fuse_forecasts": self.fuse_forecasts,
            "batch_guidance": self.batch_guidance,
            "overlap_exchanges": self.overlap_exchanges,
            "quantization": self.quantization,
        }
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(PROFILES[self.performance], **said)

    def windowed(self, request: VideoRequest) -> VideoRequest:
        """Request for one window: the part of a request that the model sees at a time."""
        if self.window is None or request.frames <= self.window.frames:
            return request
        return request.model_copy(update={"frames": self.window.frames})

    def request(self, prompt: str, **given: Any) -> VideoRequest:
        """Make a request for `prompt` from the fields given and this config's defaults.

        Raises:
            BadRequestError: a field is unknown or out of its bounds, prompts change within one window, or the
                sampler's list has another number of steps.
        """
        request = VideoRequest.parse(self.bounds, **{**self.defaults.model_dump(), **given, "prompt": prompt})
        try:
            self.scheduler.check_steps(request.steps)
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        if request.travel and self.windowed(request) is request:
            seen = "any length" if self.window is None else f"{self.window.frames} frames"
            later = "1 later prompt" if len(request.travel) == 1 else f"{len(request.travel)} later prompts"
            raise BadRequestError(
                f"travel: {later} given; the model takes one prompt for {seen}, "
                f"and the video has {request.frames} frames: make it longer, or make two shots"
            )
        return request


def load_config(name: str) -> Config:
    """Load the config called `name` in `configs/`, or the one in the YAML file `name`.

    It must state the size of its videos; `runtime.models.configs.open_config` takes what is missing from the
    config that is usual for the model.

    Raises:
        BadRequestError: there is none, or it is not valid; the message lists the configs that exist.
    """
    from runtime.request.config_file import ConfigFile  # which makes a `Config`

    return ConfigFile.read(name).config()


def is_embedded(model: str | ModelFiles) -> bool:
    """Return whether a model comes with Lockstep."""
    return model in embedded_models()


def embedded_models() -> list[str]:
    """Names of the models that come with Lockstep."""
    return sorted(path.parent.name for path in EMBEDDED_MODELS.glob("*/model_index.json"))


def available(folder: str, kind: str = "yaml") -> list[str]:
    """Names of the shipped files with suffix `kind` in `configs/<folder>`."""
    return sorted(path.stem for path in shipped(folder).glob(f"*.{kind}"))


def shipped(*parts: str) -> Path:
    """Path in `configs/`, which lies inside the package in a wheel, and beside it in a checkout."""
    packaged = _HERE / "_configs"
    return (packaged if packaged.is_dir() else _HERE.parent / "configs").joinpath(*parts)


def is_path(name: str) -> bool:
    """Return whether a config or preset is given as a path, not as the name of a shipped one."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def open_yaml(name: str, *, folder: str, field: str) -> YamlFile:
    """Read a shipped YAML file, given by name, or a user's, given by path.

    Raises:
        BadRequestError: no such file, or not YAML.
    """
    if is_path(name):
        return YamlFile.read(user_path(name), field)
    known = available(folder)
    if name not in known:
        _check_file(name, field)
        kind = "preset" if field == "spectrum" else field
        raise BadRequestError(
            f"{field}: {name!r} given; there is no such {kind}, it must be one of {', '.join(known)}, "
            f"or the path of a YAML file{nearest(name, known)}"
        )
    return YamlFile.read(shipped(folder, f"{name}.yaml"), field)


def _check_file(name: str, field: str) -> None:
    """Refuse a file whose name is not that of a YAML file, with what it is."""
    path = user_path(name)
    if not is_file(path):
        return
    check_kind_of_file(path, field)
    raise BadRequestError(f"{field}: {name!r} given; to give the file of this name, write ./{name}")
