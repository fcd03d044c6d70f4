"""Decodes an uploaded image in a process of its own: a decompression bomb ends that process and nothing else.

The result is encoded again by Lockstep, so no other process ever reads a byte that a client chose.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from PIL import Image

from runtime.errors import BadRequestError
from runtime.files.interpreter import interpreter
from runtime.request.images import decode_image

MOST_BYTES = 20 * 2**20  # of an upload
_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS = 40_000_000
_MEMORY, _SECONDS = 2 * 2**30, 20  # of the process
_REFUSED = 2  # its exit code when it can say why


def decode_apart(content: bytes) -> bytes:
    """Decode an image to an upright RGB PNG of at most 40 million pixels.

    Raises:
        BadRequestError: it is not a PNG, JPEG or WebP, or is too large.
    """
    if len(content) > MOST_BYTES:
        raise BadRequestError(f"image: {len(content)} bytes given; the limit is {MOST_BYTES // 2**20} MiB")
    command = [*interpreter(), "-m", __name__]
    try:
        ended = subprocess.run(command, input=content, capture_output=True, timeout=2 * _SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BadRequestError("image: it takes too long to decode") from None
    if ended.returncode == 0:
        return ended.stdout
    said = ended.stderr.decode(errors="replace").strip() if ended.returncode == _REFUSED else ""
    raise BadRequestError(said or "image: decoding it needs too much memory or time")


def main() -> None:
    """Decode the image on stdin and write it to stdout; the reason for a refusal goes to stderr."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # Pillow refuses twice as many
    try:
        image, _ = decode_image("upload", sys.stdin.buffer.read(), _FORMATS)
    except BadRequestError as error:
        sys.stderr.write(str(error))
        sys.exit(_REFUSED)
    image.save(sys.stdout.buffer, "PNG", compress_level=1)


if __name__ == "__main__":
    main()
