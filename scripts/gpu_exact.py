"""Checks of what must be exact or end in time on a GPU, with the embedded model.

Against diffusers' pipeline, between places where idle weights are kept, after a stop, between numbers of
ranks, and when a rank is killed or stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import WanPipeline
from gpu_bench import Bench, Found, frames_of, psnr
from peers import pipeline_frames

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import generate_shown, silent
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.parallel.kernels import KERNELS, resolve
from runtime.request.config import EMBEDDED_MODELS, Config, Dtypes, load_config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord

PROMPT, NEGATIVE = "a red circle moving left on a black background", "a blue square"
HOME = Path(__file__).resolve().parent.parent
HALO = "decode: halo"  # of a config; in the other rows the first rank decodes whole frames
BOUND = 60.0  # seconds within which a job must end whose rank is gone; its timeout is 10
PLACES: dict[str, dict[str, str]] = {
    "text_encoder: offload": {"text_encoder": "offload"},
    "text_encoder: free": {"text_encoder": "free"},
    "vae: offload": {"vae": "offload"},
    "transformer: offload": {"transformer": "offload"},
    "history: offload": {"history": "offload"},
}


def config_on(bench: Bench, **changes: Any) -> Config:
    """Config of the embedded model on the device."""
    return load_config("wan-tiny").model_copy(update={"device": str(bench.device), **changes})


def request_of(config: Config, bench: Bench, spectrum: str) -> VideoRequest:
    """Request of a clip; the small one has few pixels and steps."""
    size = (
        {"width": 64, "height": 48, "frames": 5, "steps": 8, "max_sequence_length": 32} if bench.small else {}
    )
    return config.request(PROMPT, negative=NEGATIVE, seed=7, spectrum=spectrum, **size)


def check_pipeline(bench: Bench) -> Found:
    """Compare frames with those of diffusers' pipeline on the same device, and with those of the CPU."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        config = config_on(bench, dtype=Dtypes(transformer=dtype, text_encoder=dtype))
        request = request_of(config, bench, "off")
        ours, theirs = frames_of(Engine(config), request), _peer(bench, dtype, request)
        rows.append({"dtype": dtype, "equal": bool(np.array_equal(ours, theirs)), "psnr": psnr(ours, theirs)})
    config = config_on(bench)
    found: Found = {"against diffusers": rows}
    for preset in ("off", "paper"):
        there = frames_of(Engine(config), request_of(config, bench, preset))
        cpu = config.model_copy(update={"device": "cpu"})
        found[f"{preset}, against the CPU, dB"] = psnr(
            there, frames_of(Engine(cpu), request_of(cpu, bench, preset))
        )
    return found


def _peer(bench: Bench, dtype: str, request: VideoRequest) -> Frames:
    chosen = getattr(torch, dtype)
    kinds = {"text_encoder": chosen, "transformer": chosen, "vae": torch.float32}
    pipeline = WanPipeline.from_pretrained(EMBEDDED_MODELS / "wan-tiny", dtype=kinds)
    pipeline.text_encoder.to(chosen)  # transformers keeps the file's float16
    pipeline.set_progress_bar_config(disable=True)
    return pipeline_frames(pipeline.to(bench.device), request)


def check_options(bench: Bench) -> Found:
    """Compare options that must not change a bit, and those that may change rounding, with the plain run."""
    config = config_on(bench)
    request = request_of(config, bench, "paper")
    plain = frames_of(Engine(config), request)
    repeated = frames_of(Engine(config), request)
    rows: list[Found] = [_compared("the same again", plain, repeated)]
    for name, places in PLACES.items():
        engine = Engine(config.model_copy(update={"memory": Memory.model_validate(places)}))
        rows.append(_compared(name, plain, frames_of(engine, request)))
    rows.append(_compared(*_decided(config, request, plain)))
    rows.append(_compared("stopped and resumed", plain, _resumed(config, request)))
    halves = config_on(bench, dtype=Dtypes(transformer="bfloat16"))
    rounded: list[Found] = []
    reference = frames_of(Engine(halves), request)
    for name in KERNELS:
        try:
            resolve(name, bench.device, torch.bfloat16, ring=1)
        except BadRequestError as error:
            rounded.append({"option": f"attention: {name}", "refused": str(error)})
            continue
        other = Engine(halves.model_copy(update={"attention": name}))
        rounded.append(_compared(f"attention: {name}", reference, frames_of(other, request)))
    compiled = Engine(halves.model_copy(update={"compile": True}))
    rounded.append(_compared("compile", reference, frames_of(compiled, request)))
    guided = request_of(halves, bench, "universal")
    rounded += [
        _timed(halves, one, guided) for one in ({"fuse_forecasts": True}, {"batch_guidance": "always"})
    ]
    return {"must be equal": rows, "may differ by rounding, bfloat16": rounded}


def _timed(config: Config, changes: dict[str, Any], request: VideoRequest) -> Found:
    """Compare frames with and without an option; says what it does to the seconds of steps."""
    frames, steps = [], []
    for one in (config, config.model_copy(update=changes)):
        engine, sink = Engine(one), FrameBuffer()
        engine.warm_up(engine.plan(request.model_copy(update={"spectrum": "off"})))
        taken = engine.generate(request, [sink]).step_seconds
        frames.append(sink.frames)
        steps.append([1e3 * (seconds or 0.0) for seconds in (taken.computed, taken.forecast)])
    (name,) = (f"{field}: {str(value).lower()}" for field, value in changes.items())
    said = [
        f"{kind} step {after:.2f} ms instead of {before:.2f}"
        for kind, before, after in zip(("computed", "forecast"), *steps, strict=True)
    ]
    return _compared(f"{name}, {', '.join(said)}", *frames)


def _decided(config: Config, request: VideoRequest, plain: Frames) -> tuple[str, Frames, Frames]:
    """Generate with what is `auto` decided by a rehearsal; says what was decided."""
    engine = Engine(config.model_copy(update={"memory": Memory(text_encoder="auto", vae="auto")}))
    sink = FrameBuffer()
    result = generate_shown(engine, engine.plan(request), [sink], silent)
    chosen = result.memory
    return f"auto: text_encoder {chosen.text_encoder}, vae {chosen.vae}", plain, sink.frames


def _resumed(config: Config, request: VideoRequest) -> Frames:
    """Stop a generation after half of its steps, and resume it in another engine."""

    class StoppedHereError(Exception):
        pass

    def stop(record: StepRecord) -> None:
        if record.index == request.steps // 2:
            raise StoppedHereError

    with tempfile.TemporaryDirectory() as folder:
        with suppress(StoppedHereError):
            kept = Checkpoints(Path(folder), every=1)
            frames_of(Engine(config), request, on_step=stop, checkpoints=kept)
        kept = Checkpoints(Path(folder), every=1, resume=True)
        return frames_of(Engine(config), request, checkpoints=kept)


def _compared(name: str, frames: Frames, other: Frames) -> Found:
    return {"option": name, "equal": bool(np.array_equal(frames, other)), "psnr": psnr(frames, other)}


def check_ranks(bench: Bench) -> Found:
    """Make one video on one rank and on several, through the command line, and compare.

    With fewer GPUs than ranks, these share them and communicate through gloo; otherwise through NCCL.
    """
    world = 2 if bench.count < 4 else min(bench.count, 8)
    ways = {
        "cfg 2": ["--ranks", "2", "--cfg", "2"],
        f"ulysses {world}": ["--ranks", str(world), "--ulysses", str(world), "--cfg", "1"],
        f"ring {world}": ["--ranks", str(world), "--ring", str(world), "--cfg", "1"],
        "cfg 2, sharded": ["--ranks", "2", "--cfg", "2", "--shard"],
        f"cfg 2 × ulysses {world // 2}, sharded": ["--ranks", str(world), "--cfg", "2", "--shard"],
    }
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        config = Path(folder) / "halo.yaml"
        config.write_text(f"{(HOME / 'configs' / 'wan-tiny.yaml').read_text(encoding='utf-8')}{HALO}\n")
        ways[f"cfg 2, {HALO}"] = ["--ranks", "2", "--cfg", "2", "--config", str(config)]
        alone, raw = _generated(Path(folder) / "one.mp4", bench, [])
        rows: list[Found] = []
        for name, words in ways.items():
            report, frames = _generated(Path(folder) / f"{len(rows)}.mp4", bench, words)
            rows.append(
                {
                    "topology": name,
                    "equal": report["frames_sha256"] == alone["frames_sha256"],
                    "psnr": psnr(raw, frames),
                    "decisions agree": set(report["decision_digest"]) == set(alone["decision_digest"]),
                    "computed_step_seconds": report["step_seconds"]["computed_median"],
                    "decode_seconds": report["seconds"]["decode"],
                }
            )
    return {"backend": "nccl" if bench.count >= world else "gloo", "ranks": rows}


def _words(out: Path, bench: Bench, words: list[str]) -> list[str]:
    small = ["--size", "64x48", "--frames", "5", "--steps", "8", "--max-sequence-length", "32"]
    launcher = ["--launcher", "torchrun"] if words else []
    options = [*(small if bench.small else ["--steps", "20"]), "--spectrum", "paper", "--timeout", "10"]
    return [
        sys.executable,
        "-m",
        "launch",
        "generate",
        PROMPT,
        *options,
        *words,
        *launcher,
        "--out",
        str(out),
    ]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])}


def _generated(out: Path, bench: Bench, words: list[str]) -> tuple[Found, Frames]:
    """Generate through the command line; return the report, and the frames of the mp4."""
    from runtime.media.frames import read_frames

    done = subprocess.run(
        _words(out, bench, words),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(words) or 'one rank'}: exit code {done.returncode}: {done.stderr[-800:]}"
        )
    report: Found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return report, read_frames(out)


def check_failures(bench: Bench) -> Found:
    """Kill, and stop, the second of two ranks while they denoise: the job must end in time and say which."""
    rows = []
    for name, sent in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            rows.append({"rank 1": name, **_struck(Path(folder) / "video.mp4", sent)})
    return {"backend": "nccl" if bench.count >= 2 else "gloo", "failures": rows}


def _struck(out: Path, sent: signal.Signals) -> Found:
    words = [sys.executable, "-m", "launch", "generate", PROMPT, "--steps", "400", "--spectrum", "off"]
    words += ["--ranks", "2", "--launcher", "torchrun", "--timeout", "10", "--out", str(out)]
    with subprocess.Popen(words, env=_environment(), stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        try:
            said = ""
            for line in job.stderr:
                said += line
                if "step 40/" in line:
                    break
            else:
                raise RuntimeError(f"no step was reached: {said[-800:]}")
            victim = _second_rank(job.pid)
            started = time.monotonic()
            victim.send_signal(sent)
            said += job.communicate(timeout=BOUND)[1]
            seconds = time.monotonic() - started
        finally:
            left = _end(job)
    return {
        "exit code": job.returncode,
        "seconds": seconds,
        "named": "rank 1" in said,
        "left": left,
        "said": [line for line in said.splitlines() if "lockstep: rank" in line][-1:],
    }


def _second_rank(pid: int) -> psutil.Process:
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if child.environ().get("RANK") == "1":
                return child
    raise RuntimeError("there is no rank 1")


def _end(job: subprocess.Popen[str]) -> int:
    """End a job that goes on, and everything that it started; return the number of processes that it left."""
    with suppress(psutil.Error):
        for child in psutil.Process(job.pid).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    if job.poll() is None:
        job.kill()
        job.wait()
    return sum(
        "launch.torchrun" in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])
    )


CHECKS: dict[str, Callable[[Bench], Found]] = {
    "pipeline": check_pipeline,
    "options": check_options,
    "ranks": check_ranks,
    "failures": check_failures,
}
