"""Texts are encoded once, and to the same bits wherever the encoder has been meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.models.base import Embeddings
from runtime.models.wan.text import PromptEncoder, _Known
from runtime.parallel.offloading import Visitor
from runtime.parallel.ranks import Ranks
from runtime.profile import ModelProfile
from runtime.request.config import Config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest

Make = Callable[..., VideoRequest]
CPU = torch.device("cpu")


def opened(config: Config, where: str = "keep") -> PromptEncoder:
    memory = Memory.model_validate({"text_encoder": where})
    changed = config.model_copy(update={"memory": memory})
    return PromptEncoder(ModelProfile(changed).folder, changed, Ranks.alone(CPU), torch.float32)


def same(one: Embeddings, other: Embeddings) -> bool:
    assert one.negative is not None and other.negative is not None
    pairs = zip([*one.prompts, one.negative], [*other.prompts, other.negative], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("where", ["keep", "offload", "free"])
def test_a_text_is_encoded_once(config: Config, small: Make, where: str) -> None:
    text = opened(config, where)
    first = text.encode(small(negative="blurry"))
    assert text.encoded == 2
    other = text.encode(small(negative="blurry").model_copy(update={"prompt": "a blue square"}))
    assert text.encoded == 3
    again = text.encode(small(negative="blurry", seed=3))
    swapped = text.encode(small(negative="a blue square").model_copy(update={"prompt": "blurry"}))
    assert text.encoded == 3 and (text._encoder is None) == (where == "free")
    assert same(again, first) and torch.equal(swapped.prompts[0], other.negative)
    assert torch.equal(swapped.negative, other.prompts[0])  # type: ignore[arg-type]
    text.encode(small(negative="blurry", max_sequence_length=16))  # is padded to another length
    assert text.encoded == 5


def test_known_embeddings_are_those_of_a_new_encoder(config: Config, small: Make) -> None:
    text = opened(config)
    text.encode(small(negative="blurry"))
    for fields in ({"videos": 2}, {"prompt": "blurry", "negative": "a red circle"}, {"seed": 3}):
        request = small(negative="blurry").model_copy(update=fields)
        known = text.encode(request)
        assert same(known, opened(config).encode(request))
        assert known.prompts[0].shape[0] == request.videos


def test_warnings_are_those_of_the_request_also_when_its_texts_are_known(config: Config, small: Make) -> None:
    text, long = opened(config), small().model_copy(update={"prompt": "a red circle " * 20})
    text.encode(long)
    said = text.warnings
    text.encode(small())
    assert len(said) == 1 and text.warnings == []
    text.encode(long.model_copy(update={"videos": 2}))
    assert text.warnings == said


def test_encodings_are_the_same_bits_after_the_encoder_has_left_and_come_back(
    config: Config, small: Make
) -> None:
    text, request = opened(config), small(negative="blurry")
    encoder = text._encoder
    assert encoder is not None
    visitor = Visitor(encoder, CPU)
    found = []
    for _ in range(3):
        visitor.leave()
        visitor.come()
        text._known, text._last = _Known(), None
        found.append(text.encode(request))
    assert text.encoded == 6
    assert same(found[1], found[0]) and same(found[2], found[0])
    tied = encoder.get_input_embeddings().weight
    assert tied.untyped_storage().data_ptr() == encoder.shared.weight.untyped_storage().data_ptr()


def test_the_least_recently_used_embeddings_are_forgotten() -> None:
    one = torch.zeros(1, 4, 8)
    known = _Known(room=2 * one.nbytes)
    for text in ("a", "b"):
        known.keep(text, 4, one.clone())
    assert known.find("a", 4) is not None and known.find("a", 5) is None
    known.keep("c", 4, one.clone())
    assert [known.find(text, 4) is not None for text in "abc"] == [True, False, True]
