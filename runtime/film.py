"""Shots → one film: joined, with chapters, a poster and a contact sheet. ffmpeg does the work.

Cuts alone are joined without encoding anything again; with a crossfade the film is encoded once more.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import JobFailedError
from runtime.files import whole_file
from runtime.video import Frames

_SHOWN, _LABEL, _GAP = 5, 18, 6  # frames of each shot on the contact sheet; pixels
_CODEC = (
    "-c:v", "libx264", "-preset", "medium", "-crf", "14", "-pix_fmt", "yuv420p",
    "-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One shot of a film.

    Attributes:
        video: its mp4.
        frames: its length.
        fade: frames that fade over from the part before; 0 for a cut.
    """

    title: str
    video: Path
    frames: int
    fade: int = 0


def starts(parts: Sequence[Part]) -> list[int]:
    """The film's frame at which each part begins."""
    found, at = [], 0
    for part in parts:
        at -= part.fade
        found.append(at)
        at += part.frames
    return found


def length(parts: Sequence[Part]) -> int:
    """Frames of the film."""
    return sum(part.frames - part.fade for part in parts)


def join_film(parts: Sequence[Part], path: Path, *, title: str, fps: int, audio: Path | None = None) -> None:
    """Write the film, whole or not at all.

    Args:
        parts: of one size and rate.
        audio: a track; what is longer than the film is cut off.

    Raises:
        JobFailedError: ffmpeg failed.
    """
    with tempfile.TemporaryDirectory(prefix="lockstep-film-") as folder, whole_file(path) as temporary:
        chapters = Path(folder) / "chapters.txt"
        chapters.write_text(_chapters(parts, title, fps), encoding="utf-8")
        sources, filters, codec = _sources(parts, Path(folder), fps)
        count = len(parts) if filters else 1
        sound = [] if audio is None else ["-i", str(audio)]
        streams = ["-map", "[film]" if filters else "0:v"]
        if audio is not None:
            streams += ["-map", f"{count + 1}:a", "-c:a", "aac", "-t", f"{length(parts) / fps:.6f}"]
        described = ["-map_metadata", str(count), "-map_chapters", str(count)]
        inputs = [*sources, "-i", str(chapters), *sound]
        _ffmpeg(*inputs, *filters, *streams, *codec, *described, "-movflags", "+faststart", str(temporary))


def _sources(parts: Sequence[Part], folder: Path, fps: int) -> tuple[list[str], list[str], list[str]]:
    """Inputs, filters and codec."""
    if not any(part.fade for part in parts):
        listing = folder / "parts.txt"
        quoted = (str(part.video.resolve()).replace("'", "'\\''") for part in parts)
        listing.write_text("".join(f"file '{name}'\n" for name in quoted), encoding="utf-8")
        return ["-f", "concat", "-safe", "0", "-i", str(listing)], [], ["-c:v", "copy"]
    sources = [argument for part in parts for argument in ("-i", str(part.video))]
    steps, last = [f"[0:v]settb=1/{fps}[p0]"], "p0"
    for number, (part, start) in enumerate(zip(parts[1:], starts(parts)[1:], strict=True), 1):
        name = f"p{number}"
        steps.append(f"[{number}:v]settb=1/{fps}[s{number}]")
        if part.fade:
            timing = f"duration={part.fade / fps:.6f}:offset={start / fps:.6f}"
            steps.append(f"[{last}][s{number}]xfade=transition=fade:{timing}[{name}]")
        else:
            steps.append(f"[{last}][s{number}]concat=n=2:v=1:a=0,settb=1/{fps}[{name}]")
        last = name
    steps.append(f"[{last}]null[film]")
    colours = [
        "-color_range",
        "tv",
        "-colorspace",
        "bt709",
        "-color_primaries",
        "bt709",
        "-color_trc",
        "bt709",
    ]
    return sources, ["-filter_complex", ";".join(steps)], [*_CODEC, *colours, "-r", str(fps)]


def _chapters(parts: Sequence[Part], title: str, fps: int) -> str:
    """ffmpeg's metadata file."""
    lines = [";FFMETADATA1", f"title={_escaped(title)}"]
    begins = starts(parts)
    for part, start, end in zip(parts, begins, [*begins[1:], length(parts)], strict=True):
        lines += [
            "[CHAPTER]",
            f"TIMEBASE=1/{fps}",
            f"START={start}",
            f"END={end}",
            f"title={_escaped(part.title)}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    for special in "\\=;#\n":
        text = text.replace(special, f"\\{special}")
    return text


def read_frames(video: Path) -> Frames:
    """All frames of an mp4, `[T, H, W, 3]`.

    Raises:
        JobFailedError: ffmpeg could not read it.
    """
    reader = imageio_ffmpeg.read_frames(str(video))
    try:
        width, height = next(reader)["source_size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, StopIteration) as error:
        raise JobFailedError(f"cannot read {str(video)!r}: {error}") from None
    return np.stack(frames)


def write_poster(parts: Sequence[Part], path: Path) -> None:
    """The middle frame of the first shot as a PNG."""
    frames = read_frames(parts[0].video)
    with whole_file(path) as temporary:
        Image.fromarray(frames[len(frames) // 2]).save(temporary, format="png")


def pick_frames(video: Path) -> NDArray[np.uint8]:
    """Five frames of an mp4, from its first to its last, beside each other: `[H, 5 W, 3]`."""
    frames = read_frames(video)
    picked = frames[np.linspace(0, len(frames) - 1, _SHOWN).round().astype(int)]
    return np.concatenate(list(picked), axis=1)


def write_contact_sheet(parts: Sequence[Part], path: Path) -> None:
    """Five frames of every shot under its title, as a PNG."""
    rows = []
    for part in parts:
        body = pick_frames(part.video)
        label = Image.new("RGB", (body.shape[1], _LABEL), "white")
        ImageDraw.Draw(label).text((2, 2), part.title, fill="black", font=ImageFont.load_default(12))
        gap = np.full((_GAP, body.shape[1], 3), 255, np.uint8)
        rows.append(np.concatenate([np.asarray(label), body, gap]))
    with whole_file(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="png", optimize=True)


def _ffmpeg(*arguments: str) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise JobFailedError(f"ffmpeg could not join the film (exit {done.returncode}): {said}")
