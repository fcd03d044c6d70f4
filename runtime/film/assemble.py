"""Assembling shots into a film with chapters, a poster and a contact sheet, by ffmpeg.

With cuts alone nothing is encoded again; with a crossfade the film is encoded once more.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import JobFailedError, reason
from runtime.files.atomic import whole_file
from runtime.files.scratch import scratch_file
from runtime.media.ffmpeg import ALIVE, Ffmpeg, file_url
from runtime.media.frames import pick_frames
from runtime.media.mp4 import CODEC

_TOLD = 3  # lines of ffmpeg's output in an error
_SHOWN, _LABEL, _GAP = 5, 18, 6  # frames of each shot on the contact sheet; pixels
_LARGEST = 1 << 25  # pixels of a contact sheet; frames are shrunk to stay below


@dataclass(frozen=True, slots=True)
class Part:
    """One shot as a part of a film.

    Attributes:
        title: title of its chapter.
        video: its mp4.
        frames: its length in frames.
        fade: frames of the crossfade from the part before; 0 for a cut.
    """

    title: str
    video: Path
    frames: int
    fade: int = 0


def starts(parts: Sequence[Part]) -> list[int]:
    """Frame of the film at which each part begins."""
    found, at = [], 0
    for part in parts:
        at -= part.fade
        found.append(at)
        at += part.frames
    return found


def length(parts: Sequence[Part]) -> int:
    """Length of the film, in frames."""
    return sum(part.frames - part.fade for part in parts)


def join_film(parts: Sequence[Part], path: Path, *, title: str, fps: int, audio: Path | None = None) -> None:
    """Join parts into a film, which appears whole or not at all.

    Args:
        parts: parts of one size and frame rate.
        path: the film.
        title: its title.
        fps: frames per second.
        audio: soundtrack; it is cut off at the end of the film.

    Raises:
        JobFailedError: ffmpeg failed, or a part is damaged.
    """
    folder = parts[0].video.resolve().parent
    with ExitStack() as stack:
        temporary = stack.enter_context(whole_file(path.resolve()))
        listing = stack.enter_context(scratch_file())
        listing.write(b"".join(_listed(part.video, folder) for part in parts))
        concat = ["-f", "concat", "-safe", "0", "-err_detect", "explode"]  # opens one at a time
        sources = [*concat, "-i", file_url(listing.path)]
        if any(part.fade for part in parts):
            filters = stack.enter_context(scratch_file())
            filters.write(_crossfades(parts, fps).encode())  # too long for an argument with many parts
            film, made = "[film]", ["-/filter_complex", str(filters.path), *CODEC, "-r", str(fps)]
        else:
            film, made = "0:v", ["-c:v", "copy"]
        chapters = stack.enter_context(scratch_file())
        chapters.write(_chapters(parts, title, fps).encode())
        inputs = [*sources, "-f", "ffmetadata", "-i", file_url(chapters.path)]
        streams = ["-map", film]
        if audio is not None:
            inputs += ["-protocol_whitelist", "file", "-i", file_url(audio.resolve())]
            streams += ["-map", "2:a", "-c:a", "aac", "-t", f"{length(parts) / fps:.6f}"]
        described = ["-map_metadata", "1", "-map_chapters", "1"]
        output = [*described, "-movflags", "+faststart", "-f", "mp4", file_url(temporary)]
        arguments = [*ALIVE, *inputs, *made, *streams, *output]
        with Ffmpeg(*arguments, doing="join the film", folder=folder) as ffmpeg:
            there = int((re.findall(rb"(?m)^frame=\s*(\d+)", ffmpeg.finish()) or [0])[-1])
        if there != length(parts):  # at an unreadable shot ffmpeg stops without a failure
            said = " / ".join(ffmpeg.said.splitlines()[-_TOLD:])
            raise JobFailedError(
                f"ffmpeg could not join the film: its shots have {there} frames, not {length(parts)}; remove "
                f"the damaged shot from {str(folder)!r} to have it made again{said and ': '}{said}"
            )


def _listed(video: Path, folder: Path) -> bytes:
    """Line of ffmpeg's list of files, relative to `folder`."""
    name = os.fsencode(os.path.relpath(video.resolve(), folder)).replace(b"'", b"'\\''")
    return b"file 'file:" + name + b"'\n"


def _crossfades(parts: Sequence[Part], fps: int) -> str:
    """Make ffmpeg's filters from the parts, one after the other, to `[film]`.

    Parts are cut into a beginning that fades in, a middle, and an end that fades out, and joined again in
    this order, so that each frame passes few filters and none is buffered for long, with any number of parts.
    """
    pieces: dict[str, int] = {}
    joined, mixed = [], []
    for number, part in enumerate(parts):
        leaving = parts[number + 1].fade if number + 1 < len(parts) else 0
        if part.fade:
            pieces[f"in{number}"] = part.fade
            timing = f"duration={part.fade / fps:.6f}:offset=0"
            mixed.append(
                f"[out{number - 1}][in{number}]xfade=transition=fade:{timing},settb=1/{fps}[fade{number}]"
            )
            joined.append(f"[fade{number}]")
        pieces[f"stay{number}"] = part.frames - part.fade - leaving
        joined.append(f"[stay{number}]")
        if leaving:
            pieces[f"out{number}"] = leaving
    ends = "|".join(str(end) for end in list(accumulate(pieces.values()))[:-1])
    cut = f"[0:v]settb=1/{fps},segment=frames={ends}{''.join(f'[cut-{name}]' for name in pieces)}"
    begun = [f"[cut-{name}]settb=1/{fps},setpts=N,fps={fps}[{name}]" for name in pieces]
    film = f"{''.join(joined)}concat=n={len(joined)}:v=1:a=0,settb=1/{fps},setpts=N[film]"
    return ";\n".join([cut, *begun, *mixed, film])


def _chapters(parts: Sequence[Part], title: str, fps: int) -> str:
    """Make ffmpeg's metadata file, with a chapter for each part."""
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
    text = one_line(text)
    for special in "\\=;#":
        text = text.replace(special, f"\\{special}")
    return text


def one_line(text: str) -> str:
    """Put a title on one line for players and pictures, without control characters."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def write_poster(parts: Sequence[Part], path: Path) -> None:
    """Write the middle frame of the first shot as a PNG."""
    first = parts[0]
    (frame,) = pick_frames(first.video, [first.frames // 2])
    with whole_file(path) as temporary:
        Image.fromarray(frame).save(temporary, format="png")


def strip(part: Part) -> NDArray[np.uint8]:
    """Read five frames of a shot, from its first to its last, side by side: `[H, 5 W, 3]`."""
    wanted = np.linspace(0, part.frames - 1, _SHOWN).round().astype(int).tolist()
    return np.concatenate(pick_frames(part.video, wanted), axis=1)


def write_contact_sheet(parts: Sequence[Part], path: Path) -> None:
    """Write five frames of every shot under its title, as a PNG."""
    first = strip(parts[0])
    height, width = sheet_size(len(parts), *first.shape[:2])
    row = height + _LABEL + _GAP
    sheet = Image.new("RGB", (width, row * len(parts)), "white")
    for number, part in enumerate(parts):
        body = Image.fromarray(strip(part))
        if body.size != (width, height):
            body = body.resize((width, height), Image.Resampling.LANCZOS)
        label = Image.new("RGB", (width, _LABEL), "white")
        font = ImageFont.load_default(12)
        ImageDraw.Draw(label).text((2, 2), one_line(part.title), fill="black", font=font)
        sheet.paste(label, (0, row * number))
        sheet.paste(body, (0, row * number + _LABEL))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="png", optimize=True)


def sheet_size(shots: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a shot's frames on a contact sheet of `shots` shots."""
    scale = 1.0
    while shots * (scale * height + _LABEL + _GAP) * scale * width > _LARGEST and scale * height > 1:
        scale *= 0.95
    return max(1, int(scale * height)), max(_SHOWN, int(scale * width))


def check_audio(path: Path, seconds: float) -> str:
    """Say why a file cannot be the sound track of a film of so many seconds; empty if it can.

    It is decoded as far as it will be heard.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"it is {'a folder' if path.is_dir() else 'a pipe or a device'}, a file is needed"
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return f"it cannot be read: {reason(error)}"
    source = ["-protocol_whitelist", "file", "-i", file_url(path.resolve())]
    heard = ["-map", "0:a", "-t", f"{seconds:.6f}", "-f", "framecrc", "pipe:1"]
    try:
        with Ffmpeg(*source, *heard, doing="read it") as ffmpeg:
            packets = [line for line in ffmpeg.finish().splitlines() if not line.startswith(b"#")]
    except JobFailedError as error:
        return f"it has no readable sound: {error}"
    return "" if packets else "it has no sound"
