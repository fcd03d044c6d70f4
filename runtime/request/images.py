"""Images that videos begin with: read once, decoded whole, and upright.

What is checked is what is used: digest and pixels come from the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import BadRequestError

MOST_BYTES = 512 * 2**20
# Decoded by Pillow itself: its others (EPS) start programs, or are read by nobody.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
_STRETCHED = 0.03  # relative difference of aspect ratios that is worth a word
_SIXTEEN_BITS = 65535


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, decoded.

    Attributes:
        path: what the user called it.
        digest: SHA-256 of its file.
        image: its pixels as RGB, turned as its EXIF orientation says, as diffusers' `load_image` gives them.
        notes: sentences about what of the file does not count.
    """

    path: str
    digest: str
    image: Image.Image
    notes: tuple[str, ...] = ()

    def warnings(self, width: int, height: int) -> list[str]:
        """Sentences about what may not be meant, where it is used at this size in pixels."""
        notes = [f"image: {self.path!r}: {note}" for note in self.notes]
        own, wanted = self.image.width / self.image.height, width / height
        if abs(own / wanted - 1) > _STRETCHED:
            notes.append(
                f"image: {self.path!r} is {self.image.width}×{self.image.height} and was stretched to "
                f"{width}×{height}; crop it to that aspect ratio, or ask for its own"
            )
        return notes


def read_picture(path: str) -> Picture:
    """The image in a file; the first of several.

    Raises:
        BadRequestError: there is none, or it cannot be decoded to its end; it is too large, or of a kind that
            is not read.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise _refusal(path, "it cannot be read: it is no file")
        if found.st_size > MOST_BYTES:
            raise _refusal(path, f"it has {found.st_size} bytes, the limit is {MOST_BYTES}")
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _refusal(path, f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    image, notes = _decoded(path, content)
    return Picture(path, hashlib.sha256(content).hexdigest(), image, tuple(notes))


def image_digest(path: str) -> str:
    """SHA-256 of an image's file, which is decoded whole.

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


def _decoded(path: str, content: bytes) -> tuple[Image.Image, list[str]]:
    """Its pixels as RGB, and notes on what was left out."""
    Image.init()
    formats = [one for one in _FORMATS if one in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our limit is Pillow's upper one
            with Image.open(BytesIO(content), formats=formats) as file:
                notes = []
                if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":  # a phone's second view
                    notes.append("it is animated, and only its first frame counts")
                file.load()
                return _rgb(path, ImageOps.exif_transpose(file), notes), notes
    except BadRequestError:
        raise
    except UnidentifiedImageError:
        raise _refusal(path, f"it is no image of a kind that is read ({', '.join(formats)})") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _refusal(
            path,
            f"it has {pixels[0] if pixels else 'too many'} pixels, the limit is {_most_pixels()}",
        ) from None
    except MemoryError:
        raise _refusal(path, "it needs more memory than there is") from None
    except Exception as error:  # decoders raise anything at broken files
        raise _refusal(path, f"it cannot be read: {error or type(error).__name__}") from None


def _rgb(path: str, image: Image.Image, notes: list[str]) -> Image.Image:
    """Any mode as RGB. Where a mode holds more than 8 bits it is scaled, which Pillow itself does not do."""
    if image.mode.startswith("I;16"):
        return _scaled(np.asarray(image, np.float64) / _SIXTEEN_BITS)
    if image.mode == "I":
        values = np.asarray(image, np.float64)
        if values.min() < 0 or values.max() > _SIXTEEN_BITS:
            raise _refusal(
                path, f"its values reach from {values.min():g} to {values.max():g}; save it with 8 or 16 bits"
            )
        return _scaled(values / _SIXTEEN_BITS)
    if image.mode == "F":
        values = np.asarray(image, np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise _refusal(path, "it holds floats that are not all from 0 to 1; save it with 8 or 16 bits")
        return _scaled(values)
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        notes.append("its transparency does not count")
    return image.convert("RGB")


def _scaled(gray: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(gray * 255).astype(np.uint8)).convert("RGB")


def _most_pixels() -> int:
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def _refusal(path: str, problem: str) -> BadRequestError:
    return BadRequestError(f"image: {path!r} given; {problem}")
