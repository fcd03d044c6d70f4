"""Options of a job as a user gives them, on the command line or in a message to a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError, setting
from runtime.files.checks import check_apart
from runtime.files.problems import explain
from runtime.jobs.defaults import CHECKPOINT_EVERY
from runtime.jobs.job import Job
from runtime.media.latents import continuing
from runtime.models.configs import open_config
from runtime.models.folder import local_revision
from runtime.models.loras import check_lora_file
from runtime.parallel.topology import Degrees
from runtime.request.bounds import NUMBER
from runtime.request.config import Config, Loras, is_path
from runtime.request.outputs import Outputs
from runtime.request.performance import Profile, Quantization
from runtime.request.video_request import (
    Deadline,
    FileName,
    FrameCount,
    Guidance,
    Pixels,
    Prompt,
    Seed,
    StepCount,
    Text,
    TextTokens,
    VideoCount,
    VideoRequest,
    Waypoints,
)

_Degree = Annotated[int, Field(ge=1, le=65536), NUMBER]
_Timeout = Annotated[float, Field(ge=1, le=7 * 86400, allow_inf_nan=False), NUMBER]
_Every = Annotated[int, Field(ge=0, le=1_000_000), NUMBER]


class JobOptions(BaseModel):
    """Options of one job. What is None is left to the config, or chosen.

    Example:
        >>> options = JobOptions.parse(prompt="a red circle", config="wan-tiny", seed=7, out=Path("a.mp4"))
        >>> job = options.job()  # every name is resolved, and what is wrong is refused
        >>> job.check_files()  # where the files will be written
        >>> from runtime.engine import Engine
        >>> from runtime.jobs.run import run_job
        >>> report = run_job(Engine(job.config), job)

        A job that other processes run is submitted as `queue.submit(job.absolute().planned())`. Who has a
        `Config` and a `VideoRequest` already builds the job from them, with `Job.build`.

    Attributes:
        config: name of a shipped config, or path of a YAML file; by default what is usual for `model`.
        model: folder or repository of a model that replaces the config's.
        revision: commit or tag of the repository.
        extend: latents of a finished video that this one goes on with; `frames` counts both.
        prompt, image, travel, negative, width, height, frames, steps, guidance, guidance_2, seed,
            max_sequence_length, videos, spectrum, deadline: fields of the request; see `VideoRequest`.
        out: the mp4.
        report: the JSON report; by default beside the mp4.
        preview: the WebP that shows what the video is becoming; by default none.
        latents: the safetensors file of clean latents, which `extend` takes; by default none.
        overwrite: whether existing files may be replaced.
        compare: also run the full sampler, and measure the quality against it.
        ranks: number of ranks; by default as many as the degrees need.
        ulysses, ring, cfg: degrees of parallelism; see `Topology`.
        lora, attention, performance, compile, quantization, busy_timeout: replace those of the config; see
            `Config`.
        shard: whether to shard the transformer's weights over the ranks, or to replicate them.
        offload: whether to offload the transformer's blocks to host memory.
        timeout: seconds within which the failure of one rank ends all.
        checkpoints: folder in which the job's checkpoints get a subfolder; by default they are beside `out`.
        checkpoint_every: computed steps between two checkpoints; 0 for no checkpoints.
        resume: resume from the last checkpoint, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: FileName | None = None
    model: FileName | None = None
    revision: FileName | None = None
    prompt: Prompt
    image: FileName | None = None
    extend: FileName | None = None
    travel: Waypoints | None = None
    negative: Text | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    frames: FrameCount | None = None
    steps: StepCount | None = None
    guidance: Guidance | None = None
    guidance_2: Guidance | None = None
    seed: Seed | None = None
    max_sequence_length: TextTokens | None = None
    videos: VideoCount | None = None
    spectrum: FileName | None = None
    deadline: Deadline | None = None
    out: Path
    report: Path | None = None
    preview: Path | None = None
    latents: Path | None = None
    overwrite: bool = False
    compare: bool = False
    ranks: _Degree | None = None
    ulysses: _Degree | None = None
    ring: _Degree | None = None
    cfg: _Degree | None = None
    lora: Loras = ()
    attention: FileName | None = None
    shard: bool | None = None
    offload: bool = False
    performance: Profile | None = None
    compile: bool | None = None
    quantization: Quantization | None = None
    timeout: _Timeout | None = None
    busy_timeout: _Timeout | None = None
    checkpoints: Path | None = None
    checkpoint_every: _Every = CHECKPOINT_EVERY
    resume: bool = False

    @classmethod
    def parse(cls, **fields: Any) -> Self:
        """Validate options.

        Raises:
            BadRequestError: one line per invalid option: its name, the value given, what is allowed.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise BadRequestError(explain(error, model=cls)) from None

    def open_config(self) -> Config:
        """Open the config, with what the options replace.

        Raises:
            BadRequestError: there is none, or a file that it names cannot be used.
        """
        return self._changed(open_config(self.config, model=self.model, revision=self.revision))

    def job(
        self, config: Config | None = None, revision: Callable[[Config], str | None] = local_revision
    ) -> Job:
        """Build the job, with every name resolved.

        Args:
            config: from `open_config`, if it is known already.
            revision: see `Job.build`.

        Raises:
            BadRequestError: a file cannot be used, or options contradict each other or the model.
        """
        config = config or self.open_config()
        given = {
            name: getattr(self, name) for name in VideoRequest.model_fields.keys() & self.model_fields_set
        }
        del given["prompt"]
        if self.extend is not None:
            given["extend"] = continuing(self.extend)
        request = config.request(self.prompt, **{name: one for name, one in given.items() if one is not None})
        outputs = Outputs.named(
            self.out, self.report, overwrite=self.overwrite, preview=self.preview, latents=self.latents
        )
        job = Job.build(
            config,
            request,
            outputs,
            compare=self.compare,
            ranks=self.ranks,
            degrees=Degrees(cfg=self.cfg, ring=self.ring, ulysses=self.ulysses),
            checkpoints=self._kept(),
            timeout=self.timeout,
            revision=revision,
        )
        if self.config is not None and is_path(self.config):
            check_apart(outputs.touched(request.videos), {Path(self.config): "config"})
        return job

    def _changed(self, config: Config) -> Config:
        """Return the config with what the options replace."""
        changes = {
            name: value
            for name in ("attention", "performance", "compile", "quantization", "busy_timeout")
            if (value := getattr(self, name)) is not None
        }
        if self.lora:
            changes["lora"] = tuple(
                one.model_copy(update={"file": str(Path(one.file).absolute())}) for one in self.lora
            )
        changes["memory"] = config.memory.moved(shard=self.shard, offload=self.offload)
        changed = config.model_copy(update=changes)
        for lora in changed.lora:
            check_lora_file(lora.file)  # before what is imported to read it, in seconds
        if changed.lora:
            from runtime.profile import check_loras

            check_loras(changed)
        return changed

    def _kept(self) -> Checkpoints | None:
        """Return the job's checkpoints; None without."""
        if not self.checkpoint_every:
            if self.resume:
                raise BadRequestError(
                    f"resume: there is nothing to resume from without checkpoints, which "
                    f"{setting('checkpoint_every', 0)} turns off"
                )
            return None
        return Checkpoints(
            Checkpoints.folder_of(self.out, self.checkpoints),
            every=self.checkpoint_every,
            resume=self.resume,
            overwrite=self.overwrite and not self.resume,
        )
