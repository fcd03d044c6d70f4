"""flux-tiny: its stills, the measurements that judge it, and what it draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_flux import CALIBRATING
from flux_peers import CALL, MODEL, load
from flux_tiny_data import HELD_OUT, SCENES, TRAINED, render, still_batch
from flux_tiny_measure import Distances, agrees, ssim
from flux_tiny_transformer import new_clip_tokenizer

BYTES = 8_000_000


def test_measurements_are_right_on_drawn_stills() -> None:
    wrong = []
    for index, scene in enumerate(SCENES[::3]):
        picture = (render(scene, np.random.default_rng(index)).transpose(1, 2, 0) + 1) / 2
        wrong += [scene.caption for right in agrees(picture, scene).values() if not right]
    assert len(wrong) <= 0.04 * len(SCENES[::3]), wrong  # corners of small dark squares are lost


def test_stills_are_a_function_of_seed_and_index() -> None:
    first, captions = still_batch(3, 10, 2)
    again, other = still_batch(3, 11, 1)
    assert np.array_equal(first[1], again[0])
    assert captions[1] == other[0]


def test_captions_of_measurements_were_not_trained() -> None:
    assert not {scene.caption for scene in HELD_OUT} & {scene.caption for scene in TRAINED}
    assert len(HELD_OUT) + len(TRAINED) == len(SCENES)
    assert {scene.caption for scene in CALIBRATING} <= {scene.caption for scene in TRAINED}


def test_every_word_of_a_caption_is_one_token_of_clip_s() -> None:
    tokenizer = new_clip_tokenizer()
    for scene in SCENES[::50]:
        assert len(tokenizer(scene.caption).input_ids) == len(scene.caption.split()) + 2


def test_similarity_is_one_for_equal_pictures_and_less_for_others() -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    noisy = [picture + scale * noise for scale in (0.02, 0.2)]
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert 1.0 > ssim(noisy[0], picture) > ssim(noisy[1], picture) > 0.0


def test_flux_tiny_is_small_and_draws_what_is_asked() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= BYTES
    pipe = load()
    right = 0
    for seed, scene in enumerate(HELD_OUT[:4]):
        generator = torch.Generator().manual_seed(seed)
        picture = pipe(scene.caption, num_inference_steps=10, generator=generator, output_type="np", **CALL)
        seen = agrees(picture.images[0], scene)
        right += all(seen.values())
    assert right >= 3
    truth = torch.from_numpy(picture.images).permute(0, 3, 1, 2)
    distances = Distances(pipe.vae)
    same, other = distances.measure(truth, truth), distances.measure(truth.flip(3), truth)
    assert same.psnr == 100.0 and same.deep == pytest.approx(0.0, abs=1e-6)
    assert other.psnr < 40.0 and other.deep > 0.0
