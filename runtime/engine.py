"""The engine: load once, generate many.

Tensor legend: B batch, T text tokens, E text encoder channels, C latent channels, F latent frames, H, W
latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import SchedulerMixin

from runtime.configs import Config
from runtime.coordinator import Coordinator
from runtime.decode import decode_frames
from runtime.denoise import Denoising, StepRecord, denoise
from runtime.errors import BadRequestError
from runtime.guidance import LocalGuidance, NoGuidance
from runtime.presets import Preset, load_preset
from runtime.request import VideoRequest
from runtime.streams import Branch, ComputedStream, FeatureStream, Network, Stream
from runtime.video import FrameSink, to_uint8
from runtime.wan import WanAdapter
from runtime.weights import find_model, load_pipeline, pick_device
from spectrum import Schedule, StepKind


@dataclass(slots=True)
class Seconds:
    """Wall time of each phase."""

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    write: float = 0.0

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, phase, getattr(self, phase) + time.perf_counter() - started)


@dataclass(slots=True)
class Generation:
    """What one generation did; the frames themselves went to the sinks."""

    request: VideoRequest
    preset: Preset
    steps: list[StepRecord] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    computed: list[int] = field(default_factory=list)
    digest: str = ""
    forecaster_bytes: int = 0
    features_kept: int = 0
    frames_sha256: list[str] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        return len(self.computed)


@dataclass(frozen=True, slots=True)
class Plan:
    """A request with everything about it decided that can be decided before it runs."""

    request: VideoRequest
    preset: Preset
    sampler: SchedulerMixin
    schedule: Schedule

    @property
    def kinds(self) -> list[StepKind]:
        """The kind of every step, as far as it is known beforehand."""
        return [self.schedule.kind(step) for step in range(len(self.sampler.timesteps))]


class Engine:
    """A loaded model that serves requests one after another; each leaves it as it was.

    Args:
        config: which model, in which precision, on which device.

    Raises:
        BadRequestError: the model is not there, not whole or not supported.

    Example:
        >>> engine = Engine(load_config("wan-tiny"))
        >>> request = engine.config.request("a red circle moving left on a black background", seed=1)
        >>> with mp4_writer(Path("out.mp4"), width=96, height=96, fps=8) as sink:
        ...     generation = engine.generate(request, [sink])
    """

    def __init__(self, config: Config):
        self.config = config
        started = time.perf_counter()
        self.model = find_model(config)
        self._device = pick_device(config.device)
        self._pipeline = load_pipeline(self.model, config, self._device)
        self._adapter = WanAdapter(self._pipeline.transformer)
        self.load_seconds = time.perf_counter() - started

    def generate(
        self,
        request: VideoRequest,
        sinks: Sequence[FrameSink],
        on_step: Callable[[StepRecord], None] = lambda _: None,
    ) -> Generation:
        """Encode → denoise → decode → write.

        Args:
            request: what to make.
            sinks: one per video; their frames arrive in temporal order while later ones are still being
                decoded.
            on_step: called after every sampler step.

        Raises:
            BadRequestError: the request does not fit this model; nothing was started.
        """
        plan = self.plan(request)
        if len(sinks) != request.videos:
            raise ValueError(f"{request.videos} videos need as many sinks, got {len(sinks)}")
        generation = Generation(request, plan.preset)
        with generation.seconds.measure("encode"):
            embeddings = self._encode(request)
        with generation.seconds.measure("denoise"):
            latents_BCFHW = self._denoise(plan, embeddings, generation, on_step)
        self._decode(latents_BCFHW, sinks, generation)
        return generation

    def plan(self, request: VideoRequest) -> Plan:
        """Check a request against the model and decide its sampler and schedule; cheap, and starts nothing.

        Raises:
            BadRequestError: the request does not fit this model.
        """
        preset = load_preset(request.spectrum)
        self._check_size(request)
        sampler = type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config)
        sampler.set_timesteps(request.steps, device=self._device)
        sampler.set_begin_index(0)
        return Plan(request, preset, sampler, preset.schedule_of(len(sampler.timesteps)))

    def warm_up(self, request: VideoRequest) -> None:
        """Run the transformer once at this request's size, so that what a first forward sets up is set up."""
        once = self.plan(request.model_copy(update={"steps": 1, "spectrum": "off"}))
        self._denoise(once, self._encode(request), Generation(request, once.preset), lambda _: None)

    def _check_size(self, request: VideoRequest) -> None:
        """The video must fill whole tokens, and the rotary table must have a position for each."""
        pipeline, settings = self._pipeline, self._pipeline.transformer.config
        temporal, spatial = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
        latent = {
            "frames": (request.frames - 1) // temporal + 1,
            "height": request.height // spatial,
            "width": request.width // spatial,
        }
        for (name, size), patch in zip(latent.items(), settings.patch_size, strict=True):
            given = f"{name}: {getattr(request, name)} given; {self.model.name}"
            if size % patch:
                raise BadRequestError(f"{given} needs a multiple of {spatial * patch}")
            if size // patch > settings.rope_max_seq_len:
                raise BadRequestError(
                    f"{given} has positions for {settings.rope_max_seq_len} tokens along each axis, "
                    f"and this would be {size // patch}"
                )

    @torch.no_grad()
    def _encode(self, request: VideoRequest) -> list[torch.Tensor]:
        """Text embeddings `[B, T, E]` of each branch, the conditional first."""
        embeddings: tuple[torch.Tensor | None, ...] = self._pipeline.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative,
            do_classifier_free_guidance=request.guided,
            num_videos_per_prompt=request.videos,
            max_sequence_length=request.max_sequence_length,
            device=self._device,
        )
        return [e.to(self._adapter.dtype) for e in embeddings if e is not None]

    @torch.no_grad()
    def _denoise(
        self,
        plan: Plan,
        embeddings: list[torch.Tensor],
        generation: Generation,
        on_step: Callable[[StepRecord], None],
    ) -> torch.Tensor:
        """Latents `[B, C, F, H, W]`, float32, normalised per channel."""
        state = Denoising(self._noise(plan.request))
        network = Network(
            adapter=self._adapter,
            geometry=self._adapter.geometry(state.latents_BCFHW),
            branches=tuple(
                Branch(name, self._adapter.text(e))
                for name, e in zip(("cond", "uncond"), embeddings, strict=False)
            ),
            guidance=LocalGuidance(plan.request.guidance) if plan.request.guided else NoGuidance(),
        )
        stream = _open_stream(plan, network)
        coordinator = Coordinator(plan.schedule, self._identity(plan))
        for record in denoise(state, plan.sampler, stream, coordinator):
            generation.steps.append(record)
            on_step(record)
        generation.computed = coordinator.computed
        generation.digest = coordinator.digest
        generation.forecaster_bytes, generation.features_kept = stream.bytes, stream.kept
        return state.latents_BCFHW

    def _noise(self, request: VideoRequest) -> torch.Tensor:
        """Noise of the whole batch, drawn on the CPU so that a seed means the same video on every machine."""
        latents_BCFHW: torch.Tensor = self._pipeline.prepare_latents(
            request.videos,
            self._pipeline.transformer.config.in_channels,
            request.height,
            request.width,
            request.frames,
            torch.float32,
            self._device,
            torch.Generator("cpu").manual_seed(request.seed),
        )
        return latents_BCFHW

    def _identity(self, plan: Plan) -> str:
        """Everything that the result is a function of."""
        return json.dumps(
            {
                "request": plan.request.model_dump(),
                "preset": plan.preset.model_dump(),
                "model": self.model.revision,
                "dtype": self.config.dtype.model_dump(),
                "sampler": [type(plan.sampler).__name__, dict(plan.sampler.config)],
            },
            sort_keys=True,
            default=str,
        )

    def _decode(
        self, latents_BCFHW: torch.Tensor, sinks: Sequence[FrameSink], generation: Generation
    ) -> None:
        digests = [hashlib.sha256() for _ in sinks]
        chunks = decode_frames(self._pipeline.vae, latents_BCFHW)
        while True:
            with generation.seconds.measure("decode"):
                chunk_BTHW3 = next(chunks, None)
                if chunk_BTHW3 is None:
                    break
                videos = [to_uint8(frames_THW3) for frames_THW3 in chunk_BTHW3]
            with generation.seconds.measure("write"):
                for frames, sink, digest in zip(videos, sinks, digests, strict=True):
                    digest.update(frames.tobytes())
                    sink.write(frames)
        generation.frames_sha256 = [digest.hexdigest() for digest in digests]


def _open_stream(plan: Plan, network: Network) -> Stream:
    if not plan.preset.forecasts:
        return ComputedStream(network)
    return FeatureStream(network, plan.preset.predictor.build(len(plan.sampler.timesteps)))
