"""What a calibration has found so far, and the file in which it outlives an interruption."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BadRequestError
from runtime.files.atomic import whole_file
from runtime.files.problems import explain
from runtime.files.tensors import save_tensors
from runtime.forecasting.calibration import StreamName, Trial

log = logging.getLogger(__name__)

_Numbers = list[Annotated[float, Field(allow_inf_nan=False)]]


@dataclass(slots=True)
class Findings:
    """What is known so far; as JSON, but for the latents, which the first rank has.

    Attributes:
        grams: of each video, stream → its lower triangle.
        scales: of each video, root mean square of the guided velocity over that of the final latent.
        gains: step → what was left of nudges at it.
        trials: as in the calibration.
        computed, forecast: seconds of steps.
        latents: final ones of each video.
    """

    grams: list[dict[str, list[float]]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    gains: dict[str, list[float]] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    forecast: list[float] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """All but the latents."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "latents"}


class _Plain(BaseModel):
    """What the file has to hold beside the latents."""

    model_config = ConfigDict(extra="forbid")

    grams: list[dict[StreamName, _Numbers]]
    scales: _Numbers
    gains: dict[str, _Numbers]
    trials: list[Trial]
    computed: _Numbers
    forecast: _Numbers


@dataclass(frozen=True, slots=True)
class PartialFile:
    """Where the findings of one calibration are kept until it is done. A foreign file is left alone.

    Attributes:
        path: of the file.
        identity: of the calibration.
        steps: of its sampler.
        shape: of a video's latents.
    """

    path: Path
    identity: str
    steps: int
    shape: Sequence[int]

    def write(self, findings: Findings) -> None:
        """Keep what is known.

        Raises:
            JobFailedError: the disk is full.
        """
        if is_foreign(self.path):
            return
        content = {"identity": self.identity, "found": json.dumps(findings.plain())}
        with whole_file(self.path) as temporary:
            save_tensors(content | {"latents": findings.latents}, temporary)

    def remove(self) -> None:
        """The calibration is done."""
        if not is_foreign(self.path):
            self.path.unlink(missing_ok=True)

    def read(self) -> Findings | None:
        """What was kept; None if there is nothing, or nothing that can be used, which is said.

        Raises:
            BadRequestError: it is of another calibration.
        """
        if not self.path.is_file():
            return None
        if is_foreign(self.path):
            log.warning("%s is no calibration that was begun; it is left alone, nothing is kept", self.path)
            return None
        try:
            kept = torch.load(io.BytesIO(self.path.read_bytes()), weights_only=True)
            identity = kept["identity"]
            if identity == self.identity:
                return self._checked(kept["found"], kept["latents"])
        except Exception as error:  # whatever torch makes of a damaged file
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            log.warning("%s cannot be read (%s); starting again", self.path, reason)
            return None
        raise BadRequestError(
            f"out: {str(self.path)!r} holds finished runs of another calibration (other prompts, settings or "
            "model); --overwrite starts again"
        )

    def _checked(self, text: str, latents: list[torch.Tensor]) -> Findings:
        """
        Raises:
            ValueError: it does not hold what it should.
        """
        try:
            plain = _Plain.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        videos, numbers = len(plain.grams), self.steps * (self.steps + 1) // 2
        whole = (
            len(plain.scales) == len(latents) == videos
            and all(len(values) == numbers for grams in plain.grams for values in grams.values())
            and all(tuple(one.shape) == tuple(self.shape) for one in latents)
            and all(step.isdecimal() and values for step, values in plain.gains.items())
            and (not videos or bool(plain.gains and plain.computed))
        )
        if not whole:
            raise ValueError("it does not hold what it should")
        return Findings(**plain.model_dump(), latents=latents)


def is_foreign(path: Path) -> bool:
    """Whether there is something that no calibration has written; one that is damaged is not foreign."""
    if not path.is_file():
        return path.exists() or path.is_symlink()
    with path.open("rb") as file:
        if file.read(2) not in (b"PK", b""):
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def check_partial(path: Path) -> None:
    """Refuse a place that is taken, before anything runs.

    Raises:
        BadRequestError: what lies there is no calibration that was begun, or cannot be read.
    """
    try:
        foreign = is_foreign(path)
    except OSError as error:
        raise BadRequestError(f"out: {str(path)!r} cannot be read: {error.strerror}") from None
    if foreign:
        raise BadRequestError(
            f"out: {str(path)!r} is in the way: finished runs are kept there, and it is no calibration that "
            "was begun; move it, or name another file"
        )
