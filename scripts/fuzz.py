"""Mutates valid input of every kind and looks at what is made of it: `make fuzz`.

    python scripts/fuzz.py --seconds 600 --seed 1 [--only storyboard]

Requests, configs, presets, calibrations, storyboards, manifests of checkpoints, entries of a queue, LoRA
files, model folders and images are cut, flipped, and filled with what nobody expects. Each must be taken, or
refused with `BadRequestError`; within seconds, within memory, and without a write beside its own folder. What
fails is kept in `out/fuzz/`, as small as hypothesis could make it.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from launch.jobs import Job, build_job
from launch.options import CHECKPOINT_EVERY
from runtime.calibration import load_calibration
from runtime.checkpoint_reader import restore
from runtime.checkpoint_writer import CheckpointWriter, Snapshot
from runtime.configs import EMBEDDED_MODELS, Lora, load_config, shipped
from runtime.errors import BadRequestError
from runtime.files import image_digest
from runtime.lora import lora_digest
from runtime.model_profile import ModelProfile
from runtime.presets import load_preset
from runtime.ranks import Ranks
from runtime.request import VideoRequest
from runtime.storyboard import load_storyboard
from runtime.topology import Topology

SECONDS, MEMORY = 20, 4 * 2**30  # that one input may take
_HEAD = 20_000  # bytes of a file in which words are replaced
_WORDS = [
    *(b"", b"null", b"~", b"[]", b"{}", b"true", b"off", b"no", b"''", b'"x"', b"x", b"../../x", b"~root/x"),
    *(b"0", b"-1", b"2.5", b"021", b"12:30", b"1e5", b"1e400", b"-.inf", b".nan", b"NaN", b"Infinity", b"/"),
    *(b"9" * 25, b"9" * 5000, b"-" + b"9" * 400, b"2024-02-30", b"0b_", b"!!bool x", b"!x", b"&a [*a]"),
    *(b"*a", b"<<", b": ", b"[" * 200, b'{"a":' * 300, b"\\ud800", b"\\u0000", b"\0", b"\xff"),
    *(b"\xef\xbb\xbf", b"\x1b[2J", b"\n\n", "猫".encode(), "\u2028".encode(), b"a" * 30_000, b"[/a]"),
    *(b"%s", b"---\n", b"? ", b"- ", b"#", b"\t", b"\r"),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of input.

    Attributes:
        valid: files that are taken, by their suffix.
        load: does with such a file what Lockstep does before it starts anything.
        examples: of one round, for what takes long.
    """

    name: str
    valid: Sequence[tuple[str, bytes]]
    load: Callable[[Path], object]
    examples: int = 200


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    """A valid file with up to four changes."""
    suffix, original = draw(st.sampled_from(valid))
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 8, 100, 5000]))
        match draw(
            st.sampled_from(["word", "word", "word", "flip", "cut", "drop", "repeat", "insert", "any"])
        ):
            case "word":
                found = list(re.finditer(rb"[\w.+/-]+", bytes(content[:_HEAD])))
                if found:
                    place = draw(st.sampled_from(found))
                    content[place.start() : place.end()] = draw(st.sampled_from(_WORDS))
            case "flip":
                if content:
                    content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + length]
            case "repeat":
                content[at:at] = content[at : at + length]
            case "insert":
                content[at:at] = draw(st.sampled_from(_WORDS))
            case _:
                content[at:at] = draw(st.binary(max_size=20))
    return suffix, bytes(content)


def check(target: Target, number: int, examples: int | None = None) -> None:
    """One round.

    Raises:
        Exception: whatever a load raised that is no refusal; `failing` of it is the file.
    """

    @seed(number)
    @settings(
        max_examples=examples or target.examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(mutated(target.valid))
    def round_(file: tuple[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-") as folder:
            path = Path(folder) / f"input{file[0]}"
            path.write_bytes(file[1])
            try:
                with _within(SECONDS), _writing_only_in(folder), suppress(BadRequestError):
                    target.load(path)
            except Exception as error:
                error.failing = file  # type: ignore[attr-defined]
                raise

    round_()


class OutOfBoundsError(Exception):
    """An input took too long, or something was written where nothing may be."""


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise OutOfBoundsError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_allowed: list[str] = []  # folders, while an input is looked at
_MOVES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}


@sys.addaudithook
def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed or not (event in _MOVES or event == "open"):
        return
    path = arguments[1 if event == "os.symlink" else 0]
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return
    if isinstance(path, str | bytes | os.PathLike):
        given_ = Path(os.fsdecode(path)).absolute()
        follows = event == "open"  # what moves or removes follows no link
        name = str(given_.resolve() if follows else given_.parent.resolve() / given_.name)
        if not name.startswith((_allowed[0], "/dev/null")) and "__pycache__" not in name:
            raise OutOfBoundsError(f"{event} of {name}")


@contextmanager
def _writing_only_in(folder: str) -> Iterator[None]:
    _allowed.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _allowed.clear()


def targets(scratch: Path) -> list[Target]:
    """Everything that comes from outside. Files that they stand on are made in `scratch`."""
    return [
        Target("request", _requests(), _load_request),
        Target("config", _shipped(".", "wan-tiny", "wan2.1-i2v-14b-480p"), _load_config),
        Target("preset", _shipped("spectrum", "paper", "planned-14", "off"), _load_preset),
        Target("calibration", [(".json", _small_calibration())], _load_calibration),
        Target("storyboard", _storyboards(), load_storyboard, 60),
        Target("manifest", *_manifest(scratch)),
        Target("entry", _entries(scratch), _load_entry),
        Target("lora", [(".safetensors", _lora())], lambda path: lora_digest(Lora(file=str(path)))),
        Target("settings", *_model_part(scratch, "transformer/config.json"), 40),
        Target("sampler", *_model_part(scratch, "scheduler/scheduler_config.json"), 40),
        Target("image", _images(), lambda path: image_digest(str(path))),
    ]


def _requests() -> list[tuple[str, bytes]]:
    request = VideoRequest(
        prompt="a red circle", width=96, height=96, frames=17, steps=50, guidance=5.0, deadline=9.0
    )
    return [(".json", request.model_dump_json().encode())]


def _load_request(path: Path) -> None:
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict):
        VideoRequest.parse(**fields).model_dump_json()


def _shipped(folder: str, *names: str) -> list[tuple[str, bytes]]:
    return [(".yaml", shipped(folder, f"{name}.yaml").read_bytes()) for name in names]


def _load_config(path: Path) -> None:
    load_config(str(path)).request("a red circle").model_dump_json()


def _load_preset(path: Path) -> None:
    preset = load_preset(str(path))
    request = load_config("wan-tiny").request("a red circle", spectrum=str(path))
    preset.check_request(request)
    preset.expected_kinds(request.steps)
    preset.build_predictor(request.steps).weights([0, 1], 2)
    json.dumps(preset.identity)


def _small_calibration() -> bytes:
    """The shipped one, of its first eight steps."""
    content = json.loads(shipped("calibrations", "wan-tiny.json").read_text())
    n = 8
    content["conditions"]["steps"] = n
    content["grams"] = {name: values[: n * (n + 1) // 2] for name, values in content["grams"].items()}
    content["sensitivity"], content["noise_levels"] = (
        content["sensitivity"][:n],
        content["noise_levels"][: n + 1],
    )
    return json.dumps(content).encode()


def _load_calibration(path: Path) -> None:
    calibration = load_calibration(str(path))
    plan = calibration.planner("guided").plan(min(4, calibration.conditions.steps))
    calibration.predict(plan.error, 0.1)
    calibration.plan_for_psnr(30.0)
    calibration.plan_for_seconds(5.0)


def _storyboards() -> list[tuple[str, bytes]]:
    text = (
        "title: T\nwidth: 64\nheight: 48\ndefaults: {steps: 6, spectrum: paper, negative: b}\nshots:\n"
        "  - {id: a, prompt: x, frames: 9, seed: 5}\n"
        "  - {id: b, prompt: y, seconds: 4, title: U, transition: {kind: crossfade, frames: 4}}\n"
        "  - {id: c, prompt: z, frames: 33, travel: [{at: 0.5, prompt: w}], guidance: 2.0}\n"
    )
    return [(".yaml", text.encode())]


def _manifest(scratch: Path) -> tuple[list[tuple[str, bytes]], Callable[[Path], object]]:
    whole, topology = scratch / "checkpoint", Topology(cfg=1, ring=1, ulysses=1)
    writer = CheckpointWriter(whole, "{}", topology, 0, 1)
    history = {"cond": {0: torch.zeros(1, 2, 3)}}
    writer.finish(Snapshot(0, {"latents": torch.zeros(2)}, {"a": 1}, history))
    name = "manifest-00000-0.json"

    def load(path: Path) -> None:
        folder = path.parent / "checkpoint"
        shutil.copytree(whole, folder)
        path.rename(folder / name)
        restore(folder, topology, Ranks.alone(torch.device("cpu")), ("cond",))

    return [(".json", (whole / name).read_bytes())], load


def _entries(scratch: Path) -> list[tuple[str, bytes]]:
    given_ = {
        "config",
        "prompt",
        "out",
        "overwrite",
        "compare",
        "checkpoints",
        "checkpoint_every",
        "resume",
        "given",
    }
    names = inspect.signature(build_job).parameters.keys() - given_
    job = build_job(
        config="wan-tiny",
        prompt="a red circle",
        out=scratch / "a.mp4",
        overwrite=False,
        compare=False,
        checkpoints=None,
        checkpoint_every=CHECKPOINT_EVERY,
        resume=False,
        **dict.fromkeys(names),  # type: ignore[arg-type]
    )
    return [(".json", job.absolute().to_json().encode())]


def _load_entry(path: Path) -> None:
    Job.from_json(path.read_bytes()).to_json()


def _lora() -> bytes:
    name = "transformer.blocks.0.attn1.to_q"
    return save({f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)})


def _model_part(scratch: Path, part: str) -> tuple[list[tuple[str, bytes]], Callable[[Path], object]]:
    """One JSON file of a model folder; the others are those of wan-tiny."""
    source = EMBEDDED_MODELS / "wan-tiny"
    config = load_config("wan-tiny")

    def load(path: Path) -> None:
        folder = path.parent / "model"
        shutil.copytree(source, folder, copy_function=os.symlink)
        (folder / part).unlink()
        path.rename(folder / part)
        profile = ModelProfile(config.model_copy(update={"model": str(folder)}))
        profile.check(config.request("a red circle", spectrum="off", steps=4))

    return [(".json", (source / part).read_bytes())], load


def _images() -> list[tuple[str, bytes]]:
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp"):
            path = Path(folder) / f"a{suffix}"
            Image.effect_noise((40, 30), 50).convert("RGB").save(path)
            images.append((suffix, path.read_bytes()))
    return images


def run(seconds: float, number: int, only: Sequence[str], out: Path) -> int:
    """Rounds of every target until the time is over; how many failures there were."""
    ends, failures, inputs = time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-") as scratch:
        chosen = [target for target in targets(Path(scratch)) if not only or target.name in only]
        failed: set[str] = set()
        while time.monotonic() < ends and len(failed) < len(chosen):
            for target in chosen:
                if target.name in failed or time.monotonic() > ends:
                    continue
                try:
                    check(target, number)
                    inputs += target.examples
                except Exception as error:
                    failed.add(target.name)
                    failures += 1
                    _keep(target, error, number, out)
            number += 1
    print(f"{inputs} inputs, {failures} failures; the next seed is {number}")
    return failures


def _keep(target: Target, error: Exception, number: int, out: Path) -> None:
    suffix, content = getattr(error, "failing", ("", b""))
    path = out / f"{target.name}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"
    out.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    trace, places = error.__traceback__, []
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    print(f"{target.name}, seed {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"  {' '.join(places[-6:])}\n  {path}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="A target's name; may be repeated.")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    return 1 if run(given_.seconds, given_.seed, given_.only, given_.out) else 0


if __name__ == "__main__":
    sys.exit(main())
