"""The file that keeps the findings of a calibration over an interruption."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BadRequestError, reason, setting
from runtime.files.atomic import whole_file
from runtime.files.problems import explain
from runtime.files.tensors import save_tensors
from runtime.forecasting.calibration import StreamName
from runtime.forecasting.fits import Fit
from runtime.forecasting.trials import Trial
from spectrum.calibration import Findings

log = logging.getLogger(__name__)

_HEAD = 256  # bytes of the pickle, within which the first field is named
_Numbers = list[Annotated[float, Field(allow_inf_nan=False)]]


class TrialPass(BaseModel):
    """A trial pass of a solver.

    Attributes:
        nfe: number of computed steps.
        power: power of the sensitivities with which its nodes were chosen; None for the steps of the plan.
        nodes: computed steps.
        errors: relative error of each video.
    """

    model_config = ConfigDict(extra="forbid")

    nfe: int
    power: float | None
    nodes: list[int]
    errors: _Numbers


class _Plain(BaseModel):
    """Content of the file, beside the latents."""

    model_config = ConfigDict(extra="forbid")

    grams: list[dict[StreamName, _Numbers]]
    scales: _Numbers
    trajectories: list[_Numbers]
    gains: dict[str, _Numbers]
    responses: dict[str, _Numbers]
    trials: list[Trial]
    passes: list[TrialPass]
    fits: list[Fit]
    computed: _Numbers
    forecast: _Numbers


@dataclass(frozen=True, slots=True)
class PartialFile:
    """File that keeps the findings of one calibration until it is done. A foreign file is left alone.

    Attributes:
        path: path of the file.
        identity: identity of the calibration.
        steps: number of sampler steps.
        shape: shape of a video's latents.
    """

    path: Path
    identity: str
    steps: int
    shape: Sequence[int]

    def write(self, findings: Findings) -> None:
        """Write the findings to the file.

        Raises:
            JobFailedError: the disk is full.
        """
        if is_foreign(self.path):
            return
        content = {"identity": self.identity, "found": json.dumps(findings.plain())}
        with whole_file(self.path) as temporary:
            save_tensors(content | {"latents": findings.latents}, temporary)

    def remove(self) -> None:
        """Remove the file, as the calibration is done."""
        if not is_foreign(self.path):
            self.path.unlink(missing_ok=True)

    def read(self) -> Findings | None:
        """Read the findings; None if there is no file, or no usable one, which is logged.

        Raises:
            BadRequestError: the findings belong to another calibration.
        """
        if not self.path.is_file():
            return None
        if is_foreign(self.path):
            log.warning(
                "%s is not an unfinished calibration; it is not changed, and finished runs are not saved",
                self.path,
            )
            return None
        try:
            kept = torch.load(io.BytesIO(self.path.read_bytes()), weights_only=True)
            identity = kept["identity"]
            if identity == self.identity:
                return self._checked(kept["found"], kept["latents"])
        except Exception as error:  # torch raises anything for damaged files
            log.warning("%s cannot be read (%s); starting again", self.path, reason(error)[:200])
            return None
        raise BadRequestError(
            f"out: {str(self.path)!r} holds finished runs of another calibration (other prompts, settings or "
            f"model); {setting('overwrite')} starts again"
        )

    def _checked(self, text: str, latents: list[torch.Tensor]) -> Findings:
        """Check the content of the file.

        Raises:
            ValueError: it is incomplete or inconsistent.
        """
        try:
            plain = _Plain.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        videos, numbers = len(plain.grams), self.steps * (self.steps + 1) // 2
        whole = (
            len(plain.scales) == len(plain.trajectories) == len(latents) == videos
            and all(len(values) == numbers + self.steps + 1 for values in plain.trajectories)
            and all(step.isdecimal() and values for step, values in plain.responses.items())
            and all(len(one.errors) == videos for one in plain.passes)
            and all(len(values) == numbers for grams in plain.grams for values in grams.values())
            and all(tuple(one.shape) == tuple(self.shape) for one in latents)
            and all(step.isdecimal() and values for step, values in plain.gains.items())
            and (not videos or bool(plain.gains and plain.computed))
        )
        if not whole:
            raise ValueError("its content is incomplete or inconsistent")
        return Findings(**plain.model_dump(), latents=latents)


def is_foreign(path: Path) -> bool:
    """Return whether something at `path` was not written by a calibration; damaged files are not foreign."""
    if not path.is_file():
        return path.exists() or path.is_symlink()
    with path.open("rb") as file:
        if file.read(2) not in (b"PK", b""):
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(_is_findings(archive, name) for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _is_findings(archive: zipfile.ZipFile, name: str) -> bool:
    """Return whether a member of an archive is torch's pickle of what `PartialFile.write` saves."""
    if not name.endswith("/data.pkl"):
        return False
    with archive.open(name) as pickled:
        return b"identity" in pickled.read(_HEAD)


def check_partial(path: Path) -> None:
    """Refuse a path for finished runs that is in use by another file, before anything runs.

    Raises:
        BadRequestError: a file at `path` is not an unfinished calibration, or cannot be read.
    """
    try:
        foreign = is_foreign(path)
    except OSError as error:
        raise BadRequestError(f"out: {str(path)!r} cannot be read: {reason(error)}") from None
    if foreign:
        raise BadRequestError(
            f"out: {str(path)!r} is not an unfinished calibration, but finished runs are stored in a file of "
            "this name; move the file, or give another name"
        )
