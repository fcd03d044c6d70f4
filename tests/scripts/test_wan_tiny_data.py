"""wan-tiny's clips and the measurements that judge it."""

from __future__ import annotations

import numpy as np
import pytest
from wan_tiny_data import FRAMES, SCENES, SIZE, clip_batch, render, scene_for, vocabulary
from wan_tiny_measure import measure


def test_measurements_are_right_on_rendered_clips() -> None:
    wrong = []
    for index, scene in enumerate(SCENES[::5]):
        clip = render(scene, np.random.default_rng(index))
        finding = measure((clip.transpose(1, 2, 3, 0) + 1) / 2)
        if not all(finding.agrees(scene).values()):
            wrong.append((scene, finding))
    assert not wrong


def test_measurements_see_no_shape_in_noise_or_in_nothing() -> None:
    empty = np.full((FRAMES, SIZE, SIZE, 3), 0.5, np.float32)
    assert measure(empty).colour == ""
    assert measure(empty).motion == ""


def test_clips_are_a_function_of_seed_and_index() -> None:
    first, captions = clip_batch(3, 10, 2)
    again, _ = clip_batch(3, 11, 1)
    assert np.array_equal(first[1], again[0])
    assert captions[0] == scene_for(3, 10).caption
    other, _ = clip_batch(4, 11, 1)
    assert not np.array_equal(other, again)


def test_every_scene_comes_once_per_pass() -> None:
    assert len({scene_for(0, i) for i in range(len(SCENES))}) == len(SCENES)


@pytest.mark.parametrize("word", ["red", "circling", "circles", "background"])
def test_vocabulary_holds_the_words_of_captions(word: str) -> None:
    spoken = {w for scene in SCENES for w in scene.caption.split()}
    assert (word in vocabulary()) == (word in spoken)
