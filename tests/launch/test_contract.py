"""The contract of the command line: every option and what it changes, every exit code, every report field.

Options are collected from the commands themselves: one without a case here fails, and so does a case without
an option.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import pytest
from pydantic import BaseModel
from rich.console import Console

from launch import cli
from launch.commands import calibrate as calibrate_rank
from launch.commands import machines, measures, ray_job, settings, torchrun
from launch.commands.build_job import build_batch
from launch.commands.calibrate import plan_calibration
from launch.commands.compare import plan_comparison
from launch.commands.rehearse import build_scenario
from launch.film.shots import plan_film
from launch.serve.queue import Queue
from launch.shell.exits import interrupt
from launch.shell.progress import timed
from launch.shell.terminal import insist, print_path, say
from runtime.jobs.batch import Batch
from runtime.reports.report import Report
from runtime.request.config import shipped
from runtime.request.video_request import VideoRequest
from tests.conditioned import write_image
from tests.jobs import overflowing
from tests.launch.commands.test_lora_option import write as write_lora
from tests.places import ROOT

PROMPT = "a red circle"
REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SMALL = ["--size", "64x48", "--frames", "5", "--steps", "6", "--max-sequence-length", "32"]
TINY = "--size 16x16 --frames 1 --steps 1 --guidance 1 --spectrum off"
FILM = """\
title: Two
defaults: {spectrum: planned-14}
shots:
  - {id: one, prompt: a red circle}
  - {id: two, prompt: a blue circle}
"""

# Entry → its command, and the words that every case of it begins with.
ENTRIES: dict[str, tuple[click.Command, list[str]]] = {
    "generate": (cli.generate, [PROMPT, "--spectrum", "paper"]),
    "compare": (measures.compare, [PROMPT]),
    "calibrate": (cli.calibrate, ["--out", "cal.json", "--prompts", "prompts.txt"]),
    "plan": (measures.plan, ["wan-tiny"]),
    "storyboard": (cli.storyboard, ["film.yaml", "--out", "film"]),
    "convert": (cli.cli, ["wan-tiny", "made"]),
    "rehearse": (machines.rehearse, []),
    "doctor": (machines.doctor, []),
    "config": (settings.config, []),
    "preset": (settings.preset, []),
    "queue add": (cli.cli, [PROMPT, "--queue", "new", "--out", "new.mp4", "--spectrum", "paper"]),
    "queue cancel": (cli.cli, ["2", "--queue", "queue"]),
    "queue run": (cli.cli, ["--queue", "queue"]),
    "status": (cli.cli, ["--queue", "queue"]),
    "serve": (cli.cli, ["--queue", "queue", "--port", "0", "--replicas", "0"]),
    "keys add": (cli.cli, ["ann", "--keys", "keys.yaml"]),
    "keys list": (cli.cli, ["--keys", "keys.yaml"]),
    "keys remove": (cli.cli, ["bob", "--keys", "keys.yaml"]),
}
"""Of commands that a program starts as modules: the entry whose options they have, and one of their own."""
RANKS: dict[str, tuple[click.Command, str]] = {
    "launch.torchrun": (torchrun.rank, "generate"),
    "launch.ray_job": (ray_job.job, "generate"),
    "launch.commands.calibrate": (calibrate_rank.rank, "calibrate"),
}
SHARED = {"queue add": "generate"}  # whose options it takes, beside its own
NOT_FOR_RANKS = {"--launcher"}
ANYWHERE = {"--verbose", "--quiet"}  # before or after every command

GONE = object()


@dataclass(frozen=True, slots=True)
class Case:
    """What an option does. Exactly one of the last five is given.

    Attributes:
        words: the option, with its value.
        beside: words that stand before it, in the run that it is compared with, too.
        changes: all that becomes different in what is planned: field → value, or a pattern of it.
        refused: what is said of it, with exit code 2.
        says: on stdout, and not without the option.
        makes: a file that is not there without it.
        shown_by: a test that shows it, where that takes processes.
    """

    entry: str
    words: str
    beside: str = ""
    changes: dict[str, Any] | None = None
    refused: str = ""
    says: str = ""
    makes: str = ""
    shown_by: str = ""

    @property
    def option(self) -> str:
        return self.words.split()[0]

    def __str__(self) -> str:
        return f"{self.entry} {self.words}"


def of(entry: str, *cases: tuple[str, dict[str, Any]], **same: Any) -> list[Case]:
    return [Case(entry, words, changes=changes, **same) for words, changes in cases]


def sampling(entry: str, request: str, **config: Any) -> list[Case]:
    """The cases of `sampling_options`, for a command that keeps its request under a name."""
    model = {"config.*": re.compile(".*"), f"{request}.*": re.compile(".*")}
    mine = {"config.fps": 9, "config.compile": True, "config.memory.transformer": "shard"} | config
    return of(
        entry,
        ("--config mine.yaml", mine),
        (f"--model {REPOSITORY}", model | {"config.model": REPOSITORY}),
        ("--steps 40", {f"{request}.steps": 40}),
        ("--size 64x48", {f"{request}.width": 64, f"{request}.height": 48}),
        ("--frames 5", {f"{request}.frames": 5}),
        ("--guidance 3", {f"{request}.guidance": 3.0}),
        ("--guidance-2 3", {f"{request}.guidance_2": 3.0}),
        ("--negative blue", {f"{request}.negative": "blue"}),
        ("--image start.png", {f"{request}.image": "start.png"}),
        ("--max-sequence-length 32", {f"{request}.max_sequence_length": 32}),
    ) + of(
        entry,
        ("--revision v2", {"config.revision": "v2"}),
        beside=f"--model {REPOSITORY}",
    )


OFFLOADED = {"config.memory.transformer": "offload"}
SHARDED = {"config.memory.transformer": "shard"}
CASES = [
    *sampling("generate", "request", timeout=600.0),
    *of(
        "generate",
        ("--seed 3", {"request.seed": 3}),
        ("--videos 2", {"request.videos": 2}),
        ("--spectrum paper-fast", {"request.spectrum": "paper-fast", "preset.schedule.alpha": 3.0}),
        ("--spectrum late.yaml", {"request.spectrum": "late.yaml", "preset.schedule.*": re.compile(".*")}),
        ("--deadline 9", {"request.deadline": 9.0}),
        (
            "--out b.mp4",
            {"outputs.video": "b.mp4", "outputs.report": "b.json", "checkpoints.root": "b.checkpoints"},
        ),
        ("--report b.json", {"outputs.report": "b.json"}),
        ("--preview b.webp", {"outputs.preview": "b.webp"}),
        ("--latents b.safetensors", {"outputs.latents": "b.safetensors"}),
        ("--overwrite", {"outputs.overwrite": True, "checkpoints.overwrite": True}),
        ("--compare", {"compare": True}),
        ("--ranks 2", {"ranks": 2}),
        ("--ulysses 2", {"degrees.ulysses": 2, "ranks": 2}),
        ("--ring 2", {"degrees.ring": 2, "ranks": 2}),
        ("--cfg 2", {"degrees.cfg": 2, "ranks": 2}),
        (
            "--lora high:one.safetensors=0.5",
            {
                "config.lora.0.file": re.compile("/.*/one.safetensors"),
                "config.lora.0.scale": 0.5,
                "config.lora.0.expert": "high",
            },
        ),
        ("--attention math", {"config.attention": "math"}),
        ("--performance fast", {"config.performance": "fast", "timeout": 600.0}),
        ("--quantization int8", {"config.quantization": "int8"}),
        ("--shard", SHARDED),
        ("--offload", OFFLOADED),
        ("--compile", {"config.compile": True, "timeout": 600.0}),
        ("--timeout 9", {"timeout": 9.0}),
        ("--busy-timeout 9", {"config.busy_timeout": 9.0}),
        ("--checkpoints kept", {"checkpoints.root": re.compile("kept/.+")}),
        ("--checkpoint-every 2", {"checkpoints.every": 2}),
        ("--checkpoint-every 0", {"checkpoints": None, "checkpoints.*": GONE}),
        ("--resume", {"checkpoints.resume": True}),
    ),
    *of(
        "generate",
        ("--replicate", {"config.memory.transformer": "replicate"}),
        ("--no-compile", {"config.compile": False, "timeout": 30.0}),
        beside="--config mine.yaml",
    ),
    Case("generate", "--prompts prompts.txt", refused="prompt: give either PROMPT, or --prompts with a file"),
    Case("generate", "--extend none.safetensors", refused="extend: 'none.safetensors' given; it cannot be"),
    Case("generate", "--launcher inline", "--ranks 2", refused="it runs a single rank, 2 need ray"),
    *sampling("compare", "requests.0"),
    *of(
        "compare",
        (
            "--preset planned-14",
            {
                "presets.planned-14.*": re.compile(".*"),
                **dict.fromkeys(("presets.paper.*", "presets.paper-fast.*"), GONE),
            },
        ),
        ("--seed 3", {"requests.0.seed": 3}),
        ("--out b.mp4", {"out": "b.mp4"}),
        ("--overwrite", {"overwrite": True}),
    ),
    *sampling("calibrate", "requests.0"),
    *of(
        "calibrate",
        ("--prompts other.txt", {"requests.0.prompt": "a blue square"}),
        ("--seed 3", {"requests.0.seed": 3}),
        ("--out b.json", {"out": "b.json"}),
        ("--budgets 9,12", {"budgets": GONE, "budgets.0": 9, "budgets.1": 12}),
        ("--overwrite", {"overwrite": True}),
    ),
    Case("calibrate", "--add-solvers", refused="prompts: given with --add-solvers"),
    Case("calibrate", "--ranks 9999", refused="ranks: 9999 given; this machine has"),
    Case("calibrate", "--timeout 0", refused="'0' given; a number from 1 to 604800 is needed"),
    Case("compare", "--json", shown_by="launch/commands/test_compare.py"),
    Case("plan", "--nfe 7", says="7 of 50 steps"),
    Case("plan", "--json", "--nfe 7", says='"computed": [0, '),
    Case("plan", "--psnr 20", says="of 50 steps, planned, predicted PSNR 2"),
    Case("plan", "--seconds 8", "--report timed.json", says="7 of 50 steps"),
    Case("plan", "--method fitted", "--nfe 9", refused="nfe: 9 given; this calibration has"),
    Case("plan", "--report timed.json", "--nfe 7", says="denoising 7.43 s"),
    Case("plan", "--picture b.png", "--nfe 7", makes="b.png"),
    Case("plan", "--preset b.yaml", "--nfe 7", makes="b.yaml"),
    Case("plan", "--overwrite", "--nfe 7 --preset late.yaml", says="7 of 50 steps"),
    *of(
        "storyboard",
        ("--out b", {"out": "b"}),
        ("--ranks 2", {"ranks": 2}),
        ("--only one", {"only.0": "one"}),
        ("--compare", {"compare": True}),
    ),
    Case("storyboard", "--audio late.yaml", refused="audio: 'late.yaml' given;"),
    Case("storyboard", "--dry-run", says="2 shots, 34 frames"),
    Case("storyboard", "--replicas 2", "--dry-run", says="on 2 replicas"),
    Case("storyboard", "--price 36", "--dry-run", says="cost"),
    Case("storyboard", "--gpu h100", "--dry-run", says="estimated by a rehearsal on"),
    Case("storyboard", "--prune", "--dry-run", says="no replaced shots"),
    Case("storyboard", "--json", "--dry-run", says='"shots": [{"id": "one", "frames": 17,'),
    Case("storyboard", "--schema", says='"title": "Storyboard"'),
    *sampling("rehearse", "request"),
    *of(
        "rehearse",
        ("--videos 2", {"request.videos": 2}),
        ("--spectrum off", {"request.spectrum": "off"}),
        ("--gpu 4090", {"gpu.name": re.compile(".*4090.*"), "gpu.*": re.compile(".*")}),
        ("--ranks 2", {"ranks": 2}),
        ("--ulysses 2", {"degrees.ulysses": 2, "ranks": 2}),
        ("--ring 2", {"degrees.ring": 2, "ranks": 2}),
        ("--cfg 2", {"degrees.cfg": 2, "ranks": 2}),
        ("--attention math", {"config.attention": "math"}),
        ("--performance fast", {"config.performance": "fast"}),
        ("--quantization int8", {"config.quantization": "int8"}),
        ("--shard", SHARDED),
        ("--offload", OFFLOADED),
    ),
    *of("rehearse", ("--replicate", {"config.memory.transformer": "replicate"}), beside="--config mine.yaml"),
    Case("doctor", "--gpu 4090", shown_by="launch/commands/test_doctor.py"),
    Case("rehearse", "--rank 5", refused="rank: '5' given; it must be from 0 to 0, or all"),
    Case("rehearse", "--json", TINY, says='{"'),
    Case("rehearse", "--topologies", TINY, says="Topologies of this number of ranks"),
    Case("config", f"--model {REPOSITORY}", says="width: 832"),
    Case("config", "--revision v2", f"--model {REPOSITORY}", says="revision: v2"),
    Case("config", "--schema", says='"title": "Config"'),
    Case("preset", "--schema", says='"title": "Preset"'),
    Case("doctor", "--json", "--model wan-tiny", says='"pipeline": "WanPipeline"'),
    Case("doctor", "--model wan-tiny", says="wan-tiny: a WanPipeline, sha256:"),
    *of("convert", ("--dtype bfloat16", {"dtype": "bfloat16"})),
    *of(
        "queue add",
        ("--name mine", {"name": "mine"}),
        ("--owner me", {"owner": "me"}),
        ("--priority 3", {"priority": 3}),
        ("--expires 60", {"seconds": 60}),
    ),
    Case("queue add", "--json", says='{"requests": [{"number": 1, "prompt": "a red circle", "out": '),
    Case("queue add", "--queue b", makes="b/queue.sqlite"),
    Case("queue cancel", "--json", says='{"requests": [{"number": 2, "was": "waiting"}]}'),
    Case("queue cancel", "--queue b", refused="queue: 'b' given; there is no queue in this folder"),
    Case("queue run", "--queue b", refused="queue: 'b' given; there is no queue in this folder"),
    Case("queue run", "--replicas 5000", refused="5000 is not in the range 1<=x<=4096"),
    *of("queue run", ("--keep", {"keep": True}), ("--previews", {"previews": True})),
    *of("queue run", ("--ranks 2", {"ranks": 2})),
    *of(
        "serve",
        ("--queue b", {"folder": "b"}),
        ("--replicas 3", {"replicas": 3}),
        ("--ranks 2", {"ranks": 2}),
        ("--port 8001", {"port": 8001}),
        ("--days 3", {"days": 3.0}),
    ),
    Case("serve", "--config nope", refused="config: 'nope' given"),
    Case("serve", "--model nope", refused="model: 'nope' given; it is neither embedded"),
    Case("serve", "--revision v2", refused="revision: 'v2' given with 0 models; it needs one --model"),
    Case("serve", "--spectrum nope", refused="spectrum: 'nope' given"),
    Case("serve", "--lora mine none.safetensors", refused="none.safetensors' given; No such file"),
    Case("serve", "--host 0.0.0.0", refused="without --keys the server listens only on this machine"),
    Case("serve", "--keys none.yaml", refused="keys: "),
    *of(
        "keys add",
        ("--keys b.yaml", {"file": "b.yaml"}),
        ("--name n", {"name": "n"}),
        ("--priority 5", {"priority": 5}),
        ("--queued 3", {"queued": 3}),
        ("--per-hour 9", {"per_hour": 9}),
        ("--webhook https://example.org/h", {"webhook": "https://example.org/h"}),
    ),
    Case("keys list", "--keys none.yaml", refused="keys: "),
    Case("keys remove", "--keys none.yaml", refused="keys: "),
    Case("status", "--queue b", refused="queue: 'b' given; there is no queue in this folder"),
    Case("status", "--json", says='"requests": ['),
    Case("status", "--all", says="request-1"),
    Case("status", "--watch", shown_by="launch/serve/test_queue.py"),
]  # fmt: skip

# Requests that nothing is started for: entry, words, and what is said.
REFUSED = [
    *(
        ("generate", words, said)
        for words, said in [
            ("--spectrum nope", "spectrum: 'nope' given; there is no such preset, it must be one of best-10"),
            ("--config nope", "config: 'nope' given"),
            ("--size 100x96", "width: 100 given; must be a multiple of 16"),
            ("--size 96", "'96' is not WIDTHxHEIGHT"),
            ("--frames 18", "frames: 18 given; must be 4k + 1"),
            ("--steps 0", "steps: 0 given"),
            ("--steps many", "'many' is not a valid integer"),
            ("--guidance nan", "guidance: nan given; should be a finite number"),
            ("--guidance-2 -1", "guidance_2: -1.0 given; should be greater than or equal to 0"),
            ("--seed -1", "seed: -1 given"),
            ("--out /proc/a.mp4", "out: cannot write in '/proc'"),
            ("--out a.avi", "must end in .mp4"),
            ("--out=", "'' given; a name is needed"),
            ("--out .", "out: '.' given; the name must end in .mp4"),
            ("--out caf\udce9.mp4", "its byte 0xe9 is not UTF-8"),
            ("--negative caf\udce9", "its byte 0xe9 is not UTF-8"),
            ("--out /dev/null/a.mp4", "out: cannot write in '/dev/null'"),
            (f"--out {'x' * 252}.mp4", "File name too long"),
            ("--preview a.gif", "preview: 'a.gif' given; the name must end in .webp"),
            ("--preview /proc/a.webp", "preview: cannot write in '/proc'"),
            ("--latents a.pt", "latents: 'a.pt' given; the name must end in .safetensors"),
            ("--latents /proc/a.safetensors", "latents: cannot write in '/proc'"),
            ("--report a.txt", "report: 'a.txt' given; the name must end in .json"),
            ("--checkpoints /proc/mine", "checkpoints: cannot write in '/proc/mine"),
            ("--spectrum late.yaml --steps 6", "spectrum: the preset does not fit 6 steps: computed step 9"),
            ("--ranks 0", "0 is not in the range 1<=x<=65536"),
            ("--ulysses 7", "ulysses: 7 given; the model has 6 heads"),
            ("--ranks 4 --ring 3", "ranks: 4 given; ring 3 cannot make that number"),
            ("--cfg 2 --guidance 1", "cfg: 2 given; without guidance there is one branch"),
            ("--timeout 0", "'0' given; a number from 1 to 604800 is needed"),
            ("--shard --offload", "give only one of --shard, --replicate and --offload"),
            ("--launcher ssh", "'ssh' is not one of"),
            ("--resume --checkpoint-every 0", "resume: there is nothing to resume from without checkpoints"),
            ("too", "unexpected extra argument (too); put the prompt in quotes"),
            ("--too", "No such option"),
            ("--preset paper", "Did you mean '--spectrum'?"),
        ]
    ),
    ("compare", "--preset nope", "spectrum: 'nope'"),
    ("compare", "--steps 0", "steps: 0"),
    ("compare", "--out a.gif", ".mp4"),
    ("calibrate", "--out a.txt", "must end in .json"),
    ("calibrate", "--prompts /no/such.txt", "prompts: '/no/such.txt' given; it cannot be read"),
    ("calibrate", "--size 17x16", "width: 17 given"),
    ("calibrate", "--config nope", "config: 'nope' given"),
    ("calibrate", "--budgets 8,x", "'8,x' given; numbers such as 8,10,14 are needed, or none"),
    ("plan", "--nfe 51", "nfe: 51 given"),
    ("plan", "--nfe 7 --method fast", "'fast' is not one of"),
    ("plan", "--nfe 5 --psnr 40", "give exactly one of nfe, psnr and seconds"),
    ("plan", "--psnr 200", "the best predicted value"),
    ("plan", "--seconds 0.001", "one computed step alone needs"),
    ("plan", "--picture b.png", "nfe: not given"),
    ("plan", "--seconds 9 --report prompts.txt", "has no times"),
    ("storyboard", "--only four", "only: four given; the shots are one, two"),
    ("rehearse", "--gpu nope", "gpu: 'nope' given"),
    ("doctor", "--gpu nope", "gpu: 'nope' given"),
    ("convert", "--dtype int4", "'int4' is not one of"),
    ("convert", "too", "unexpected extra argument (too)"),
    ("doctor", "--model nope", "model: 'nope' given; it is neither embedded"),
    ("doctor", "too", "unexpected extra argument (too)"),
    ("generate", "--model ./none", "model: './none' given; there is no folder '/"),
    ("generate", "--config queue", "config: 'queue' given; it is a folder, '/"),
    ("generate", "--revision v2", "revision: 'v2' given; 'wan-tiny' is on this machine"),
    ("config", "nope", "config: 'nope' given"),
    ("config", "wan-tiny --schema", "schema: it is the same for all configs; give no name"),
    ("preset", "nope", "spectrum: 'nope' given"),
    ("preset", "paper --schema", "schema: it is the same for all presets; give no name"),
    ("queue add", "--frames 18", "frames: 18 given; must be 4k + 1"),
    ("queue cancel", "99999999999999999999", "99999999999999999999 is not in the range"),
    ("queue cancel", "7", "request: 7 given; the queue has no"),
    ("queue run", "too", "unexpected extra argument (too)"),
    ("status", "too", "unexpected extra argument (too)"),
    ("serve", "--port 65536", "65536 is not in the range 0<=x<=65535"),
    ("keys add", "--name bob", "has a key of this name"),
    ("keys list", "too", "unexpected extra argument (too)"),
    ("keys remove", "too", "unexpected extra argument (too)"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the cases name."""
    folder = tmp_path_factory.mktemp("contract")
    tiny = shipped("wan-tiny.yaml").read_text()
    (folder / "mine.yaml").write_text(
        tiny.replace("fps: 8", "fps: 9\ncompile: true\nmemory: {transformer: shard}")
    )
    (folder / "late.yaml").write_text("schedule: {kind: explicit, computed: [0, 9]}\n")
    (folder / "film.yaml").write_text(FILM)
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "other.txt").write_text("a blue square\n")
    seconds = {"computed_median": 1.0, "forecast_median": 0.01}
    (folder / "timed.json").write_text(json.dumps({"step_seconds": seconds, "topology": {"world": 1}}))
    write_image(folder / "start.png")
    write_lora(folder / "one.safetensors")
    queue = ["--queue", str(folder / "queue")]
    for number in (1, 2):
        assert cli.run(["queue", "add", PROMPT, *queue, "--out", str(folder / f"{number}.mp4")]) == 0
    assert cli.run(["queue", "cancel", "1", *queue]) == 0
    assert cli.run(["keys", "add", "bob", "--keys", str(folder / "keys.yaml")]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the commands run."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(entry: str, *words: str) -> int:
    return cli.run([*entry.split(), *ENTRIES[entry][1], *words])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Everything in what a command plans to do, by names such as `request.seed`."""
    if isinstance(content, BaseModel):
        return flat(content.model_dump(mode="json"), path)
    if is_dataclass(content):
        content = {one.name: getattr(content, one.name) for one in fields(content)}
    elif isinstance(content, list | tuple):
        content = {str(number): one for number, one in enumerate(content)}
    if isinstance(content, dict):
        found: dict[str, Any] = {}
        for name, value in content.items():
            found |= flat(value, f"{path}.{name}" if path else name)
        return found
    return {path: str(content) if isinstance(content, Path) else content}


def queued(words: list[str]) -> dict[str, Any]:
    """A request as it stands in the queue that it was added to."""
    shutil.rmtree("new", ignore_errors=True)
    assert cli.run(["queue", "add", *words]) == 0
    with closing(Queue(Path("new"))) as queue:
        entry = queue.entry(1)
    late = None if entry.deadline is None else round(entry.deadline - entry.submitted)
    return {"name": entry.name, "owner": entry.owner, "priority": entry.priority, "seconds": late}


def options_of(entry: str, words: list[str], *but: str) -> dict[str, Any]:
    """What the command's function is called with."""
    command = ENTRIES[entry][0]
    for word in entry.split():
        command = command.commands[word] if isinstance(command, click.Group) else command
    given = command.make_context(entry, list(words)).params
    return {name: value for name, value in given.items() if name not in but}


PLANS: dict[str, Callable[[list[str]], Any]] = {
    "generate": lambda words: build_batch(**options_of("generate", words, "launcher")).first,
    "compare": lambda words: plan_comparison(**options_of("compare", words, "as_json")),
    "calibrate": lambda words: plan_calibration(**options_of("calibrate", words, "ranks", "timeout")),
    "storyboard": lambda words: plan_film(
        **options_of("storyboard", words, "replicas", "dry_run", "price", "gpu", "prune", "schema", "as_json")
    ),
    "rehearse": lambda words: build_scenario(
        **options_of("rehearse", words, "rank", "topologies", "as_json")
    ),
    "convert": lambda words: options_of("convert", words),
    "queue add": queued,
    "queue run": lambda words: options_of("queue run", words),
    "serve": lambda words: options_of("serve", words),
    "keys add": lambda words: options_of("keys add", words),
}


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    both = {name: after.get(name, GONE) for name in {**before, **after}}
    return {name: value for name, value in both.items() if value != before.get(name, GONE)}


def is_as_told(changed: dict[str, Any], told: dict[str, Any]) -> bool:
    """Whether exactly the fields that are told of have changed, each to the value that is told."""
    named = {name: next((one for one in told if one == name), None) for name in changed}
    for name in changed:
        if named[name] is None:
            named[name] = next((one for one in told if one.endswith("*") and name.startswith(one[:-1])), None)
    if set(named.values()) != set(told):
        return False
    pairs = [(told[str(named[name])], value) for name, value in changed.items()]
    return all(
        want.fullmatch(str(got)) is not None if isinstance(want, re.Pattern) else want == got
        for want, got in pairs
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_option_does_what_it_says(
    case: Case, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.entry != "rehearse":  # which runs the engine, on tensors that do not exist
        monkeypatch.setattr("runtime.engine.Engine.__init__", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setenv("COLUMNS", "160")
    beside, words = case.beside.split(), case.words.split()
    if case.changes is not None:
        plan, base = PLANS[case.entry], ENTRIES[case.entry][1]
        changed = differences(flat(plan([*base, *beside])), flat(plan([*base, *beside, *words])))
        assert is_as_told(changed, case.changes), changed
    elif case.refused:
        refused(case.entry, [*beside, *words], case.refused, folder, capfd)
    elif case.says:
        if case.option not in ("--dry-run", "--schema", "--json"):  # without these, much would be done
            run(case.entry, *beside)
            assert case.says not in capfd.readouterr().out
        assert run(case.entry, *beside, *words) == 0
        assert case.says in " ".join(capfd.readouterr().out.split())
    elif case.makes:
        before = files(folder)
        assert run(case.entry, *beside, *words) == 0
        assert case.makes in files(folder) - before
    else:
        source = (ROOT / "tests" / case.shown_by).read_text(encoding="utf-8")
        assert f'"{case.option}"' in source or f" {case.option} " in source


def commands(group: click.Group, *names: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, with the words that call it."""
    yield " ".join(names), group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield " ".join([*names, name]), command


def names_of(command: click.Command) -> dict[str, dict[str, Any]]:
    """Every spelling of every option, with what it is."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    return {
        name: one.to_info_dict()
        for one in options
        for name in [*one.opts, *one.secondary_opts]
        if name.startswith("--")
    }


def test_every_option_has_a_case_and_every_case_an_option() -> None:
    found = dict(commands(cli.cli))
    assert names_of(found.pop("")).keys() == {"--verbose", "--quiet", "--version"}
    assert names_of(found.pop("queue")).keys() == names_of(found.pop("keys")).keys() == ANYWHERE
    assert found.keys() == ENTRIES.keys()
    for entry, command in found.items():
        options = names_of(command)
        assert options.pop("--verbose")["is_flag"] and options.pop("--quiet")["is_flag"]  # see below
        if entry in SHARED:
            taken = names_of(found[SHARED[entry]])
            shared = {name: one for name, one in taken.items() if name not in NOT_FOR_RANKS | ANYWHERE}
            assert {name: options.pop(name) for name in shared} == shared
        assert {case.option for case in CASES if case.entry == entry} == options.keys(), entry


@pytest.mark.parametrize("module", RANKS)
def test_ranks_take_the_options_of_their_command(module: str) -> None:
    """As they are handed on by `--launcher torchrun` and `--ranks`, word for word."""
    command, entry = RANKS[module]
    own, taken = names_of(command), names_of(ENTRIES[entry][0])
    assert all(own.pop(name)["is_flag"] for name in ANYWHERE)
    assert own == {name: one for name, one in taken.items() if name not in NOT_FOR_RANKS | ANYWHERE}


def test_a_queued_request_is_the_one_that_generate_would_make(folder: Path) -> None:
    """Every option at once, but those that contradict each other."""
    rows = [case for case in CASES if case.entry == "generate" and case.changes is not None]
    left_out = ["--no-compile", "--replicate", "--offload", "--image", "--guidance-2"]
    left_out += ["--ranks", "--ring", "--cfg"]
    words = [word for case in rows if case.option not in left_out for word in case.words.split()]
    words += ["--checkpoint-every", "2"]
    job = PLANS["generate"]([PROMPT, *words]).absolute()
    assert cli.run(["queue", "add", PROMPT, *words, "--queue", "new"]) == 0
    with closing(Queue(Path("new"))) as queue:
        added = flat(queue.entry(1).job)
    assert {name: value for name, value in flat(job).items() if not name.startswith("recipe")}.items() <= (
        added.items()
    )


def test_verbose_says_more(folder: Path) -> None:
    levels = []
    for before, after in (([], []), (["-v"], []), (["--verbose"], []), ([], ["-v"]), ([], ["--verbose"])):
        assert cli.run([*before, "status", "--queue", "b", *after]) == 2
        levels.append(logging.getLogger().level)
    assert levels == [logging.WARNING, *[logging.INFO] * 4]
    assert cli.run(["queue", "-v", "cancel", "1", "--queue", "b"]) == 2  # between the two words of a command
    assert logging.getLogger().level == logging.INFO


@pytest.mark.parametrize(("before", "after"), [([], []), (["-q"], []), ([], ["--quiet"]), (["-v"], ["-q"])])
def test_quiet_leaves_warnings_and_the_path(
    before: list[str],
    after: list[str],
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def do(batch: Batch, console: Console, **_: Any) -> None:
        with timed(console, "loading"):
            say(console, "step 1/2")
        logging.getLogger("launch").warning("crowded")
        insist(console, "warning: one colour")
        print_path(batch.first.outputs.video)

    monkeypatch.setattr("launch.shell.run.run_batch_shown", do)
    assert cli.run([*before, "generate", PROMPT, "--out", "b.mp4", *after]) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == "b.mp4\n"
    assert "crowded" in stderr and "warning: one colour\n" in stderr
    assert ("step 1/2" in stderr, "loading" in stderr) == ((False,) * 2 if before or after else (True,) * 2)
    assert logging.getLogger().level == (logging.INFO if "-v" in before else logging.WARNING)


def refused(entry: str, words: list[str], said: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: nothing on stdout, the reason on stderr, in one line unless it is of usage."""
    before = files(folder)
    assert run(entry, *words) == 2
    stdout, stderr = capfd.readouterr()
    assert said in " ".join(stderr.split())
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.startswith("Usage: ") or re.fullmatch("lockstep: .+\n", stderr), stderr
    assert files(folder) == before


@pytest.mark.parametrize(("entry", "words", "said"), REFUSED)
def test_a_bad_request_exits_2_and_starts_nothing(
    entry: str,
    words: str,
    said: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.engine.Engine.__init__", lambda *_: pytest.fail("a model was loaded"))
    refused(entry, words.split(), said, folder, capfd)


# What a command that is done says on stdout, and it says nothing on stderr.
DONE = {
    "plan": ("--nfe 7", "7 of 50 steps"),
    "storyboard": ("--dry-run", "2 shots, 34 frames"),
    "rehearse": (TINY, "estimated, not measured: denoising"),
    "doctor": ("", "wan2.1-t2v-14b-720p"),
    "config": ("", "model: wan-tiny"),
    "preset": ("", "kind: paper"),
    "queue add": ("", "1"),
    "queue cancel": ("", ""),
    "status": ("", "request-2"),
    "keys add": ("", "lockstep-"),
    "keys list": ("", "bob owner bob priority 0"),
    "keys remove": ("", ""),
}
# What a command opens or starts, at which it is interrupted; if need be, with the option that names it.
INTERRUPTED = {
    **dict.fromkeys(("generate", "compare", "calibrate", "rehearse", "queue add"), "wan-tiny.yaml"),
    "plan": "timed.json --report",
    "storyboard": "film.yaml",
    "convert": "model_index.json",
    "doctor": "ffmpeg",
    "config": "wan-tiny.yaml",
    "preset": "paper.yaml",
    "queue cancel": "queue.sqlite",
    "queue run": "queue.sqlite",
    "status": "queue.sqlite",
    "serve": "wan-tiny.yaml",
    **dict.fromkeys(("keys add", "keys list", "keys remove"), "keys.yaml"),
}
# Commands that end with 3 when their result cannot be told, and words that let them have one.
UNTOLD = {entry: words for entry, (words, said) in DONE.items() if said} | {"serve": ""}
# What takes a model, a Ray or a lost disk: where these commands end so.
ELSEWHERE = {
    ("compare", 0): "launch/commands/test_compare.py::test_presets_prompts_and_seeds_are_all_run",
    ("calibrate", 0): "launch/commands/test_calibrate.py::test_calibrate_plan_and_generate",
    ("convert", 0): "launch/commands/test_convert_command.py::test_it_prints_the_folder",
    ("convert", 3): "launch/commands/test_convert_command.py::test_a_disk_that_fails_exits_3",
    ("queue run", 0): "launch/serve/test_ray_pool.py::test_a_killed_and_a_stopped_pool_lose_nothing",
    ("serve", 0): "launch/http/test_server.py::test_a_server_that_is_killed_goes_on_with_what_it_accepted",
    ("keys remove", 3): "launch/http/test_serve_command.py::test_a_file_of_keys_that_cannot_be_written_stays",
    ("compare", 3): "launch/test_cli.py::test_advice_is_given_where_it_is_true",
    ("generate", 3): "launch/test_cli.py::test_a_failure_in_the_middle_exits_3_and_leaves_nothing",
    ("queue cancel", 3): "launch/serve/test_queue.py::test_a_commit_that_fails_leaves_the_queue_as_it_was",
    ("queue run", 3): "launch/cluster/test_ray_cluster.py::"
    "test_a_queue_whose_ray_is_gone_waits_and_says_how_it_goes_on",
}


@pytest.mark.parametrize("entry", DONE)
def test_what_is_done_exits_0(
    entry: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words, said = DONE[entry]
    assert run(entry, *words.split()) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    assert said in " ".join(stdout.split()) if said else stdout == ""


@pytest.mark.parametrize("entry", UNTOLD)
def test_what_cannot_be_told_exits_3(
    entry: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = io.FileIO("/dev/full", "w")
    with suppress(OSError), io.TextIOWrapper(device, encoding="utf-8", write_through=True) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(entry, *UNTOLD[entry].split()) == 3
    said = capfd.readouterr().err
    assert (
        said.startswith("lockstep: ") and said.endswith("No space left on device\n") and said.count("\n") == 1
    )


def test_a_calibration_that_fails_exits_3(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = overflowing(folder)
    (folder / "two.txt").write_text("a red circle\na blue square\n")
    before = files(folder)
    assert run("calibrate", "--config", str(config), *SMALL, "--prompts", "two.txt") == 3
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.splitlines()[-1].startswith("lockstep: ")
    assert "Traceback" not in stderr and files(folder) == before


_interrupting: list[str] = []  # the end of a name: whatever of that name is opened or started interrupts


def _interrupt(event: str, arguments: tuple[Any, ...]) -> None:
    if not _interrupting or event not in ("open", "sqlite3.connect", "subprocess.Popen"):
        return
    name = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    if _interrupting[0] in Path(name).name:
        _interrupting.clear()
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def interrupting() -> list[str]:
    sys.addaudithook(_interrupt)  # for ever, but it does nothing until it is told a name
    return _interrupting


@pytest.mark.parametrize("entry", INTERRUPTED)
def test_an_interrupted_command_exits_130(
    entry: str, folder: Path, interrupting: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    signal.signal(signal.SIGINT, interrupt)  # as `main` does
    name, *option = INTERRUPTED[entry].split()
    interrupting.append(name)
    try:
        assert run(entry, *(word for one in option for word in (one, name))) == 130
    finally:
        interrupting.clear()
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.removeprefix("\n") == "lockstep: cancelled\n"  # below a terminal's ^C
    assert files(folder) == before


def test_every_command_ends_in_every_way_in_some_test() -> None:
    ends = {(entry, 0) for entry in DONE} | {("generate", 0)} | {(entry, 2) for entry, *_ in REFUSED}
    ends |= {(entry, 3) for entry in UNTOLD} | {("calibrate", 3)} | {(entry, 130) for entry in INTERRUPTED}
    for end, test in ELSEWHERE.items():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
        assert end not in ends
    assert ends | ELSEWHERE.keys() == {(entry, code) for entry in ENTRIES for code in (0, 2, 3, 130)}


def test_help_is_helpful(capfd: pytest.CaptureFixture[str]) -> None:
    """The list of commands cuts no sentence, and every option says what it is."""
    for entry, command in commands(cli.cli):
        assert cli.run([*entry.split(), "--help"]) == 0
        said = capfd.readouterr().out
        assert said.startswith(f"Usage: lockstep {entry}".strip())
        assert "..." not in said.replace("]...", "").replace("S...", "")  # those are arguments
        assert [one.name for one in command.params if isinstance(one, click.Option) and not one.help] == []


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert re.fullmatch(r"lockstep, version \d+\.\d+\.\d+\n", capfd.readouterr().out)


# Every field of report.json, schema 1; what each means: docs/report.md.
FIELDS = {
    "schema": "1",
    "request.prompt": "string",
    "request.image": "string or null",
    "request.extend": "object or null",
    "request.travel": "list of objects",
    "request.negative": "string",
    "request.width": "integer",
    "request.height": "integer",
    "request.frames": "integer",
    "request.steps": "integer",
    "request.guidance": "number",
    "request.guidance_2": "number or null",
    "request.embedded": "boolean",
    "request.seed": "integer",
    "request.max_sequence_length": "integer",
    "request.videos": "integer",
    "request.spectrum": "string",
    "request.deadline": "number or null",
    "spectrum": "object",
    "chosen": "string or null",
    "made": "string",
    "host": "string",
    "device": "string",
    "dtype": "string",
    "fps": "integer",
    "model.name": "string",
    "model.revision": "string",
    "model.loras[].file": "string",
    "model.loras[].scale": "number",
    "model.loras[].expert": "string or null",
    "model.loras[].digest": "string",
    "recipe": "string",
    "topology.world": "integer",
    "topology.cfg": "integer",
    "topology.ring": "integer",
    "topology.ulysses": "integer",
    "attention": "string",
    "performance.profile": "string",
    "performance.compile": "boolean",
    "performance.fuse_projections": "boolean",
    "performance.fuse_forecasts": "boolean",
    "performance.batch_guidance": "boolean",
    "performance.overlap_exchanges": "boolean",
    "performance.quantization": "string",
    "performance.kernel": "string",
    "steps": "integer",
    "computed.cond": "list of integers",
    "computed.uncond": "list of integers",
    "nfe.cond": "integer",
    "nfe.uncond": "integer",
    "decision_digest": "list of strings",
    "seconds.load": "number",
    "seconds.lora": "number",
    "seconds.encode": "number",
    "seconds.denoise": "number",
    "seconds.decode": "number",
    "seconds.write": "number",
    "seconds.total": "number",
    "step_seconds.computed_median": "number or null",
    "step_seconds.forecast_median": "number or null",
    "step_log[].index": "integer",
    "step_log[].kind": "string",
    "step_log[].timestep": "number",
    "step_log[].seconds": "number",
    "step_log[].sent": "integer",
    "step_log[].sent_by_axis": "object",
    "step_log[].expert": "string",
    "step_log[].error": "number or null",
    "step_log[].expected": "number or null",
    "windows": "integer",
    "resumed_at": "integer",
    "checkpoint_bytes": "integer",
    "forecaster.bytes_per_rank": "integer",
    "forecaster.features_kept": "integer",
    "memory.weights": "integer",
    "memory.device_peak": "integer or null",
    "memory.text_encoder": "string",
    "memory.vae": "string",
    "collective_bytes.computed_step": "integer",
    "collective_bytes.forecast_step": "integer",
    "expectation.psnr": "number or null",
    "expectation.deviation": "number or null",
    "expectation.added": "list of integers",
    "expectation.dropped": "list of integers",
    "expectation.handed_over": "integer or null",
    "expectation.note": "string",
    "frames_sha256": "list of strings",
    "videos": "list of strings",
    "warnings": "list of strings",
    "quality": "object or null",
    "quality.psnr": "number",
    "quality.ssim": "number",
    "quality.vmaf": "number or null",
    "comparison": "object or null",
    "comparison.denoise_seconds": "number",
    "comparison.speedup": "number",
    "comparison.ideal_speedup": "number",
    "preview": "object or null",
    "preview.count": "integer",
    "preview.seconds": "number",
    "versions": "object",
}
NOT_OF_TINY = {  # fields that are there for other models alone
    "request.guidance_2",
    "request.embedded",
    "request.extend",
}
_NAMES = {bool: "boolean", int: "integer", float: "number", dict: "object", type(None): "null"}


def type_of(annotation: Any) -> str:
    """A type of Python's as JSON calls it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(parts[0])
    if origin is Literal:
        return " or ".join(str(one) for one in parts)
    if origin in (list, tuple):
        return f"list of {type_of(parts[0])}s"
    if origin in (Union, UnionType):
        return " or ".join(type_of(one) for one in parts)
    kind = origin or annotation
    if kind in _NAMES:
        return _NAMES[kind]
    assert issubclass(kind, str | BaseModel), kind
    return "string" if issubclass(kind, str) else "object"


def typed(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of a model and of its parts, with its type."""
    for name, field in model.model_fields.items():
        at = path + (field.serialization_alias or name)
        parts = [VideoRequest] if at == "request" else [field.annotation, *get_args(field.annotation)]
        part = next((one for one in parts if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if part is None or path == "request.":
            yield at, type_of(field.annotation)
            continue
        if "null" in (kind := type_of(field.annotation)):
            yield at, kind
        yield from typed(part, f"{at}[]." if kind.startswith("list") else f"{at}.")


def test_every_field_of_the_report_is_in_the_table_the_model_and_the_page() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert {name: kind for name, kind, _ in rows} == FIELDS == dict(typed(Report))
    assert len(rows) == len(FIELDS)


def found_in(report: Any, path: str) -> list[Any]:
    """The values of a field, of every element where it is one of a list's."""
    values = [report]
    for name in path.split("."):
        values = [value[name.removesuffix("[]")] for value in values if value is not None]
        if name.endswith("[]"):
            values = [one for value in values for one in value]
    return values


def conforms(value: Any, kind: str) -> bool:
    if " or " in kind:
        return any(conforms(value, one) for one in kind.split(" or "))
    if kind.startswith("list of "):
        one = kind.removeprefix("list of ").removesuffix("s")
        return isinstance(value, list) and all(conforms(part, one) for part in value)
    if kind == "1":
        return value == 1
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return (
        type(value)
        is {
            "boolean": bool,
            "integer": int,
            "string": str,
            "object": dict,
            "null": type(None),
        }[kind]
    )


@pytest.mark.timeout(120)
def test_one_run_with_many_options(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Files are where they were asked for, and the report says what was asked for and what came of it."""
    (folder / "kept").mkdir()
    (folder / "kept" / "thesis.tex").write_text("mine")
    before = files(folder)
    words = "--out sub/a.mp4 --report reports/b.json --checkpoints kept --checkpoint-every 1 --videos 2 "
    words += "--preview sub/p.webp "
    words += "--seed 3 --negative blue --guidance 3 --spectrum paper-fast --lora one.safetensors 0.01 "
    words += "--attention math --replicate --no-compile --timeout 60 --busy-timeout 60 --cfg 1 --compare"
    assert run("generate", *SMALL, *words.split()) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == "sub/a-1.mp4\nsub/a-2.mp4\n"
    assert "step 6/6" in stderr and "NFE" in stderr and "ETA" in stderr
    assert "faster than the full sampler" in stderr and "PSNR" in stderr
    made = {"sub/a-1.mp4", "sub/a-2.mp4", "reports/b.json", "reports/b.png"}
    assert files(folder) - before == made and before <= files(folder)
    assert [path.name for path in (folder / "kept").iterdir()] == ["thesis.tex"]

    report = json.loads((folder / "reports" / "b.json").read_text())
    asked = {"prompt": PROMPT, "negative": "blue", "width": 64, "height": 48, "frames": 5, "steps": 6}
    asked |= {"guidance": 3.0, "seed": 3, "max_sequence_length": 32, "videos": 2, "spectrum": "paper-fast"}
    assert report["request"] == asked | {"image": None, "travel": [], "deadline": None}
    for path, kind in FIELDS.items():
        if path in NOT_OF_TINY:
            continue
        values = found_in(report, path)
        assert values and all(conforms(value, kind) for value in values), (path, values)
    names = {re.sub(r"\[\]", "", path).split(".")[0] for path in FIELDS}
    assert report.keys() == names
    nfe = report["nfe"]["cond"]
    assert 0 < nfe < 6 and report["comparison"]["ideal_speedup"] == pytest.approx(6 / nfe)
    assert report["quality"]["psnr"] > 10 and report["attention"] == "math"
    named = ("compile", "fuse_projections", "fuse_forecasts", "batch_guidance", "overlap_exchanges")
    off = dict.fromkeys(named, False)
    assert report["performance"] == off | {"profile": "exact", "quantization": "none", "kernel": "math"}
    assert report["videos"] == ["sub/a-1.mp4", "sub/a-2.mp4"] and len(report["frames_sha256"]) == 2
    assert report["checkpoint_bytes"] > 0 and report["versions"].keys() > {"lockstep", "python", "torch"}
