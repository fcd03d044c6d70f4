"""Storyboards: an ordered list of shots that become one film, as one YAML file."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.errors import BadRequestError
from runtime.files.kinds import check_kind
from runtime.files.problems import explain_one, shown
from runtime.files.text import beside
from runtime.files.yaml import YamlFile
from runtime.forecasting.presets import Preset
from runtime.models.configs import open_config
from runtime.recipe import Recipe
from runtime.request.bounds import NUMBER
from runtime.request.config import Config, Loras, is_path
from runtime.request.images import image_digest
from runtime.request.video_request import (
    FileName,
    FrameCount,
    Guidance,
    Pixels,
    Prompt,
    Seed,
    StepCount,
    Text,
    Title,
    VideoRequest,
    Waypoint,
)
from spectrum import StepKind

if TYPE_CHECKING:  # it takes seconds
    from runtime.profile import ModelProfile

Profile = Callable[[Config], "ModelProfile"]
_ID = "[a-z0-9][a-z0-9_-]{0,59}"
_MOST_SHOTS = 9999
_MOST_TOLD = 40  # problems that are listed


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _is_id(text: str) -> str:
    if re.fullmatch(_ID, text) is None:
        raise ValueError("must have at most 60 lower case letters, digits, - and _, as it names files")
    return text


class Cut(_Part):
    """Cut: the shot begins where the one before ends."""

    kind: Literal["cut"]


class Crossfade(_Part):
    """Crossfade: the last frames of the shot before fade into the first of this one."""

    kind: Literal["crossfade"]
    frames: Annotated[int, Field(ge=1, le=999), NUMBER]


Transition = Annotated[Cut | Crossfade, Field(discriminator="kind")]


class Settings(_Part):
    """Settings of a shot; a missing one is taken from the storyboard's `defaults`, and then from the config.

    Attributes:
        config: name of a config, or path of a YAML file, relative to the storyboard.
        negative: what the shot should not show.
        seconds, frames: length of the shot, one of the two; seconds become the nearest
            frames that the model can make.
        seed: by default derived from the shot's id.
        steps, guidance, guidance_2, spectrum: as in a request.
        lora: one LoRA or a list, merged into the model; files are relative to the storyboard.
    """

    config: FileName | None = None
    negative: Text | None = None
    seconds: Annotated[float, Field(ge=0.001, le=3600, allow_inf_nan=False), NUMBER] | None = None
    frames: FrameCount | None = None
    seed: Seed | None = None
    steps: StepCount | None = None
    guidance: Guidance | None = None
    guidance_2: Guidance | None = None
    spectrum: FileName | None = None
    lora: Loras | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.seconds is not None and self.frames is not None:
            raise ValueError("give seconds or frames, not both")
        return self


class Shot(Settings):
    """A shot: one prompt with a duration.

    Attributes:
        id: lower case letters, digits, - and _; names the files.
        prompt: what the shot shows.
        image: image that it starts from, for image-to-video models; relative to the storyboard.
        travel: later prompts, `at` 0 … 1 of its length; for shots longer than the model's window.
        title: title of its chapter; by default the id.
        transition: transition from the shot before.
    """

    id: Annotated[str, AfterValidator(_is_id), Field(json_schema_extra={"pattern": f"^{_ID}$"})]
    prompt: Prompt
    image: FileName | None = None
    travel: list[Waypoint] = []
    title: Title | None = None
    transition: Transition = Cut(kind="cut")

    @property
    def chapter(self) -> str:
        return self.title or self.id


class Storyboard(_Part):
    """A storyboard: the shots of a film, in order.

    Attributes:
        title: title of the film.
        width, height: pixels of every shot; by default the config's.
        defaults: default settings of the shots.
        shots: the shots, in order.
    """

    title: Title
    width: Pixels | None = None
    height: Pixels | None = None
    defaults: Settings = Settings()
    shots: Annotated[list[Shot], Field(min_length=1, max_length=_MOST_SHOTS)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        counts = Counter(shot.id for shot in self.shots)
        repeated = sorted(one for one, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(f"the ids {', '.join(repeated)} are used more than once")
        return self


class ShotRequest(_Part):
    """A shot with all decisions made.

    Attributes:
        shot: the shot.
        config: name or absolute path of its config.
        settings: the config itself, with the shot's LoRA.
        request, preset: its request, and its forecasting preset.
        recipe: everything that its video is a function of.
        kinds: expected kind of every step.
        windows: number of its windows; 1 if it fits the model's.
        chosen: why its preset was chosen; empty if the storyboard names it.
    """

    shot: Shot
    config: str
    settings: Config
    request: VideoRequest
    preset: Preset
    recipe: Recipe
    kinds: tuple[StepKind, ...]
    windows: int
    chosen: str = ""

    @property
    def fps(self) -> int:
        return self.settings.fps


def load_storyboard(path: Path, profile: Profile | None = None) -> tuple[Storyboard, list[ShotRequest]]:
    """Read and check a whole storyboard, before anything of it runs.

    Args:
        profile: finds the model of a config; by default it is downloaded if it is not on this machine.

    Raises:
        BadRequestError: one line per problem, each with its line in the file and its shot.
    """
    where = _Where(YamlFile.read(path, "storyboard"))
    try:
        board = where.file.validate(Storyboard)
    except ValidationError as error:
        check_kind(where.file.root.content, "storyboard", path)
        problems = [where.explain_wrong(problem) for problem in error.errors(include_url=False)]
        raise BadRequestError(_told(problems)) from None
    return board, _decided(board, where, _Models(profile))


def _decided(board: Storyboard, where: _Where, models: _Models) -> list[ShotRequest]:
    """Make the requests of all shots, or report the problems of all of them."""
    decided: list[ShotRequest] = []
    problems: list[str] = []
    for number, shot in enumerate(board.shots):
        try:
            decided.append(_decide(board, shot, where.file.folder, models))
        except BadRequestError as error:
            problems += [where.explain_of_shot(number, line) for line in str(error).splitlines()]
    if not problems:
        problems = _joins(board, decided, where)
    if problems:
        raise BadRequestError(_told(problems))
    return decided


def _told(problems: Sequence[str]) -> str:
    """Join the first problems into lines, without duplicates."""
    distinct = list(dict.fromkeys(problems))
    left = len(distinct) - _MOST_TOLD
    return "\n".join(distinct[:_MOST_TOLD] + ([f"and {left} more"] if left > 0 else []))


def _decide(board: Storyboard, shot: Shot, folder: Path, models: _Models) -> ShotRequest:
    given = {name: getattr(board.defaults, name) for name in Settings.model_fields}
    own = {name: getattr(shot, name) for name in Settings.model_fields}
    own = {name: value for name, value in own.items() if value is not None}
    if "seconds" in own or "frames" in own:
        given |= {"seconds": None, "frames": None}
    given |= own
    name = _beside(given.pop("config") or "wan-tiny", folder)
    config = models.config(name)
    lora = given.pop("lora")
    if lora is not None:
        own_lora = tuple(one.model_copy(update={"file": beside(one.file, folder)}) for one in lora)
        config = config.model_copy(update={"lora": own_lora})
    seconds = given.pop("seconds")
    if seconds is not None:
        given["frames"] = config.bounds.nearest_frames(seconds * config.fps)
    if given["spectrum"] is not None:
        given["spectrum"] = _beside(given["spectrum"], folder)
    image = None
    if shot.image is not None:
        given["image"] = beside(shot.image, folder)
        image = models.image(given["image"])
    if given["seed"] is None:
        given["seed"] = int(hashlib.sha256(shot.id.encode()).hexdigest()[:8], 16)
    given |= {"width": board.width, "height": board.height, "travel": tuple(shot.travel)}
    request = config.request(shot.prompt, **{key: value for key, value in given.items() if value is not None})
    request, chosen = models.find(config).decided(request)
    model, preset, kinds = models.check(config, request)
    return ShotRequest(
        shot=shot,
        config=name,
        settings=config,
        request=request,
        preset=preset,
        recipe=model.recipe(request, preset, image),
        kinds=kinds,
        windows=len(model.sizes.windows(request, config)),
        chosen=chosen,
    )


def _joins(board: Storyboard, decided: Sequence[ShotRequest], where: _Where) -> list[str]:
    """List problems that keep the shots from forming one film."""
    problems = []
    sizes = [f"{one.request.width}×{one.request.height}" for one in decided]
    if not isinstance(decided[0].shot.transition, Cut):
        said = "transition: there is nothing before the first shot"
        problems.append(where.explain(("shots", 0, "transition"), said))
    for number, one in enumerate(decided):
        wrong = []
        if sizes[number] != sizes[0]:
            said = f"{sizes[number]}, and the first shot is {sizes[0]}"
            wrong.append(f"size: {said}; give the film a width and height")
        if one.fps != decided[0].fps:
            said = f"{one.fps}, and the first shot has {decided[0].fps}"
            wrong.append(f"fps: {said}; a film needs configs with the same fps")
        fading = sum(fade_of(shot.shot) for shot in decided[number : number + 2])  # into it, and out of it
        if fading >= one.request.frames:
            wrong.append(f"transition: {fading} frames fade, and the shot has {one.request.frames}")
        problems += [where.explain(("shots", number), said) for said in wrong]
    return problems


def fade_of(shot: Shot) -> int:
    """Frames of the crossfade from the shot before; 0 for a cut."""
    return shot.transition.frames if isinstance(shot.transition, Crossfade) else 0


def _beside(name: str, folder: Path) -> str:
    """Make a path absolute, relative to the storyboard; keep the name of a shipped file."""
    return beside(name, folder) if is_path(name) else name


class _Models:
    """Cache of the models, configs and images of the shots; each is looked up once, found or not."""

    def __init__(self, profile: Profile | None):
        self._profile = profile
        self._found: dict[Config, ModelProfile | BadRequestError] = {}
        self._configs: dict[str, Config] = {}
        self._fitting: dict[tuple[Config, VideoRequest], tuple[Preset, tuple[StepKind, ...]]] = {}
        self._images: dict[tuple[str, int], str] = {}

    def config(self, name: str) -> Config:
        """Load a config, once.

        Raises:
            BadRequestError: see `open_config`.
        """
        if name not in self._configs:
            self._configs[name] = open_config(name)
        return self._configs[name]

    def check(
        self, config: Config, request: VideoRequest
    ) -> tuple[ModelProfile, Preset, tuple[StepKind, ...]]:
        """Check that a model can serve a request; return the model, the preset, and what steps are expected.

        Shots that differ only in prompts and seed are checked once.

        Raises:
            BadRequestError: see `ModelProfile` and its `check`.
        """
        model = self.find(config)
        alike = request.model_copy(update={"prompt": "a", "negative": "", "seed": 0})
        if (config, alike) not in self._fitting:
            preset = model.check(request)
            kinds = preset.expected_kinds(request.steps, model.fresh(request, preset))
            self._fitting[config, alike] = preset, tuple(kinds)
        return model, *self._fitting[config, alike]

    def image(self, path: str) -> str:
        """Digest of an image, which is decoded once for all shots that start from it.

        Raises:
            BadRequestError: see `image_digest`.
        """
        try:
            key = path, Path(path).stat().st_mtime_ns
        except (OSError, ValueError):
            return image_digest(path)  # which explains the problem
        if key not in self._images:
            self._images[key] = image_digest(path)
        return self._images[key]

    def find(self, config: Config) -> ModelProfile:
        """Find the model of a config, once; raises as `ModelProfile` does."""
        if config not in self._found:
            from runtime.profile import ModelProfile

            try:
                self._found[config] = (self._profile or ModelProfile)(config)
            except BadRequestError as error:
                self._found[config] = error
        found = self._found[config]
        if isinstance(found, BadRequestError):
            raise found
        return found


class _Where:
    """Adds the place in the storyboard to messages about problems."""

    def __init__(self, file: YamlFile):
        self.file = file
        self._content = file.root.content

    def explain(self, way: Sequence[int | str], message: str) -> str:
        """Add the place of a field: `film.yaml, line 12, shot 'garden': frames: 16 given; …`."""
        return f"{self.file.path}, line {self.file.line(way)}{self._shot(way)}: {message}"

    def explain_of_shot(self, number: int, message: str) -> str:
        """Add the place of a shot's field, which may stand in the defaults or the film's own fields."""
        field = message.partition(":")[0].partition(" ")[0]
        for way in (("shots", number, field), ("defaults", field), (field,)):
            if self.file.has(way):
                return self.explain(way, message)
        return self.explain(("shots", number), message)

    def explain_wrong(self, problem: Mapping[str, Any]) -> str:
        """Explain one problem of a pydantic error, with its place."""
        way = problem["loc"]
        if way == () and problem["type"] == "value_error":
            way = ("shots",)  # distinct ids, the only rule for the whole film
        inner = way[2:] if self._shot(way) else way
        return self.explain(way, explain_one({**problem, "loc": way}, inner, Storyboard))

    def _shot(self, way: Sequence[int | str]) -> str:
        if len(way) < 2 or way[0] != "shots" or not isinstance(way[1], int):
            return ""
        try:
            return f", shot {shown(self._content['shots'][way[1]]['id'])}"
        except (KeyError, TypeError, IndexError):
            return f", shot {way[1] + 1}"
