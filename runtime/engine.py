"""The engine: load once, generate many. Every rank of a group has one, and all do the same.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from runtime.attention import Attend, SelfAttention, attend
from runtime.checkpoint import Checkpoints
from runtime.configs import Config
from runtime.coordinator import Command, Coordinator
from runtime.decode import decode_frames
from runtime.denoise import Denoising, StepRecord, denoise
from runtime.devices import pick_device
from runtime.errors import BadRequestError, CancelledError
from runtime.kernels import USP, find_kernel, resolve
from runtime.loading import load_transformer, load_vae
from runtime.presets import Preset, load_preset
from runtime.ranks import RankGroup, Ranks
from runtime.request import BRANCHES, VideoRequest
from runtime.resume import Progress, Resumable
from runtime.sampler import load_scheduler
from runtime.streams import Branch, ComputedStream, FeatureStream, Network, Stream
from runtime.text import PromptEncoder
from runtime.topology import Degrees, Topology
from runtime.video import FrameSink, to_uint8
from runtime.wan import WanAdapter
from runtime.weights import find_model
from spectrum import Schedule, StepKind


@dataclass(slots=True)
class Seconds:
    """Wall time of each phase on this rank."""

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
    """What one generation did; the frames themselves went to the sinks.

    Attributes:
        steps: in order; times are this rank's.
        computed: branch → its computed steps.
        errors: step → relative error that forecasts of a computed step would have had, over all ranks and
            branches.
        digests: of the decisions, one per rank.
        sent: bytes that all ranks together moved at each step.
        resumed_at: first step that was not taken from a checkpoint.
        checkpoint_bytes: written by this rank.
        forecaster_bytes: the most that any rank held for forecasting.
        features_kept: values remembered per branch.
        frames_sha256: of each video's frames, on the first rank.
    """

    request: VideoRequest
    preset: Preset
    topology: Topology
    attention: str
    steps: list[StepRecord] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    computed: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    resumed_at: int = 0
    checkpoint_bytes: int = 0
    forecaster_bytes: int = 0
    features_kept: int = 0
    frames_sha256: list[str] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        """Evaluations of the branch that has the most."""
        return max(len(steps) for steps in self.computed.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """A request with everything about it decided that can be decided before it runs.

    Attributes:
        schedules: branch → which of its steps are computed.
        attention: resolved name of the self-attention's kernel.
    """

    request: VideoRequest
    preset: Preset
    sampler: SchedulerMixin
    schedules: dict[str, Schedule]
    topology: Topology
    attention: str

    @property
    def kinds(self) -> list[StepKind]:
        """The kind of every step, as far as it is known beforehand."""
        return self.preset.expected_kinds(len(self.sampler.timesteps))


class Engine:
    """A loaded model that serves requests one after another; each leaves it as it was.

    Args:
        config: which model, in which precision, on which device.
        ranks: the ranks that share it; by default this process alone.
        degrees: how they are to be arranged; what is left open is chosen for each request.

    Raises:
        BadRequestError: the model is not there, not whole or not supported.
        RankFailedError: the ranks were not given the same, or one has failed.

    Example:
        >>> engine = Engine(load_config("wan-tiny"))
        >>> request = engine.config.request("a red circle moving left on a black background", seed=1)
        >>> with mp4_writer(Path("out.mp4"), width=96, height=96, fps=8) as sink:
        ...     generation = engine.generate(request, [sink])
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, degrees: Degrees = Degrees()):  # noqa: B008
        self.config = config
        self.ranks = ranks or Ranks.alone(pick_device(config.device))
        self._degrees = degrees
        started = time.perf_counter()
        self.ranks.at("loading", busy=True)
        self.model = find_model(config)
        self.ranks.agree(
            {
                "config": config.model_dump(mode="json", exclude={"device"}),
                "model": self.model.revision,
                "degrees": asdict(degrees),
                "torch": torch.__version__,
            }
        )
        self._scheduler = load_scheduler(self.model, config.scheduler)
        self._transformer = load_transformer(self.model, config, self.ranks)
        self._attention = SelfAttention(self._transformer)
        self._adapter = WanAdapter(self._transformer)
        self._text = PromptEncoder(self.model, config, self.ranks, self._adapter.dtype)
        self._vae_settings = AutoencoderKLWan.load_config(self.model.path / "vae")
        self._vae = load_vae(self.model, config, self.ranks)
        self._coordinator: Coordinator | None = None
        self.load_seconds = time.perf_counter() - started

    def generate(
        self,
        request: VideoRequest,
        sinks: Sequence[FrameSink],
        on_step: Callable[[StepRecord], None] = lambda _: None,
        checkpoints: Checkpoints | None = None,
    ) -> Generation:
        """Encode → denoise → decode → write. Every rank calls it with the same request.

        Args:
            request: what to make.
            sinks: on the first rank one per video; their frames arrive in temporal order while later ones are
                still being decoded. On the others none.
            on_step: called after every sampler step.
            checkpoints: where to keep the state, and whether to go on from what is there.

        Raises:
            BadRequestError: the request does not fit this model; nothing was started.
            JobFailedError: a checkpoint could not be written.
            CancelledError: `command` was told to end it.
            RankFailedError: another rank disagreed, or has failed.
        """
        plan = self.plan(request)
        if len(sinks) != (request.videos if self.ranks.leads else 0):
            raise ValueError(f"{request.videos} videos need as many sinks, got {len(sinks)}")
        generation = Generation(request, plan.preset, plan.topology, plan.attention)
        self.ranks.at("the start of a generation")
        self.ranks.agree(self._identity(plan) | {"topology": str(plan.topology), "attention": plan.attention})
        with generation.seconds.measure("encode"):
            self.ranks.at("text encoding", busy=True)
            embeddings = self._text.encode(request)
        with generation.seconds.measure("denoise"):
            latents_BCFHW = self._denoise(plan, embeddings, generation, on_step, checkpoints)
        self._decode(latents_BCFHW, sinks, generation)
        self.ranks.at("finishing", busy=True)
        return generation

    def plan(self, request: VideoRequest) -> Plan:
        """Check a request against the model and decide all that can be; cheap, and starts nothing.

        Raises:
            BadRequestError: the request does not fit this model or these ranks.
        """
        preset = load_preset(request.spectrum)
        tokens = self._count_tokens(request)
        heads = self._transformer.config.num_attention_heads
        topology = Topology.choose(
            self.ranks.size,
            heads=heads,
            guided=request.guided,
            wanted=self._degrees,
            per_node=self.ranks.node.size,
        )
        topology.check(heads=heads, tokens=tokens, guided=request.guided)
        attention = resolve(self.config.attention, self.ranks.device, self._adapter.dtype, ring=topology.ring)
        sampler = type(self._scheduler).from_config(self._scheduler.config)
        sampler.set_timesteps(request.steps, device=self.ranks.device)
        sampler.set_begin_index(0)
        schedules = preset.schedules_of(len(sampler.timesteps), request.branches)
        return Plan(request, preset, sampler, schedules, topology, attention)

    def warm_up(self, request: VideoRequest) -> None:
        """Run the transformer once at this request's size, so that what a first forward sets up is set up."""
        once = self.plan(request.model_copy(update={"steps": 1, "spectrum": "off"}))
        generation = Generation(request, once.preset, once.topology, once.attention)
        self._denoise(once, self._text.encode(request), generation, lambda _: None)

    def command(self, command: Command) -> bool:
        """Ask the generation that is being denoised for `command`; False if there is none. For signals."""
        if self._coordinator is None:
            return False
        self._coordinator.command(command)
        return True

    def _count_tokens(self, request: VideoRequest) -> int:
        """Tokens of one video; it must fill whole ones, and there must be a position for each."""
        settings, spatial = self._transformer.config, self._vae_settings["scale_factor_spatial"]
        tokens = 1
        for name, size, patch in zip(
            ("frames", "height", "width"), self._latent_size(request), settings.patch_size, strict=True
        ):
            given = f"{name}: {getattr(request, name)} given; {self.model.name}"
            if size % patch:
                raise BadRequestError(f"{given} needs a multiple of {spatial * patch}")
            if size // patch > settings.rope_max_seq_len:
                raise BadRequestError(
                    f"{given} has positions for {settings.rope_max_seq_len} tokens along each axis, "
                    f"and this would be {size // patch}"
                )
            tokens *= size // patch
        return tokens

    def _latent_size(self, request: VideoRequest) -> tuple[int, int, int]:
        temporal = self._vae_settings["scale_factor_temporal"]
        spatial = self._vae_settings["scale_factor_spatial"]
        return (request.frames - 1) // temporal + 1, request.height // spatial, request.width // spatial

    @torch.no_grad()
    def _denoise(
        self,
        plan: Plan,
        embeddings: list[torch.Tensor],
        generation: Generation,
        on_step: Callable[[StepRecord], None],
        checkpoints: Checkpoints | None = None,
    ) -> torch.Tensor:
        """Latents `[B, C, F, H, W]`, float32, normalised per channel, the same on every rank."""
        state = Denoising(self._noise(plan.request))
        network = self._network(plan, state.latents_BCFHW, embeddings)
        stream = _open_stream(plan, network)
        identity = json.dumps(self._identity(plan), sort_keys=True)
        coordinator = Coordinator(plan.schedules, identity, self.ranks)
        progress = Progress(state, plan.sampler, stream, coordinator, generation.steps)
        mine = tuple(branch.name for branch in network.branches)
        resumable = Resumable(progress, checkpoints, identity, plan.topology, self.ranks, mine)
        start = resumable.begin()
        self._coordinator = coordinator
        try:
            for record in denoise(state, plan.sampler, stream, coordinator, self.ranks, start):
                generation.steps.append(record)
                resumable.after(record)
                on_step(record)
        except CancelledError:
            resumable.finish()
            raise
        finally:
            self._coordinator = None
        generation.resumed_at = start
        generation.checkpoint_bytes = resumable.finish()
        generation.computed = {branch: coordinator.computed(branch) for branch in BRANCHES}
        generation.errors, generation.digests = coordinator.errors, coordinator.digests
        own = {"sent": [s.sent for s in generation.steps], "bytes": stream.bytes, "kept": stream.kept}
        told = self.ranks.control.tell(own)
        generation.sent = [sum(sent) for sent in zip(*(one["sent"] for one in told), strict=True)]
        generation.forecaster_bytes = max(one["bytes"] for one in told)
        generation.features_kept = max(one["kept"] for one in told)
        return state.latents_BCFHW

    def _network(self, plan: Plan, latents_BCFHW: torch.Tensor, embeddings: list[torch.Tensor]) -> Network:
        """The transformer as this rank runs it."""
        group = self.ranks.group(plan.topology)
        geometry = self._adapter.geometry(latents_BCFHW)
        branches = tuple(
            Branch(name, self._adapter.text(embedding))
            for name, embedding in zip(BRANCHES, embeddings, strict=False)
        )
        self._use_attention(plan, group, geometry.grid.tokens)
        return Network(
            adapter=self._adapter,
            geometry=geometry,
            branches=group.branches(branches),
            guidance=group.guidance(plan.request.guidance if plan.request.guided else None),
            sequence=group.sequence(geometry.grid.tokens),
        )

    def _use_attention(self, plan: Plan, group: RankGroup, tokens: int) -> None:
        """With whole sequences and torch's own choice of kernel, the model's attention stays as it came."""
        if plan.topology.sequence == 1 and plan.attention == "sdpa":
            self._attention.restore()
            return
        place = group.attention(tokens, self._transformer.config.num_attention_heads)
        split: Attend
        if plan.attention == USP:
            from runtime.xfuser_usp import UspAttention

            split = UspAttention(plan.topology, place)
        else:
            split = partial(attend, group=place, kernel=find_kernel(plan.attention))
        self._attention.split(split)

    def _noise(self, request: VideoRequest) -> torch.Tensor:
        """Noise of the whole batch, drawn on the CPU so that a seed means the same video on every machine."""
        channels = self._transformer.config.in_channels
        noise_BCFHW: torch.Tensor = randn_tensor(
            (request.videos, channels, *self._latent_size(request)),
            generator=torch.Generator("cpu").manual_seed(request.seed),
            device=self.ranks.device,
            dtype=torch.float32,
        )
        return noise_BCFHW

    def _identity(self, plan: Plan) -> dict[str, Any]:
        """Everything that the result is a function of, as JSON."""
        identity = {
            "request": plan.request.model_dump(exclude={"spectrum"}),  # a name; this is what it stands for:
            "preset": plan.preset.model_dump(),
            "model": self.model.revision,
            "dtype": self.config.dtype.model_dump(),
            "sampler": {"kind": type(plan.sampler).__name__, **plan.sampler.config},
        }
        return dict(json.loads(json.dumps(identity, default=str)))

    def _decode(
        self, latents_BCFHW: torch.Tensor, sinks: Sequence[FrameSink], generation: Generation
    ) -> None:
        if self._vae is not None:
            self._vae.to(self.ranks.device)
        digests = [hashlib.sha256() for _ in sinks]
        chunks = decode_frames(self._vae, latents_BCFHW, self.config.tiles, self.ranks.everyone)
        self.ranks.at("decoding", busy=self.config.tiles is None)
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
        if self._vae is not None and self.config.memory.vae == "offload":
            self._vae.to("cpu")
        generation.frames_sha256 = [digest.hexdigest() for digest in digests]


def _open_stream(plan: Plan, network: Network) -> Stream:
    if not plan.preset.forecasts:
        return ComputedStream(network)
    return FeatureStream(network, plan.preset.predictor.build(len(plan.sampler.timesteps)))
