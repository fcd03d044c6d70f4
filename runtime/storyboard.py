"""Storyboards: an ordered list of shots that become one film, as one YAML file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.configs import Config, Lora, load_config
from runtime.errors import BadRequestError
from runtime.files import image_digest
from runtime.model_profile import ModelProfile
from runtime.request import MAX_SEED, VideoRequest, Waypoint

_NAME = r"^[a-z0-9][a-z0-9_-]*$"
_MOST_SHOTS = 9999


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cut(_Part):
    """The shot begins where the one before ends."""

    kind: Literal["cut"]


class Crossfade(_Part):
    """The last frames of the shot before fade into the first of this one."""

    kind: Literal["crossfade"]
    frames: Annotated[int, Field(ge=1, le=999)]


Transition = Annotated[Cut | Crossfade, Field(discriminator="kind")]


class Settings(_Part):
    """How a shot is made; what is left out is the storyboard's `defaults`, and then the config's.

    Attributes:
        config: name of a config, or path of a YAML file; relative to the storyboard.
        negative: what it should not show.
        seconds, frames: how long it is, one of the two; seconds become the nearest 4k + 1 frames.
        seed: by default made from the shot's id.
        steps, guidance, spectrum: as in a request.
        lora: weights to add to the model's; the file is relative to the storyboard.
    """

    config: str | None = None
    negative: str | None = None
    seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] | None = None
    frames: int | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: int | None = None
    guidance: float | None = None
    spectrum: str | None = None
    lora: Lora | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.seconds is not None and self.frames is not None:
            raise ValueError("give seconds or frames, not both")
        return self


class Shot(Settings):
    """One prompt with a duration.

    Attributes:
        id: lower case letters, digits, - and _; names the files.
        prompt: what it shows.
        image: what it begins with, for models that make videos from an image; relative to the storyboard.
        travel: prompts that it changes to along the way, `at` 0 … 1 of its length; for shots longer than the
            model's window.
        title: of its chapter; by default the id.
        transition: from the shot before.
    """

    id: Annotated[str, Field(pattern=_NAME, max_length=60)]
    prompt: Annotated[str, Field(min_length=1)]
    image: str | None = None
    travel: list[Waypoint] = []
    title: str | None = None
    transition: Transition = Cut(kind="cut")

    @property
    def chapter(self) -> str:
        return self.title or self.id


class Storyboard(_Part):
    """A film.

    Attributes:
        title: of the film.
        width, height: pixels of every shot; by default the config's.
        defaults: for shots that do not say.
        shots: in order.
    """

    title: Annotated[str, Field(min_length=1)]
    width: int | None = None
    height: int | None = None
    defaults: Settings = Settings()
    shots: Annotated[list[Shot], Field(min_length=1, max_length=_MOST_SHOTS)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        ids = [shot.id for shot in self.shots]
        repeated = sorted({one for one in ids if ids.count(one) > 1})
        if repeated:
            raise ValueError(f"shots: the ids {', '.join(repeated)} are used more than once")
        return self


class ShotRequest(_Part):
    """A shot with everything decided.

    Attributes:
        config: name or absolute path.
        settings: what that is, with the shot's LoRA.
        revision: of the model.
        image: digest of the image that it begins with, if there is one.
        windows: that it is made in; one where it fits the model's.
    """

    shot: Shot
    config: str
    settings: Config
    request: VideoRequest
    revision: str
    image: str | None
    windows: int

    @property
    def fps(self) -> int:
        return self.settings.fps


def load_storyboard(path: Path) -> tuple[Storyboard, list[ShotRequest]]:
    """Read and check a whole storyboard, before anything of it runs.

    Raises:
        BadRequestError: one line per problem, each with its line in the file and its shot.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise BadRequestError(f"storyboard: cannot read {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRequestError(f"storyboard: {str(path)!r} is not valid YAML: {error}") from None
    where = _Where(path, node, content)
    try:
        board = Storyboard.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise BadRequestError(
            "\n".join(where.explain(problem["loc"], problem["msg"]) for problem in problems)
        ) from None
    return board, _decided(board, where)


def _decided(board: Storyboard, where: _Where) -> list[ShotRequest]:
    """The requests of all shots; every problem of any is told."""
    decided: list[ShotRequest] = []
    problems: list[str] = []
    models = _Models()
    for number, shot in enumerate(board.shots):
        try:
            decided.append(_decide(board, shot, where.folder, models))
        except BadRequestError as error:
            for line in str(error).splitlines():
                field = line.partition(":")[0]
                problems.append(where.explain(("shots", number, field), line))
    if not problems:
        problems = _joins(board, decided, where)
    if problems:
        raise BadRequestError("\n".join(problems))
    return decided


def _decide(board: Storyboard, shot: Shot, folder: Path, models: _Models) -> ShotRequest:
    given = {name: getattr(board.defaults, name) for name in Settings.model_fields}
    own = {name: getattr(shot, name) for name in Settings.model_fields}
    own = {name: value for name, value in own.items() if value is not None}
    if "seconds" in own or "frames" in own:
        given |= {"seconds": None, "frames": None}
    given |= own
    name = _beside(given.pop("config") or "wan-tiny", folder)
    config = load_config(name)
    lora = given.pop("lora")
    if lora is not None:
        lora = lora.model_copy(update={"file": str((folder / lora.file).resolve())})
        config = config.model_copy(update={"lora": lora})
    seconds = given.pop("seconds")
    if seconds is not None:
        given["frames"] = max(round((seconds * config.fps - 1) / 4), 0) * 4 + 1
    if given["spectrum"] is not None:
        given["spectrum"] = _beside(given["spectrum"], folder)
    image = None
    if shot.image is not None:
        given["image"] = str((folder / shot.image).resolve())
        image = image_digest(given["image"])
    if given["seed"] is None:
        given["seed"] = int(hashlib.sha256(shot.id.encode()).hexdigest()[:8], 16)
    given |= {"width": board.width, "height": board.height, "travel": tuple(shot.travel)}
    request = config.request(shot.prompt, **{key: value for key, value in given.items() if value is not None})
    model = models.find(config)
    model.check(request)
    return ShotRequest(
        shot=shot,
        config=name,
        settings=config,
        request=request,
        revision=model.folder.revision,
        image=image,
        windows=len(model.sizes.windows(request, config)),
    )


def _joins(board: Storyboard, decided: Sequence[ShotRequest], where: _Where) -> list[str]:
    """What keeps the shots from becoming one film."""
    problems = []
    usual = _format(decided[0])
    if not isinstance(decided[0].shot.transition, Cut):
        said = "transition: nothing comes before the first shot"
        problems.append(where.explain(("shots", 0, "transition"), said))
    for number, one in enumerate(decided):
        if _format(one) != usual:
            said = f"size: {_format(one)}, and the first shot is {usual}; give the film a width and height"
            problems.append(where.explain(("shots", number), said))
        leaving = fade_of(decided[number + 1].shot) if number + 1 < len(decided) else 0
        fading = fade_of(one.shot) + leaving
        if fading >= one.request.frames:
            said = f"transition: {fading} frames fade, and the shot has {one.request.frames}"
            problems.append(where.explain(("shots", number), said))
    return problems


def fade_of(shot: Shot) -> int:
    """Frames that fade over from the shot before; 0 for a cut."""
    return shot.transition.frames if isinstance(shot.transition, Crossfade) else 0


def _format(one: ShotRequest) -> str:
    return f"{one.request.width}×{one.request.height} at {one.fps} frames per second"


def _beside(name: str, folder: Path) -> str:
    """A file that is named from the storyboard; a name without one stays."""
    if not name.endswith((".yaml", ".yml")) and "/" not in name:
        return name
    return str((folder / name).resolve())


class _Models:
    """The models that shots ask for. Each is looked for once, whether it is found or not."""

    def __init__(self) -> None:
        self._found: dict[Config, ModelProfile | BadRequestError] = {}

    def find(self, config: Config) -> ModelProfile:
        """
        Raises:
            BadRequestError: see `ModelProfile`.
        """
        if config not in self._found:
            try:
                self._found[config] = ModelProfile(config)
            except BadRequestError as error:
                self._found[config] = error
        found = self._found[config]
        if isinstance(found, BadRequestError):
            raise found
        return found


class _Where:
    """Lines of a YAML file, found by the way to a value."""

    def __init__(self, path: Path, node: yaml.Node | None, content: Any):
        self._path, self._node, self._content = path, node, content
        self.folder = path.resolve().parent

    def explain(self, way: Sequence[int | str], message: str) -> str:
        """`film.yaml, line 12, shot 'garden': frames: 16 given; …`"""
        field = way[-1] if way else ""
        message = message.removeprefix("Value error, ")
        if isinstance(field, str) and field and not message.startswith(f"{field}:"):
            message = f"{field}: {message[:1].lower()}{message[1:]}"
        shot = self._shot(way)
        return f"{self._path}, line {self._line(way)}{shot}: {message}"

    def _line(self, way: Sequence[int | str]) -> int:
        """Of the deepest part of the way that the file has."""
        node = self._node
        line = 1
        for part in way:
            found = None
            if isinstance(node, yaml.MappingNode):
                pairs = [pair for pair in node.value if pair[0].value == str(part)]
                if pairs:
                    line, found = pairs[0][0].start_mark.line + 1, pairs[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = node.value[part]
                line = found.start_mark.line + 1
            if found is None:
                break
            node = found
        return line

    def _shot(self, way: Sequence[int | str]) -> str:
        if len(way) < 2 or way[0] != "shots" or not isinstance(way[1], int):
            return ""
        try:
            return f", shot {self._content['shots'][way[1]]['id']!r}"
        except (KeyError, TypeError, IndexError):
            return f", shot {way[1] + 1}"
