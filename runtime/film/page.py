"""Page of a film: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from runtime.files.atomic import whole_file
from runtime.film.assemble import Part, length, starts, strip
from runtime.reports.report import Report
from runtime.reports.run_picture import COLOURS
from runtime.versions import versions

_WIDEST = 1920  # pixels of a shot's frames; the page shows them half as wide


@dataclass(frozen=True, slots=True)
class Scene:
    """A shot on the page.

    Attributes:
        id: id of the shot.
        part: the shot as a part of the film.
        report: report of the run that made it.
    """

    id: str
    part: Part
    report: Report

    @property
    def prompts(self) -> list[str]:
        """Prompts of the shot, in order."""
        request = self.report.request
        return [request["prompt"], *(point["prompt"] for point in request["travel"])]

    @property
    def strip(self) -> str:
        """Some frames of the shot side by side, as a data URL."""
        buffer, image = io.BytesIO(), Image.fromarray(strip(self.part))
        image.thumbnail((_WIDEST, image.height))
        image.save(buffer, format="png", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(scenes: Sequence[Scene], path: Path, *, title: str, fps: int) -> None:
    """Write the page, whole or not at all.

    Args:
        scenes: the shots, in order.
        path: the HTML file.
        title: title of the film.
        fps: frames per second.
    """
    parts = [scene.part for scene in scenes]
    page = _TEMPLATES.get_template("film_page.html").stream(
        title=title,
        fps=fps,
        frames=length(parts),
        shots=list(zip(scenes, starts(parts), strict=True)),
        slowest=max(scene.report.seconds.total for scene in scenes),
        colours={str(kind): colour for kind, colour in COLOURS.items()},
        versions=versions(),
    )
    with whole_file(path) as temporary:
        page.dump(str(temporary), encoding="utf-8", errors="backslashreplace")  # one shot after the other


_TEMPLATES = Environment(
    loader=PackageLoader("runtime.film", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
