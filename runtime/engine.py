"""Engine: loads a model once and generates many videos. Every rank of a group has one, and all do the same.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial

import torch

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError, NotFiniteError
from runtime.forecasting.presets import Preset
from runtime.media.mp4 import FrameSink
from runtime.media.preview import PreviewSink
from runtime.models.family import Model
from runtime.models.loras import fit_on_all
from runtime.parallel.devices import device_name, pick_device
from runtime.parallel.kernels import USP, chosen_by_torch, resolve
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Degrees, Topology
from runtime.profile import ModelProfile
from runtime.recipe import Recipe
from runtime.request.config import Config, Lora
from runtime.request.video_request import VideoRequest
from runtime.sampling.batching import batches
from runtime.sampling.commands import Command, Commands
from runtime.sampling.decoding import write_frames
from runtime.sampling.denoise import OnStep
from runtime.sampling.estimate import OnEstimate
from runtime.sampling.finite import check_prompts, likely_cause
from runtime.sampling.inputs import Inputs
from runtime.sampling.memory import Need, Places, peak_of, shortage_explained
from runtime.sampling.noise import draw_noise
from runtime.sampling.plan import Plan
from runtime.sampling.prepare import build_networks
from runtime.sampling.previews import show_previews
from runtime.sampling.result import Result
from runtime.sampling.run import Run
from runtime.sampling.segments import denoise_segments
from runtime.versions import versions

OnLatents = Callable[[torch.Tensor], None]
"""Receives clean latents `[B, C, F, H, W]`, float32, normalised per channel."""


def forgotten(latents_BCFHW: torch.Tensor) -> None:
    """Keep no latents."""


class Engine:
    """A loaded model that serves requests one after another; none of them leaves a trace.

    A request becomes a `Plan`, in which everything is decided that can be before it runs. Each rank prepares
    a `Run` of the plan, which ends in a `Result`.

    Args:
        config: the model, its precision and its device.
        ranks: the ranks that share it; by default this process alone.
        degrees: degrees of parallelism; those left open are chosen for each request.

    Attributes:
        inputs: reads the input files of requests, such as images.
        places: where idle weights are, and what decides that if the config does not.

    Raises:
        BadRequestError: the model is missing, incomplete or not supported.
        RankFailedError: the ranks have different models or settings, or one has failed.

    Example:
        >>> from pathlib import Path
        >>> from runtime.media.mp4 import mp4_writer
        >>> from runtime.request.config import load_config
        >>> engine = Engine(load_config("wan-tiny"))
        >>> request = engine.config.request("a red circle moving left on a black background", seed=1)
        >>> with mp4_writer(Path("out.mp4"), width=96, height=96, fps=8) as sink:
        ...     result = engine.generate(request, [sink])
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, degrees: Degrees = Degrees()):  # noqa: B008
        self._commands: Commands | None = None
        self._previews: PreviewSink | None = None
        self.config = config
        self.ranks = ranks or Ranks.alone(pick_device(config.device))
        self.inputs, self.places = Inputs(self.ranks), Places(config.memory, self.ranks)
        self._degrees = degrees
        started = time.perf_counter()
        self.ranks.at("loading", busy=True)
        self.profile = self._read_profile()
        self.model, self.sizes = self.profile.folder, self.profile.sizes
        self.ranks.agree(
            {
                "config": config.model_dump(mode="json", exclude={"device"}),
                "model": self.model.revision,
                "degrees": asdict(degrees),
                "versions": {name: one for name, one in versions().items() if name != "python"},
            }
        )
        self.loaded = self._load()
        self.load_seconds = time.perf_counter() - started
        self.ranks.at("idle")

    def _read_profile(self) -> ModelProfile:
        return ModelProfile(self.config)

    def _load(self) -> Model:
        return self.profile.family.load(self.model, self.config, self.ranks)

    def switch(self, loras: Sequence[Lora]) -> None:
        """Have these LoRAs, and no others, in whatever is planned from now on. Every rank calls it.

        The files are checked. Weights change when a run is prepared: nothing is loaded again, and the result
        is that of an engine that was loaded with these LoRAs, to the bit.

        Args:
            loras: the LoRAs, in the order in which they are merged.

        Raises:
            BadRequestError: a file cannot be used; raised on every rank, and nothing has changed.
        """
        if loras or self.model.loras:
            self.profile = self.profile.with_loras(fit_on_all(self.model, loras, self.ranks))
            self.model, self.config = self.profile.folder, self.profile.config

    @property
    def _has_loras(self) -> bool:
        """Whether the LoRAs that `switch` was given, and no others, are merged."""
        return self.loaded.loras is None or self.loaded.loras.merged == self.model.revision

    def _merge(self) -> None:
        if self.loaded.loras is not None and not self._has_loras:
            self.loaded.loras.switch(self.model)

    def generate(
        self,
        request: VideoRequest,
        sinks: Sequence[FrameSink],
        on_step: OnStep = lambda _: None,
        checkpoints: Checkpoints | None = None,
    ) -> Result:
        """Plan a request and run the plan; see `run`. Every rank calls it with the same request.

        Raises:
            BadRequestError: the request does not fit this model; nothing was started.
            JobFailedError, CancelledError, RankFailedError: see `run`.
        """
        return self.run(self.plan(request), sinks, on_step, checkpoints)

    def run(
        self,
        plan: Plan,
        sinks: Sequence[FrameSink],
        on_step: OnStep = lambda _: None,
        checkpoints: Checkpoints | None = None,
        on_latents: OnLatents = forgotten,
    ) -> Result:
        """Run a plan: encode → denoise → decode → write. Every rank calls it with the same plan.

        Args:
            plan: what to make, as `plan` has decided it.
            sinks: on the first rank one per video; their frames arrive in temporal order while later ones are
                still being decoded. On the others none.
            on_step: called after every sampler step.
            checkpoints: where to keep the state, and whether to resume from what is there.
            on_latents: given the clean latents before they are decoded.

        Raises:
            BadRequestError: an input file cannot be used; nothing was started.
            JobFailedError: a checkpoint could not be written, memory ran out, or a step or a frame has NaN.
            CancelledError: `command` was told to end it.
            RankFailedError: another rank disagreed, or has failed.
        """
        videos = plan.request.videos
        if len(sinks) != (videos if self.ranks.is_leader else 0):
            raise ValueError(f"{videos} videos need as many sinks, got {len(sinks)}")
        result = Result(plan, fps=self.config.fps, memory=self.places.memory)
        with shortage_explained(self.ranks.device, _asked(plan.request)), self.commanded() as commands:
            if not self._has_loras:
                with result.seconds.measure("lora"):
                    self._merge()
            with result.seconds.measure("encode"):
                run = self.prepare(plan)
            result.recipe, result.warnings = run.recipe.digest, [*run.warnings]
            with result.seconds.measure("encode"):
                on_estimate = self._show_previews(result)
            with result.seconds.measure("denoise"):
                latents_BCFHW = self._denoise(run, result, on_step, checkpoints, commands, on_estimate)
            on_latents(latents_BCFHW)
            self.decode(latents_BCFHW, sinks, result)
            result.weight_bytes, result.device_peak = self.loaded.weight_bytes, peak_of(self.ranks.device)
            taken = self.ranks.device, self.loaded.dtype, self.sizes.architecture.head_dim
            result.performs, result.kernel = self.config.performs, chosen_by_torch(plan.attention, *taken)
            result.device, result.dtype = device_name(self.ranks.device), str(taken[1]).removeprefix("torch.")
            self.ranks.at("finishing", busy=True)
            return result

    def _denoise(
        self,
        run: Run,
        result: Result,
        on_step: OnStep,
        checkpoints: Checkpoints | None,
        commands: Commands,
        on_estimate: OnEstimate,
    ) -> torch.Tensor:
        try:
            return denoise_segments(self.ranks, run, result, on_step, checkpoints, commands, on_estimate)
        except NotFiniteError as error:
            transformers = {expert.name: expert.module for expert in self.loaded.experts}
            cause = likely_cause(transformers, self.config, self.ranks)
            raise NotFiniteError(f"{error}; {cause}") from None

    @torch.no_grad()
    def prepare(self, plan: Plan) -> Run:
        """Prepare a run: check that all ranks have the same plan, encode the prompt and draw the noise.

        Raises:
            BadRequestError: the image, the video to extend or a LoRA cannot be used; raised on every rank.
            RankFailedError: another rank has another plan, or has failed.
        """
        self.ranks.at("the start of a generation")
        self._merge()
        agreed = {
            "topology": str(plan.topology),
            "attention": plan.attention,
            "deadline": plan.request.deadline,
        }
        picture, digest = self.inputs.image(plan.request)
        before, known = self.inputs.extended(plan.request, self._shape_before(plan.request))
        recipe = self.profile.recipe(plan.request, plan.preset, digest, known)
        self.ranks.agree(recipe.parts | agreed)
        with self.ranks.busy("text encoding"):
            text = self.loaded.text.encode(plan.request)
        check_prompts(text, self.config)
        noise_BCFHW = draw_noise(self.sizes.shape(plan.request), plan.request.seed, self.ranks.device)
        window_BCFHW, image = noise_BCFHW[:, :, plan.windows.slice(0)], None
        if self.loaded.image is not None:
            seen = None if picture is None else picture.image
            with self.ranks.busy("image encoding"):
                image = self.loaded.image.encode(plan.request, seen, window_BCFHW)
        before_BCFHW = self.inputs.broadcast(before) if known else None
        group, heads = self.ranks.group(plan.topology), self.sizes.architecture.heads
        networks = build_networks(plan, self.loaded.experts, group, heads, window_BCFHW, text, image)
        storage = torch.device("cpu") if self.config.memory.history == "offload" else None
        warnings = [*self.loaded.text.warnings, *plan.topology.crossings(self.ranks.hosts)]
        if picture is not None:
            warnings += picture.warnings(plan.request.width, plan.request.height)
        return Run(plan, recipe, networks, noise_BCFHW, image, before_BCFHW, storage, tuple(warnings))

    def plan(self, request: VideoRequest, preset: Preset | None = None) -> Plan:
        """Check a request against the model and decide everything that can be decided before it runs.

        Args:
            preset: the request's preset, where it has been loaded already.

        Raises:
            BadRequestError: the request does not fit this model or these ranks.
        """
        request = request if preset else self.profile.decided(request)[0]
        preset = self.profile.check(request, preset)
        if request.extend is not None and self.loaded.image is None:
            raise BadRequestError(f"extend: {self.model.name} takes no latents to begin with")
        tokens, shape = self.sizes.tokens(self.config.windowed(request)), self.sizes.architecture
        topology = Topology.choose(
            self.ranks.size,
            heads=shape.heads,
            guided=request.guided,
            wanted=self._degrees,
            per_node=self.ranks.per_node,
        )
        topology.check(heads=shape.heads, tokens=tokens, guided=request.guided)
        batched = batches(self.config.performs.batch_guidance, request, shape, tokens, topology)
        self._check_room(request, request.videos * (1 + batched) * tokens // topology.sequence)
        attention = self._kernel(topology.ring)
        if attention == USP and any(expert.attention.joint for expert in self.loaded.experts):
            raise BadRequestError(f"attention: {USP!r} given; it does not split text from image tokens")
        sampler = partial(self.profile.fresh_sampler, request, self.ranks.device)
        windows, course = self.sizes.windows(request, self.config), self.profile.course(sampler(), preset)
        steps, fused = len(course.numbers), self.profile.fused(request, preset)
        return Plan(request, preset, sampler, steps, topology, attention, windows, course, fused, batched)

    def _check_room(self, request: VideoRequest, tokens: int) -> None:
        """Refuse a request that cannot fit the device; `tokens` is this rank's share, of all videos."""
        shape = self.sizes.architecture
        need = Need.of(
            math.prod(self.sizes.shape(request)),
            tokens,
            shape.heads * shape.head_dim,
            shape.ffn_dim,
            self.loaded.dtype.itemsize,
        )
        need.check(self.ranks.device, _asked(request))

    def _kernel(self, ring: int) -> str:
        """Resolve the name of the self-attention kernel."""
        return resolve(
            self.config.attention,
            self.ranks.device,
            self.loaded.dtype,
            ring=ring,
            fastest=self.config.performs.fastest_attention,
        )

    def warm_up(self, full: Plan) -> None:
        """Run one step at a plan's size, so that what a first forward sets up is not measured later.

        Args:
            full: plan without forecasts.
        """
        once = full.first_step()
        with self.commanded() as commands:
            denoise_segments(self.ranks, self.prepare(once), Result(once), commands=commands)

    def command(self, command: Command) -> bool:
        """Give a command to what runs; returns False if nothing does. Thread-safe and signal-safe.

        `STOP` ends the job after a step, with a checkpoint, and `CANCEL` before one: the first step that all
        ranks can agree on, of this generation or the job's next. After the last step both come too late, and
        the job is finished.
        """
        commands = self._commands
        if commands is None:
            return False
        commands.give(command)
        return True

    @property
    def commands(self) -> Commands:
        """Mailbox of the current `commanded` block; outside of one, a mailbox that stays empty."""
        return self._commands or Commands()

    @contextmanager
    def commanded(self) -> Iterator[Commands]:
        """Open a mailbox for `command` while the block runs. Nested blocks share it, as they are one job."""
        if self._commands is not None:
            yield self._commands
            return
        self._commands = Commands()
        try:
            yield self._commands
        finally:
            self._commands = None

    @contextmanager
    def previewed(self, previews: PreviewSink | None) -> Iterator[None]:
        """Let the first rank show previews of what is denoised while the block runs.

        After a computed step, if a preview is due, the sink is given the clean estimate of the current
        segment, in the colours that a linear map gives its latents. The frames stay the same, to the bit.

        Args:
            previews: receiver of previews; None for none. Other ranks do not use theirs.
        """
        before, self._previews = self._previews, previews if self.ranks.is_leader else None
        try:
            yield
        finally:
            self._previews = before

    def _show_previews(self, result: Result) -> OnEstimate:
        """Return what shows previews of a run, if any are wanted."""
        request = result.plan.request
        seconds = request.frames / self.config.fps / self.sizes.shape(request)[2]
        colours, name = self.loaded.colours, self.model.name
        return show_previews(self._previews, colours, seconds, result, self.ranks, name)

    def recipe(self, plan: Plan) -> Recipe:
        """Make the recipe of a plan: everything that its result is a function of. Collective.

        Raises:
            BadRequestError: the image or the video to extend cannot be used; raised on every rank.
        """
        _, image = self.inputs.image(plan.request)
        _, known = self.inputs.extended(plan.request, self._shape_before(plan.request))
        return self.profile.recipe(plan.request, plan.preset, image, known)

    def _shape_before(self, request: VideoRequest) -> tuple[int, ...]:
        """Shape of the latents of the video that a request extends; empty if it extends none."""
        if (before := request.extend) is None:
            return ()
        return self.sizes.shape(request.model_copy(update={"frames": before.frames}))

    @torch.no_grad()
    def decode(self, latents_BCFHW: torch.Tensor, sinks: Sequence[FrameSink], result: Result) -> None:
        """Decode denoised latents, the same on every rank, and write the frames into `sinks`; see `run`."""
        at = partial(self.ranks.at, "decoding")
        at(busy=True)
        with closing(self.loaded.decoder.frames(latents_BCFHW, at)) as chunks:
            write_frames(chunks, sinks, result, self.config, at)


def _asked(request: VideoRequest) -> str:
    videos = f", {request.videos} videos" if request.videos > 1 else ""
    return f"size {request.width}x{request.height}, {request.frames} frames{videos}"
