"""Targets of fuzzing: valid files of every kind, and how Lockstep loads them before it starts anything."""

from __future__ import annotations

import copy
import io
import json
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save

from launch.film.dry_run import reported_seconds
from launch.film.folder import check_folder
from launch.serve.queue import Queue, QueueError
from runtime.checkpoint.folder import Checkpoints, identity_text
from runtime.checkpoint.reader import restore
from runtime.checkpoint.writer import CheckpointWriter, Snapshot, file_digest
from runtime.errors import BadRequestError
from runtime.film.storyboard import load_storyboard
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.methods import Methods
from runtime.forecasting.presets import load_preset
from runtime.jobs.job import Job
from runtime.jobs.options import JobOptions
from runtime.measure.plans import step_seconds
from runtime.models.layouts.stored import stored_in
from runtime.models.layouts.weights import made
from runtime.models.loras import KnownLora
from runtime.models.wan.adapter import Transformer
from runtime.models.wan.layouts.text import find_text_encoder
from runtime.models.wan.lora import read_lora
from runtime.models.wan.lora_merge import LoraWeights
from runtime.parallel.ranks import Ranks
from runtime.parallel.topology import Topology
from runtime.profile import ModelProfile
from runtime.request.config import EMBEDDED_MODELS, Lora, load_config, shipped
from runtime.request.images import image_digest
from runtime.request.video_request import VideoRequest


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of input.

    Attributes:
        valid: suffixes and contents of valid files.
        load: loads such a file as Lockstep does before it starts anything.
        examples: number of examples per round, smaller for slow targets.
    """

    name: str
    valid: Sequence[tuple[str, bytes]]
    load: Callable[[Path], object]
    examples: int = 200


def targets(scratch: Path) -> list[Target]:
    """Make all targets; files that they need are written in `scratch`."""
    return [
        Target("request", _requests(), _load_request),
        Target("config", _shipped(".", "wan-tiny", "wan2.1-i2v-14b-480p"), _load_config),
        Target("preset", _shipped("spectrum", "paper", "planned-14", "off"), _load_preset),
        Target("calibration", [(".json", _small_calibration())], _load_calibration),
        Target("storyboard", _storyboards(), load_storyboard, 60),
        Target("manifest", *_checkpoint(scratch / "manifest", "manifest-00000-0.json")),
        Target("part", *_checkpoint(scratch / "part", "part-00000-0.pt")),
        Target("identity", *_identity()),
        Target("report", _reports(), _load_report),
        Target("entry", _entries(scratch), _load_entry),
        Target("queue", _queues(scratch), _load_queue),
        Target("lora", [(".safetensors", _lora())], _Loras(), 60),
        Target("settings", *_model_part("transformer/config.json"), 60),
        Target("autoencoder", *_model_part("vae/config.json"), 60),
        Target("sampler", *_model_part("scheduler/scheduler_config.json"), 60),
        Target("weights", *_weights("transformer/diffusion_pytorch_model.safetensors"), 60),
        Target("pickled", [(".pth", _pickled())], _load_pickled),
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
    """The shipped calibration, cut to its first eight steps, with a solver of two."""
    content = json.loads(shipped("calibrations", "wan-tiny.json").read_text())
    n = 8
    content["conditions"]["steps"] = n
    content["grams"] = {name: values[: n * (n + 1) // 2] for name, values in content["grams"].items()}
    content["trajectory"] = content["trajectory"][: (n + 1) * (n + 2) // 2]
    for name, count in (("sensitivity", n), ("response", n), ("noise_levels", n + 1)):
        content[name] = content[name][:count]
    solver = {"nodes": [0, 3], "rows": [[1.0, -0.1, -0.5], [1.0, 0.1, 0.2, -0.5, -2.0]]}
    forecast = {"forecasts": [[0.0, 1.0, 5.0]], "expected": [0.1]}
    content["fits"] = [solver | forecast | {"power": 1.0, "passes": 3, "trials": content["trials"][:6]}]
    return json.dumps(content).encode()


def _load_calibration(path: Path) -> None:
    calibration = load_calibration(str(path))
    plan = calibration.planner("guided").plan(min(4, calibration.conditions.steps))
    calibration.predict(plan.error, 0.1)
    methods = Methods(calibration)
    methods.for_psnr(30.0)
    methods.for_seconds(5.0)
    for fit in calibration.fits:
        methods.best(fit.nfe)
        fit.predict(0.1)


def _storyboards() -> list[tuple[str, bytes]]:
    text = (
        "title: T\nwidth: 64\nheight: 48\ndefaults: {steps: 6, spectrum: paper, negative: b}\nshots:\n"
        "  - {id: a, prompt: x, frames: 9, seed: 5}\n"
        "  - {id: b, prompt: y, seconds: 4, title: U, transition: {kind: crossfade, frames: 4}}\n"
        "  - {id: c, prompt: z, frames: 33, travel: [{at: 0.5, prompt: w}], guidance: 2.0}\n"
    )
    return [(".yaml", text.encode())]


def _checkpoint(whole: Path, name: str) -> tuple[list[tuple[str, bytes]], Callable[[Path], object]]:
    """Target: one file of a checkpoint, with a correct checksum."""
    topology, file = Topology(cfg=1, ring=1, ulysses=1), "part-00000-0.pt"
    writer = CheckpointWriter(whole, "{}", topology, 0, 1)
    writer.finish(Snapshot(0, {"latents": torch.zeros(2)}, {"a": 1}, {"cond": {0: torch.zeros(1, 2, 3)}}))

    def load(path: Path) -> None:
        folder = path.parent / "checkpoint"
        shutil.copytree(whole, folder)
        path.replace(folder / name)
        if name == file:
            manifest = folder / "manifest-00000-0.json"
            digest = file_digest(folder / file)
            manifest.write_text(manifest.read_text().replace(file_digest(whole / file), digest))
        restore(folder, topology, Ranks.alone(torch.device("cpu")), ("cond",))
        CheckpointWriter(folder, "{}", topology, 0, 1).finish(Snapshot(1, {}, {}, {"cond": {}}))

    return [(name[-5:] if name != file else ".pt", (whole / name).read_bytes())], load


def _identity() -> tuple[list[tuple[str, bytes]], Callable[[Path], object]]:
    """Target: a checkpoint's recipe, when another request is to be resumed."""
    made = json.dumps({"request": {"prompt": "a", "steps": 6, "travel": []}, "model": "b"})

    def load(path: Path) -> None:
        kept = Checkpoints(path.parent / "kept.checkpoints", every=1, resume=True)
        folder = kept.of(made)
        folder.mkdir(parents=True)
        path.replace(folder / "identity.json")
        (folder / "manifest-00000-0.json").write_text("{}")
        other = json.dumps({"request": {"prompt": "c"}, "model": {"name": "d"}})
        with suppress(BadRequestError), kept.locked([other]):
            raise AssertionError("another request's checkpoints were resumed")

    return [(".json", identity_text(made).encode())], load


def _reports() -> list[tuple[str, bytes]]:
    numbers = ("width", "height", "frames", "steps", "guidance", "max_sequence_length")
    content = {
        "request": {**dict.fromkeys(numbers, 16), "prompt": "x", "image": None, "videos": 1},
        "model": {"name": "wan-tiny"},
        "topology": {"world": 2},
        "step_seconds": {"computed_median": 0.5, "forecast_median": 0.01},
        "windows": 2,
        "schema": 1,
        "decision_digest": "",
        "versions": {"lockstep": "1"},
    }
    return [(".json", json.dumps(content).encode())]


def _load_report(path: Path) -> None:
    """Load a report for its step times, and as the manifest of a film that is to be replaced."""
    (path.parent / "film").mkdir()
    shutil.copy(path, path.parent / "film/film.json")
    with suppress(BadRequestError):
        check_folder(path.parent / "film")
    reported_seconds(path.parent)
    step_seconds(path)


def _entries(scratch: Path) -> list[tuple[str, bytes]]:
    job = JobOptions.parse(prompt="a red circle", out=scratch / "a.mp4").job()
    return [(".json", job.absolute().to_json().encode())]


def _load_entry(path: Path) -> None:
    Job.from_json(path.read_bytes()).to_json()


def _queues(scratch: Path) -> list[tuple[str, bytes]]:
    folder = scratch / "queue"
    with closing(Queue(folder)) as queue:
        queue.submit(Job.from_json(_entries(scratch)[0][1]), name="first")
    with closing(sqlite3.connect(folder / "queue.sqlite")) as base:
        base.execute("PRAGMA journal_mode = DELETE")
    return [(".sqlite", (folder / "queue.sqlite").read_bytes())]


def _load_queue(path: Path) -> None:
    """Load a queue; a damaged file raises `QueueError`, whose message commands print."""
    folder = path.parent / "queue"
    folder.mkdir()
    path.replace(folder / "queue.sqlite")
    try:
        with closing(Queue(folder)) as queue, queue.served():
            queue.count()
            queue.replicas()
            for entry in queue.entries():
                entry.job.to_json()
            queue.take(0)
    except QueueError as error:
        raise BadRequestError(str(error)) from None


def _lora() -> bytes:
    name = "transformer.blocks.0.attn1.to_q"
    made = WanTransformer3DModel.load_config(EMBEDDED_MODELS / "wan-tiny/transformer")
    width = made["num_attention_heads"] * made["attention_head_dim"]
    weights = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}
    told = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q"]}
    return save(weights, {"lora_adapter_metadata": json.dumps(told)})


class _Loras:
    """Target that adds a LoRA to the weights of wan-tiny."""

    def __init__(self) -> None:
        self._model: Transformer = WanTransformer3DModel.from_pretrained(
            EMBEDDED_MODELS / "wan-tiny/transformer"
        )

    def __call__(self, path: Path) -> None:
        lora = Lora(file=str(path))
        LoraWeights.open(KnownLora(lora, read_lora(lora).digest)).merge(copy.deepcopy(self._model))


def _model_part(part: str) -> tuple[list[tuple[str, bytes]], Callable[[Path], object]]:
    """Target: one file of a model folder; the others are those of wan-tiny."""
    source = EMBEDDED_MODELS / "wan-tiny"
    config = load_config("wan-tiny")

    def load(path: Path) -> None:
        folder = path.parent / "model"
        for file in source.rglob("*"):
            if file.is_file() and str(file.relative_to(source)) != part:
                (folder / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                (folder / file.relative_to(source)).symlink_to(file)
        (folder / part).parent.mkdir(exist_ok=True)
        path.replace(folder / part)
        profile = ModelProfile(config.model_copy(update={"model": str(folder)}))
        profile.check(config.request("a red circle", spectrum="off", steps=4))

    return [(Path(part).suffix, (source / part).read_bytes())], load


def _weights(part: str) -> tuple[list[tuple[str, bytes]], Callable[[Path], object]]:
    """Header of a weight file."""
    ((_, whole),) = _model_part(part)[0]
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    load = _model_part(part)[1]

    def put_together(path: Path) -> None:
        with path.open("ab") as file:
            file.write(whole[header:])
        load(path)

    return [(".safetensors", whole[:header])], put_together


def _pickled() -> bytes:
    content = io.BytesIO()
    torch.save(load_file(EMBEDDED_MODELS / "wan-tiny/text_encoder/model.safetensors"), content)
    return content.getvalue()


def _load_pickled(path: Path) -> None:
    """Recognise a text encoder in a pickled file, and read its weights."""
    try:
        _read_text_encoder(path)
    except (OSError, ValueError) as error:
        raise BadRequestError(str(error)) from None


def _read_text_encoder(path: Path) -> None:
    component = find_text_encoder(stored_in(path))
    if component is None:
        raise ValueError("it holds no text encoder")
    for _ in made(component.weights):
        pass


def _images() -> list[tuple[str, bytes]]:
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp"):
            path = Path(folder) / f"a{suffix}"
            Image.effect_noise((40, 30), 50).convert("RGB").save(path)
            images.append((suffix, path.read_bytes()))
    return images
