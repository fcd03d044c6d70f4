"""Images that videos start from: read once, decoded completely, and turned upright.

Digest and pixels come from the same bytes, so the image that was checked is the one that is used.
"""

from __future__ import annotations

import hashlib
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import BadRequestError, reason

MOST_BYTES = 512 * 2**20
# Decoded by Pillow itself: others (EPS) start external programs, or are not in use.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
_STRETCHED = 0.03  # relative difference of aspect ratios above which a warning is given
_SIXTEEN_BITS = 65535


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image.

    Attributes:
        path: path as the user gave it.
        digest: SHA-256 of the file.
        image: pixels as RGB, rotated by the EXIF orientation, as from diffusers' `load_image`.
        notes: sentences about parts of the file that are ignored.
    """

    path: str
    digest: str
    image: Image.Image
    notes: tuple[str, ...] = ()

    def warnings(self, width: int, height: int) -> list[str]:
        """Warnings for its use at this size in pixels, as sentences."""
        notes = [f"image: {self.path!r}: {note}" for note in self.notes]
        own, wanted = self.image.width / self.image.height, width / height
        if abs(own / wanted - 1) > _STRETCHED:
            notes.append(
                f"image: {self.path!r} is {self.image.width}×{self.image.height} and was stretched to "
                f"{width}×{height}; crop it to that aspect ratio, or request a video with its own"
            )
        return notes


def read_picture(path: str) -> Picture:
    """Read and decode an image file; only the first frame of several is used.

    Raises:
        BadRequestError: there is no such file, or it cannot be decoded completely, is too large, or has a
            format that is not supported.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe may block
            raise _refusal(path, "it cannot be read: it is not a regular file")
        if found.st_size > MOST_BYTES:
            raise _refusal(path, f"it has {found.st_size} bytes, the limit is {MOST_BYTES}")
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _refusal(path, f"it cannot be read: {reason(error)}") from None
    image, notes = decode_image(path, content)
    return Picture(path, hashlib.sha256(content).hexdigest(), image, tuple(notes))


def image_digest(path: str) -> str:
    """SHA-256 of an image file, after decoding it completely.

    Raises:
        BadRequestError: see `read_picture`.
    """
    return read_picture(path).digest


def check_image(path: str | None) -> None:
    """Refuse an image that cannot be used, before any work is done for it.

    Raises:
        BadRequestError: see `read_picture`.
    """
    if path is not None:
        read_picture(path)


def decode_image(
    path: str, content: bytes, formats: Sequence[str] = FORMATS
) -> tuple[Image.Image, list[str]]:
    """Decode an image to upright RGB, with notes about parts that are ignored.

    Args:
        path: what to call it in messages.
        content: of the file.
        formats: those that are decoded.

    Raises:
        BadRequestError: it cannot be decoded completely, is too large, or has another format.
    """
    Image.init()
    formats = [one for one in formats if one in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our limit is Pillow's upper one, an error
            with Image.open(BytesIO(content), formats=formats) as file:
                notes = []
                if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":  # a phone's second view
                    notes.append("it is animated; only its first frame is used")
                file.load()
                return _rgb(path, ImageOps.exif_transpose(file), notes), notes
    except BadRequestError:
        raise
    except UnidentifiedImageError:
        raise _refusal(path, f"it is not an image of a supported format ({', '.join(formats)})") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _refusal(
            path,
            f"it has {pixels[0] if pixels else 'too many'} pixels, the limit is {_most_pixels()}",
        ) from None
    except MemoryError:
        raise _refusal(path, "it needs more memory than is available") from None
    except Exception as error:  # decoders raise anything for broken files
        raise _refusal(path, f"it cannot be read: {reason(error)}") from None


def _rgb(path: str, image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert any mode to RGB; modes of more than 8 bits are scaled, which Pillow itself does not do."""
    if image.mode.startswith("I;16"):
        return _scaled(np.asarray(image, np.float64) / _SIXTEEN_BITS)
    if image.mode == "I":
        values = np.asarray(image, np.float64)
        if values.min() < 0 or values.max() > _SIXTEEN_BITS:
            raise _refusal(
                path, f"its values range from {values.min():g} to {values.max():g}; save it with 8 or 16 bits"
            )
        return _scaled(values / _SIXTEEN_BITS)
    if image.mode == "F":
        values = np.asarray(image, np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise _refusal(path, "it has float values outside 0 … 1; save it with 8 or 16 bits")
        return _scaled(values)
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        notes.append("its transparency is ignored")
    return image.convert("RGB")


def _scaled(gray: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(gray * 255).astype(np.uint8)).convert("RGB")


def _most_pixels() -> int:
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def _refusal(path: str, problem: str) -> BadRequestError:
    return BadRequestError(f"image: {path!r} given; {problem}")
