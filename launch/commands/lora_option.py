"""The option `--lora`: a file and its scale, in one word or in two. Imports nothing slow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import click


class LoraOption(click.Option):
    """`--lora FILE`, `--lora FILE=SCALE` or `--lora FILE SCALE`. Its parser takes two words, always."""

    def in_two_words(self, arguments: Sequence[str]) -> list[str]:
        """Rewrite the option in a command's arguments as `--lora FILE SCALE`.

        A word after FILE is its scale if it is a number. What follows the last `=` of FILE is its scale if it
        is a number, or if a safetensors file is before it; other files may have `=` in their names.
        """
        written, left = list[str](), deque(arguments)
        while left:
            word = left.popleft()
            name, given, file = word.partition("=")
            if word == "--":  # only arguments follow
                return [*written, word, *left]
            if name not in self.opts or not (given or left):
                written.append(word)
                continue
            file, scale = _split(file if given else left.popleft())
            if scale is None:
                scale = left.popleft() if left and _is_number(left[0]) else "1"
            written += [name, file, scale]
        return written


def _split(given: str) -> tuple[str, str | None]:
    """Split FILE=SCALE; the scale is None where it is only a file."""
    file, _, scale = given.rpartition("=")
    if file and (_is_number(scale) or file.endswith(".safetensors")):
        return file, scale
    return given, None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
