"""A model that is loaded once, and generates, compares and calibrates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.files.problems import nearest
from runtime.files.text import is_folder, user_path
from runtime.forecasting.calibration import Calibration
from runtime.jobs.batch import Batch
from runtime.jobs.options import JobOptions
from runtime.jobs.run import generate_shown, run_job
from runtime.measure.calibration_job import SEED, CalibrationJob, shipped_prompts
from runtime.measure.compare import FULL, Comparison, against_full
from runtime.measure.plans import Chosen, make_plan
from runtime.media.latents import continuing
from runtime.media.mp4 import ColourWatch, FrameBuffer, Tee
from runtime.notebook.steps import OnVideoStep, Step, Telling, unseen
from runtime.notebook.video import Video
from runtime.reports.report import Report
from runtime.request.config import DEFAULT, Config, available, is_embedded
from runtime.request.prompts import read_prompts
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from spectrum import StepKind

_SETTINGS = {"lora", "attention", "performance", "compile", "quantization", "offload", "busy_timeout"}
_FILES = {"report", "latents", "overwrite", "compare", "checkpoints", "checkpoint_every", "resume"}
_REQUEST = {*VideoRequest.model_fields} - {"prompt", "embedded"}


def load(
    name: str | Path = DEFAULT, *, revision: str | None = None, device: str | None = None, **settings: Any
) -> VideoModel:
    """Load a model.

    Args:
        name: name of a shipped config, path of a config's YAML file, folder of a model, or Hugging Face
            repository. A folder that is called like a config is written `./NAME`.
        revision: commit or tag of the repository.
        device: such as `cuda:1` or `cpu`; by default as the config says.
        settings: `lora`, `attention`, `performance`, `compile`, `quantization`, `offload` or `busy_timeout`,
            which replace those of the config: see `runtime.request.config.Config`. A LoRA may be a path.

    Raises:
        BadRequestError: there is no such config or model, or it cannot be used.

    Example:
        >>> model = load("wan-tiny")
        >>> video = model.generate("a red circle growing on a gray background", frames=5, steps=4)
        >>> video.frames.shape
        (5, 96, 96, 3)
    """
    _check_known(settings, _SETTINGS | {"revision", "device"}, "`load`")
    if "lora" in settings:
        settings["lora"] = _loras(settings["lora"])
    options = JobOptions.parse(
        **_named(str(name)), revision=revision, prompt="any", out=Path("any.mp4"), **settings
    )
    config = options.open_config()
    return VideoModel(config if device is None else config.model_copy(update={"device": device}), str(name))


def plan(
    calibration: str | Path,
    *,
    nfe: int | None = None,
    psnr: float | None = None,
    seconds: float | None = None,
    report: str | Path | None = None,
) -> Chosen:
    """Find the best steps to compute for one budget.

    Args:
        calibration: name of a shipped calibration, or path of a JSON file.
        nfe: number of steps to compute.
        psnr: dB against the full sampler; the fewest steps that are expected to reach it.
        seconds: time for denoising; as many steps as fit.
        report: JSON report to take the times of steps from; by default the calibration's.

    Raises:
        BadRequestError: not exactly one budget, or one that cannot be met; or a file cannot be used.

    Example:
        >>> best = plan("wan-tiny", nfe=10)
        >>> best.nfe, best.steps
        (10, 50)
    """
    said = None if report is None else user_path(str(report))
    return make_plan(str(calibration), nfe=nfe, psnr=psnr, seconds=seconds, report=said)


class VideoModel:
    """A loaded model, which serves one call after another; none of them leaves a trace.

    What is called `fields` are those of a request (`width`, `height`, `frames`, `steps`, `guidance`, `seed`,
    `spectrum` …; see `VideoRequest`); the config says what is not given. A request is used as it is, or with
    the fields that are given beside it.

    Attributes:
        name: what was given to `load`.
    """

    def __init__(self, config: Config, name: str):
        self.name, self._engine = name, Engine(config)

    @property
    def config(self) -> Config:
        """The model's settings, with its present LoRAs."""
        return self._engine.config

    def __repr__(self) -> str:
        return f"VideoModel({self.name!r} on {self._engine.ranks.device})"

    def switch(self, lora: Any) -> None:
        """Have these LoRAs, and no others, in what is made from now on; nothing is loaded again.

        Args:
            lora: a path, a mapping with `file`, `scale` and `expert`, or a list of these; empty for none.

        Raises:
            BadRequestError: a file cannot be used; nothing has changed.
        """
        self._engine.switch(JobOptions.parse(prompt="any", out=Path("any.mp4"), lora=_loras(lora)).lora)

    def request(self, prompt: str | VideoRequest, **fields: Any) -> VideoRequest:
        """Make a request, and check it against the model.

        Args:
            prompt: what the video shows, or a request to change.
            fields: fields of the request; `extend` is the path of a file of latents.

        Raises:
            BadRequestError: one line per field that is not acceptable.
        """
        _check_known(fields, _REQUEST, "a request")
        given = {name: one for name, one in fields.items() if one is not None}
        if isinstance(given.get("extend"), str | Path):
            given["extend"] = continuing(str(user_path(str(given["extend"]))))
        if isinstance(given.get("image"), Path):
            given["image"] = str(given["image"])
        if isinstance(given.get("spectrum"), Path):
            given["spectrum"] = str(given["spectrum"].absolute())
        if isinstance(prompt, VideoRequest):
            own = {name: getattr(prompt, name) for name in prompt.model_fields_set & _REQUEST}
            prompt, given = prompt.prompt, own | given
        request = self.config.request(prompt, **given)
        self._engine.plan(request)
        return request

    def generate(self, prompt: str | VideoRequest, *, on_step: OnVideoStep = unseen, **fields: Any) -> Video:
        """Make a video in memory.

        Args:
            prompt: what it shows, or a request.
            on_step: called after each step.
            fields: fields of the request.

        Raises:
            BadRequestError: the request is not acceptable; nothing was started.
            CancelledError: `Step.stop` was called.
            JobFailedError: memory ran out, or a step had NaN.
        """
        request = self.request(prompt, **fields)
        if request.videos != 1:
            raise BadRequestError(
                f"videos: {request.videos} given; `generate` makes one, call it for each seed, or `write`"
            )
        engine, frames, watch = self._engine, FrameBuffer(), ColourWatch()
        telling = Telling(on_step, partial(engine.command, Command.CANCEL))
        plan = engine.plan(request)
        result = generate_shown(engine, plan, [Tee(frames, watch)], telling)
        warnings = [*result.warnings, *watch.warning("the video")]
        return Video(frames.frames, self.config.fps, plan.request, warnings, result)

    def write(
        self, prompt: str | VideoRequest, out: str | Path, *, on_step: OnVideoStep = unseen, **options: Any
    ) -> Report:
        """Make a video as `lockstep generate` does: the mp4, its report and picture, with checkpoints.

        Args:
            prompt: what it shows, or a request.
            out: the mp4.
            on_step: called after each step.
            options: fields of the request, and `report`, `latents`, `overwrite`, `compare`, `checkpoints`,
                `checkpoint_every` or `resume`, as `JobOptions` explains them.

        Returns:
            The report.

        Raises:
            BadRequestError: the request or a file is not acceptable; nothing was started.
            CancelledError: `Step.stop` was called; `resume=True` continues from the checkpoint.
            JobFailedError: writing a file failed, memory ran out, or a step had NaN.
        """
        _check_known(options, _REQUEST | _FILES, "`write`")
        files = {name: options.pop(name) for name in _FILES & options.keys()}
        request = self.request(prompt, **options)
        given = {name: getattr(request, name) for name in request.model_fields_set & _REQUEST}
        if request.extend is not None:
            given["extend"] = request.extend.file
        folder = {
            name: user_path(str(files[name])) for name in ("report", "latents", "checkpoints") & files.keys()
        }
        job = JobOptions.parse(
            prompt=request.prompt, out=user_path(str(out)), **given, **{**files, **folder}
        ).job(self.config)
        Batch([job]).check_files()
        stop = Command.CANCEL if job.checkpoints is None else Command.STOP
        telling = Telling(on_step, partial(self._engine.command, stop), 2 if job.compare else 1)
        return run_job(self._engine, job, telling)

    def compare(
        self,
        prompts: str | Sequence[str],
        presets: Sequence[str] = ("paper", "paper-fast"),
        *,
        seeds: Sequence[int] = (0,),
        out: str | Path | None = None,
        overwrite: bool = False,
        on_step: OnVideoStep = unseen,
        **fields: Any,
    ) -> Comparison:
        """Compare presets with the full sampler on the same prompts and seeds.

        Args:
            presets: names of shipped presets, or paths of YAML files.
            out: an mp4 that shows all videos side by side; the numbers are written beside it as JSON. By
                default no file is written.

        Returns:
            The comparison: `rows()` has a row for each preset, `results` one for each video.

        Raises:
            BadRequestError: a preset, a request or a file is not acceptable; nothing was started.
            CancelledError, JobFailedError: see `generate`.
        """
        told = [prompts] if isinstance(prompts, str) else prompts
        requests = [
            self.request(prompt, **{**fields, "seed": seed, "spectrum": FULL})
            for prompt in told
            for seed in seeds
        ]
        if not requests:
            raise BadRequestError("prompts: none given")
        file = None if out is None else user_path(str(out))
        comparison = Comparison(
            self.config, against_full([str(one) for one in presets]), requests, file, overwrite
        )
        comparison.check({})
        plans, engine = comparison.plan(self._engine), self._engine
        with engine.commanded():
            telling = Telling(on_step, partial(engine.command, Command.CANCEL), sum(map(len, plans)))
            comparison.run(plans, telling)
        return comparison

    def calibrate(
        self,
        out: str | Path,
        *,
        prompts: Sequence[str] | Path | None = None,
        seed: int = SEED,
        budgets: Sequence[int] | None = None,
        add_solvers: bool = False,
        overwrite: bool = False,
        on_step: OnVideoStep = unseen,
        **fields: Any,
    ) -> Calibration:
        """Measure the model under its sampler, and write a calibration file, from which `plan` makes plans.

        Finished runs are kept beside the file until it is done; the same call resumes from them.

        Args:
            out: the JSON file.
            prompts: the prompts, or a file with one on each line; by default those shipped for the config.
            seed: seed of the first video; each further one takes the next.
            budgets: numbers of computed steps for which solvers are fitted; by default a few usual ones.
            add_solvers: whether to add these solvers to the calibration in `out`, from its own prompts and
                seeds; nothing else in it changes.

        Raises:
            BadRequestError: something given is not acceptable; nothing was started.
            CancelledError, JobFailedError: see `generate`.
        """
        _check_known(fields, _REQUEST, "a request")
        given: dict[str, Any] = {name: one for name, one in fields.items() if one is not None}
        file, budget = user_path(str(out)), None if budgets is None else tuple(budgets)
        if add_solvers:
            if prompts is not None or overwrite:
                said = "it changes the calibration in out"
                raise BadRequestError(f"add_solvers: given with prompts or overwrite; {said}")
            job = CalibrationJob.of_calibration(self.config, file, budgets=budget, **given)
        else:
            if prompts is None or isinstance(prompts, Path):
                prompts = [*read_prompts(prompts or shipped_prompts(self.config)).values()]
            job = CalibrationJob.of_prompts(
                self.config, prompts, file, seed=seed, budgets=budget, overwrite=overwrite, **given
            )
        job.check({})
        engine, computed = self._engine, 0

        def told(name: str, record: StepRecord) -> None:
            nonlocal computed
            computed += record.kind is StepKind.COMPUTE
            done = min(1.0, computed / calibrator.evaluations)
            steps, stop = job.requests[0].steps, partial(engine.command, Command.CANCEL)
            on_step(Step(record.index + 1, steps, record.kind, record.seconds, name, done, stop))

        calibrator = job.calibrator(engine, told)
        return job.run(calibrator, engine)


def _named(name: str) -> dict[str, str]:
    """Whether `name` is a config's or a model's, as an option of a job."""
    if name in available(".") or name.endswith((".yaml", ".yml")):
        return {"config": name}
    is_model = "/" in name or name.startswith("~") or is_embedded(name) or is_folder(Path(name))
    return {"model" if is_model else "config": name}


def _loras(given: Any) -> Any:
    """LoRAs of which each may be a path alone."""
    many = given if isinstance(given, list | tuple) else [given]
    return [{"file": str(user_path(str(one)))} if isinstance(one, str | Path) else one for one in many]


def _check_known(given: Mapping[str, Any], known: set[str], what: str) -> None:
    """Refuse names that nothing is called.

    Raises:
        BadRequestError: there is one; the nearest is named.
    """
    for name in given:
        if name not in known:
            raise BadRequestError(
                f"{name}: unknown; {what} takes {', '.join(sorted(known))}{nearest(name, sorted(known))}"
            )
