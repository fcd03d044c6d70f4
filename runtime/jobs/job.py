"""Jobs: one request with everything needed to carry it out, in any process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError
from runtime.files.atomic import is_in_the_way
from runtime.files.checks import check_apart
from runtime.files.problems import explain
from runtime.files.text import read_json
from runtime.forecasting.presets import Preset, load_preset
from runtime.forecasting.usual import decided
from runtime.jobs.defaults import usual_timeout
from runtime.media.latents import read_latents
from runtime.models.folder import absolute_model, files_of, local_revision
from runtime.parallel.topology import Degrees, Topology
from runtime.recipe import Recipe
from runtime.request.config import Config, is_path
from runtime.request.images import check_image, image_digest
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest

if TYPE_CHECKING:  # it takes seconds
    from runtime.profile import ModelProfile


@dataclass(frozen=True, slots=True)
class Job:
    """One request with everything needed to carry it out, checked as far as is possible before a model loads.

    What is decided when a job is built holds wherever it runs: it is handed on with all its parts, as JSON or
    pickled, and a preset is not read again from its file.

    Attributes:
        config, request, outputs: the model and settings, the request, and the output files.
        preset: the request's forecasting preset.
        compare: whether to run the full sampler as well and measure the quality.
        ranks: number of ranks requested, or the product of the degrees; None if unspecified.
        degrees: degrees of parallelism requested.
        checkpoints: folder of checkpoints while the job runs; None for no checkpoints.
        timeout: seconds within which the failure of one rank ends all.
        recipe: recipe of the video when the job was planned, which must not change; None for no such check.
        chosen: why the preset was chosen; empty if the user named it.
    """

    config: Config
    request: VideoRequest
    preset: Preset
    outputs: Outputs
    compare: bool
    ranks: int | None
    degrees: Degrees
    checkpoints: Checkpoints | None
    timeout: float
    recipe: Recipe | None = None
    chosen: str = ""

    @classmethod
    def build(
        cls,
        config: Config,
        request: VideoRequest,
        outputs: Outputs,
        *,
        preset: Preset | None = None,
        compare: bool = False,
        ranks: int | None = None,
        degrees: Degrees = Degrees(),  # noqa: B008
        checkpoints: Checkpoints | None = None,
        timeout: float | None = None,
        recipe: Recipe | None = None,
        chosen: str = "",
        revision: Callable[[Config], str | None] = local_revision,
    ) -> Job:
        """Build a job from parts that are valid by themselves, and check that they fit each other.

        Args:
            config, request, outputs, compare, checkpoints, recipe, chosen: as the attributes.
            preset: the request's preset, where it has been loaded already.
            ranks: number of ranks; by default as many as `degrees` needs, or one.
            degrees: degrees of parallelism; by default they are chosen.
            timeout: seconds within which the failure of one rank ends all; by default long enough for
                compiling where the config asks for it.
            revision: gives the revision of the config's model, by which a preset is chosen.

        Raises:
            BadRequestError: the preset does not fit the request, the ranks do not fit the model, or an output
                would replace an input.

        Example:
            >>> from runtime.request.config import load_config
            >>> config = load_config("wan-tiny")
            >>> request = config.request("a red circle", seed=7, steps=20)
            >>> outputs = Outputs.named(Path("a.mp4"), overwrite=True)
            >>> job = Job.build(config, request, outputs, ranks=2)
        """
        if preset is None:
            request, chosen = decided(config, request, revision)
            preset = load_preset(request.spectrum)
        preset.check_request(config.windowed(request))
        world = ranks or (degrees.product if degrees != Degrees() else None)
        if world is not None and config.architecture is not None:
            heads = config.architecture.heads
            topology = Topology.choose(world, heads=heads, guided=request.guided, wanted=degrees)
            topology.check(heads=heads, tokens=None, guided=request.guided)
        check_apart(outputs.touched(request.videos), inputs_of(config, request, preset))
        patience = usual_timeout(config.performs.compile) if timeout is None else timeout
        of_ranks = (world, degrees, checkpoints, patience)
        return cls(config, request, preset, outputs, compare, *of_ranks, recipe, chosen)

    @property
    def told(self) -> str:
        """Its preset, and why that was chosen if the user did not name it."""
        return f"preset {self.request.preset}{self.chosen and f' ({self.chosen})'}"

    @property
    def world(self) -> int:
        """Number of ranks of the group that runs the job."""
        return self.ranks or 1

    def planned(self, profile: ModelProfile | None = None, revision: str | None = None) -> Job:
        """Copy the job with the recipe of its current files, as far as this machine has them.

        Args:
            profile: profile of its model, if that has been read already: its files are not read again.
            revision: revision of its model, if that is known already.

        Raises:
            BadRequestError: a file cannot be read.
        """
        request, preset = self.request, self.preset
        image = None if request.image is None else image_digest(request.image)
        known = None if request.extend is None else read_latents(request.extend.file).digest
        if profile is not None:
            return replace(self, recipe=profile.recipe(request, preset, image, known))
        revision = revision or local_revision(self.config)
        recipe = Recipe.of(self.config, request, preset, image=image, extended=known, revision=revision)
        return replace(self, recipe=recipe)

    def check_files(self) -> None:
        """Refuse files that cannot be read or written; called by the rank that writes.

        Raises:
            BadRequestError: see `Outputs.check`, `Checkpoints.check` and `check_image`.
        """
        check_image(self.request.image)
        self.resumed().outputs.check(self.request.videos)
        if self.checkpoints is not None:
            self.checkpoints.check()

    def absolute(self) -> Job:
        """Copy the job with absolute paths, for processes that run in other folders."""
        outputs, kept, request = self.outputs, self.checkpoints, self.request
        if is_path(request.spectrum):
            request = request.model_copy(update={"spectrum": str(Path(request.spectrum).absolute())})
        config = self.config
        lora = tuple(one.model_copy(update={"file": str(Path(one.file).absolute())}) for one in config.lora)
        config = config.model_copy(update={"model": absolute_model(config), "lora": lora})
        if request.image is not None:
            request = request.model_copy(update={"image": str(Path(request.image).absolute())})
        if request.extend is not None:
            file = str(Path(request.extend.file).absolute())
            request = request.model_copy(update={"extend": request.extend.model_copy(update={"file": file})})
        return replace(
            self,
            config=config,
            request=request,
            outputs=outputs.absolute(),
            checkpoints=None if kept is None else replace(kept, root=kept.root.absolute()),
        )

    def retried(self, *, restart: bool = False) -> Job:
        """Copy the job so that it resumes; it may then replace a video that an earlier attempt made.

        Args:
            restart: see `Checkpoints`.
        """
        kept, overwrite = self.checkpoints, self.outputs.overwrite or self.is_made()
        return replace(
            self,
            outputs=replace(self.outputs, overwrite=overwrite),
            checkpoints=None if kept is None else replace(kept, resume=True, restart=restart or kept.restart),
        )

    def resumed(self) -> Job:
        """Return the job, as `retried` if it resumes from the checkpoints of an earlier attempt.

        That attempt may have been killed after it wrote its report and before its videos, which are replaced.
        """
        kept = self.checkpoints
        return self.retried() if kept is not None and kept.resume and kept.left else self

    def is_made(self) -> bool:
        """Return whether a report of this very request exists; it appears before the videos that it names."""
        try:
            report = read_json(self.outputs.report)
            made = (report["request"], report["videos"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return made in (self._reported, self.absolute()._reported)  # it has paths as the job had them

    @property
    def _reported(self) -> tuple[Any, list[str]]:
        """Request and videos as the job's report has them."""
        videos = [str(path) for path in self.outputs.videos(self.request.videos)]
        return self.request.model_dump(mode="json"), videos

    def advice(self) -> str:
        """Advise the user how to resume or restart the interrupted job, without harm to others' files."""
        kept, options = self.checkpoints, self._options_now()
        command = f"the same command{' with ' if options else ''}{' '.join(options)}"
        first = self.first_to_do()
        if kept is not None and kept.newest is not None:
            return f"{first}{command} resumes from the last checkpoint"
        whole = "complete " if options else ""
        return f"there is no {whole}checkpoint: {first}{command} starts again at the first step"

    def first_to_do(self) -> str:
        """Advice on what lies at the names of the job's files and is not its own, as an introduction to a
        command; empty without any."""
        overwrite = self.retried().outputs.overwrite
        found = [
            repr(str(path))
            for path in self.outputs.all(self.request.videos)
            if is_in_the_way(path, overwrite=overwrite)
        ]
        return f"move {' and '.join(found)} elsewhere; then " if found else ""

    def options_to_go_on(self) -> list[str] | None:
        """Options to add to the job's own to resume from its checkpoints; None if there are none."""
        kept = self.checkpoints
        return None if kept is None or kept.newest is None else self._options_now()

    def _options_now(self) -> list[str]:
        """Options to add to the job's own so that what it has made and kept is accepted."""
        kept = self.checkpoints
        left = kept is not None and kept.left
        options = ["--resume"] if kept is not None and left and not kept.resume else []
        if not left and not self.outputs.overwrite and self.is_made():
            options.append("--overwrite")
        return options

    def to_json(self) -> str:
        """Serialise the job for `from_json`.

        Raises:
            BadRequestError: a path is not UTF-8, as that of a working directory need not be.
        """
        try:
            return _JOB.dump_json(self).decode()
        except PydanticSerializationError as error:
            raise BadRequestError(
                f"out: {str(self.outputs.video)!r} given; a path of the job is not UTF-8 and cannot be kept "
                "in a queue: start it in another folder"
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """Read a job that `to_json` wrote.

        Raises:
            BadRequestError: another version of Lockstep wrote it, in a form that this one cannot read.
        """
        try:
            return _JOB.validate_json(text)
        except ValidationError as error:
            raise BadRequestError(explain(error, source="a job of another version")) from None


def inputs_of(config: Config, request: VideoRequest, preset: Preset) -> dict[Path, str]:
    """Input files and folders of a request on this machine → the field that names each."""
    named = {
        "spectrum": request.spectrum if is_path(request.spectrum) else None,
        "image": request.image,
        "extend": None if request.extend is None else request.extend.file,
        "calibration": preset.calibration_file,
    }
    files = {Path(name): field for field, name in named.items() if name is not None}
    files |= dict.fromkeys(files_of(config), "model")
    return files | {Path(one.file): "lora" for one in config.lora}


_JOB = TypeAdapter(Job)
