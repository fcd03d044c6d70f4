"""Jobs with LoRAs of their own, one after another on one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.job import Job
from runtime.jobs.run import run_job
from runtime.models.wan.lora import read_lora
from runtime.reports.report import LoraPart
from runtime.request.config import Config, Lora
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import OnStep, StepRecord
from spectrum import StepKind
from tests.stopping import InterruptedHereError

Make = Callable[..., VideoRequest]
NAME = "transformer.blocks.2.attn1.to_v.lora_"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lora, Lora]:
    folder = tmp_path_factory.mktemp("loras")
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights = {f"{NAME}A.weight": torch.randn(4, 192), f"{NAME}B.weight": torch.randn(192, 4) * 0.1}
        save_file(weights, folder / f"{seed}.safetensors")
    return Lora(file=str(folder / "1.safetensors"), scale=0.5), Lora(file=str(folder / "2.safetensors"))


def job_with(config: Config, request: VideoRequest, folder: Path, *loras: Lora, resume: bool = False) -> Job:
    return Job.build(
        config.model_copy(update={"lora": loras}),
        request,
        Outputs.named(folder / "a.mp4", overwrite=True),
        checkpoints=Checkpoints(folder / "kept", every=1, resume=resume),
    )


def test_each_job_has_its_own_and_its_report_names_them(
    config: Config, small: Make, tmp_path: Path, loras: tuple[Lora, Lora]
) -> None:
    engine, request, (one, two) = Engine(config), small(spectrum="off", steps=2), loras
    made = [
        run_job(engine, job_with(config, request, tmp_path, *given).planned())
        for given in ((), (one,), (one,), (one, two), ())
    ]
    frames = [report.frames_sha256 for report in made]
    assert frames[0] == frames[4] != frames[1] == frames[2] != frames[3] != frames[0]
    assert [report.seconds.lora > 0 for report in made] == [False, True, False, True, True]
    digests = [read_lora(lora).digest for lora in loras]
    parts = [
        LoraPart(file=lora.file, scale=lora.scale, expert=None, digest=digest)
        for lora, digest in zip(loras, digests, strict=True)
    ]
    assert [report.model.loras for report in made] == [[], parts[:1], parts[:1], parts, []]
    assert made[3].model.revision == f"{made[0].model.revision}+lora:{digests[0]}×0.5+lora:{digests[1]}×1.0"
    assert len({report.recipe for report in made}) == 3


@contextmanager
def ending(label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
    """Ends a generation after its third step, as if it had been killed."""

    def after(record: StepRecord) -> None:
        if record.index == 2:
            raise InterruptedHereError

    yield after


def test_a_checkpoint_made_with_others_is_refused(
    config: Config, small: Make, tmp_path: Path, loras: tuple[Lora, Lora]
) -> None:
    """And goes on with its own, also on an engine that has had others meanwhile."""
    engine, request, (one, two) = Engine(config), small(spectrum="off", steps=5), loras
    whole = run_job(engine, job_with(config, request, tmp_path / "whole", one))
    with pytest.raises(InterruptedHereError):
        run_job(engine, job_with(config, request, tmp_path, one), ending)
    for others in ((two,), (), (one.model_copy(update={"scale": 0.25}),)):
        with pytest.raises(BadRequestError, match=r"model was 'sha256:\w+\+lora:"):
            run_job(engine, job_with(config, request, tmp_path, *others, resume=True))
    resumed = run_job(engine, job_with(config, request, tmp_path, one, resume=True))
    assert resumed.resumed_at == 3 and resumed.frames_sha256 == whole.frames_sha256


def test_a_job_that_is_refused_leaves_the_next_one_its_own(
    config: Config, small: Make, tmp_path: Path, loras: tuple[Lora, Lora]
) -> None:
    """It is refused before its LoRAs are merged, if they can be."""
    engine, request, (one, two) = Engine(config), small(spectrum="off", steps=2), loras
    before = run_job(engine, job_with(config, request, tmp_path, one))
    merged = [tensor.clone() for tensor in engine.loaded.experts[0].module.parameters()]
    missing = two.model_copy(update={"file": str(tmp_path / "none.safetensors")})
    refused = replace(
        job_with(config, request, tmp_path, two), outputs=Outputs.named(tmp_path / "a.mp4", overwrite=False)
    )
    for job, said in (
        (refused, "a.mp4' exists; give another"),
        (job_with(config, request, tmp_path, one, missing), "No such file"),
    ):
        with pytest.raises(BadRequestError, match=said):
            run_job(engine, job)
        now = engine.loaded.experts[0].module.parameters()
        assert all(torch.equal(*pair) for pair in zip(now, merged, strict=True))
    again = run_job(engine, job_with(config, request, tmp_path, one))
    assert again.frames_sha256 == before.frames_sha256 and again.seconds.lora == 0
