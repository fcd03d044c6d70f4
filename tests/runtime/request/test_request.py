"""Requests are refused at the door, with one clear line per bad field."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.errors import BadRequestError
from runtime.request.video_request import VideoRequest

GOOD: dict[str, Any] = {
    "prompt": "a red circle",
    "width": 96,
    "height": 96,
    "frames": 17,
    "steps": 50,
    "guidance": 5.0,
}


def test_a_good_request_is_kept_as_it_is() -> None:
    request = VideoRequest.parse(**GOOD)
    assert request.model_dump()["frames"] == 17
    assert request.guided
    assert not VideoRequest.parse(**{**GOOD, "guidance": 1.0}).guided


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("prompt", "", "must not be empty"),
        ("prompt", " \n", "must not be empty"),
        ("width", 100, "multiple of 16; the nearest are 96 and 112"),
        ("height", 8, "greater than or equal to 16"),
        ("width", 100_000, "less than or equal to 8192"),
        ("frames", 18, "4k \\+ 1; the nearest are 17 and 21"),
        ("frames", 0, "greater than or equal to 1"),
        ("steps", 0, "greater than or equal to 1"),
        ("steps", 2.5, "integer"),
        ("guidance", float("nan"), "finite"),
        ("guidance", float("inf"), "finite"),
        ("guidance", -1.0, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than or equal"),
        ("max_sequence_length", 0, "greater than or equal to 1"),
        ("videos", 0, "greater than or equal to 1"),
    ],
)
def test_a_bad_field_is_named_with_what_was_given_and_what_is_allowed(
    field: str, value: object, allowed: str
) -> None:
    with pytest.raises(BadRequestError, match=allowed) as caught:
        VideoRequest.parse(**{**GOOD, field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: {value!r} given; ")
    assert "\n" not in message


@pytest.mark.parametrize("field", ["prompt", "negative", "spectrum", "image"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("caf\udce9", "at character 4 it has the byte 0xe9, which is not UTF-8"),
        ("\ud800", "character 1 it has the character U\\+D800"),
        ("a\0b", "character 2 it has the character U\\+0000"),
        ("\x1b[31m", "character 1 it has the character U\\+001B"),
        ("a" * 20_001, "it has 20001"),
    ],
)
def test_what_is_no_text_is_refused(field: str, text: str, said: str) -> None:
    with pytest.raises(BadRequestError, match=f"^{field}: .*{said}") as caught:
        VideoRequest.parse(**{**GOOD, field: text})
    assert len(str(caught.value).encode()) < 300


@pytest.mark.parametrize("text", ["猫 🐈‍⬛ e\u0301", "two\nlines\tand a tab", "a" * 20_000])
def test_what_is_text_is_kept(text: str) -> None:
    assert VideoRequest.parse(**{**GOOD, "prompt": text, "negative": text}).prompt == text


@pytest.mark.parametrize("text", ["\u200b", "\n\t \u3000", "\ufeff"])
def test_what_shows_nothing_is_no_prompt(text: str) -> None:
    with pytest.raises(BadRequestError, match="must not be empty"):
        VideoRequest.parse(**{**GOOD, "prompt": text})


def test_a_field_that_is_nearly_one_is_suggested() -> None:
    with pytest.raises(BadRequestError, match=r"^guidence: unknown field; did you mean guidance\?$"):
        VideoRequest.parse(**{**GOOD, "guidence": 5})


def test_every_bad_field_has_a_line() -> None:
    with pytest.raises(BadRequestError) as caught:
        VideoRequest.parse(**{**GOOD, "width": 1, "steps": 0, "colour": "red"})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["width", "steps", "colour"]


def test_a_missing_field_is_said_to_be_missing() -> None:
    with pytest.raises(BadRequestError, match="width: missing"):
        VideoRequest.parse(**{k: v for k, v in GOOD.items() if k != "width"})
