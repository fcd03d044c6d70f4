"""Several LoRAs on the command line."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import cli
from launch.commands.build_job import build_job
from launch.serve.queue import Queue
from runtime.jobs.job import Job
from runtime.request.config import Lora
from tests.jobs import make_job

TARGET = "transformer.blocks.0.attn1.to_q.lora_"


def write(path: Path) -> str:
    save_file({f"{TARGET}A.weight": torch.ones(1, 192), f"{TARGET}B.weight": torch.ones(192, 1)}, path)
    return str(path)


def test_several_are_one_job_in_their_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.safetensors"), write(tmp_path / "two.safetensors")
    job = make_job(tmp_path / "a.mp4", lora=[{"file": two}, {"file": one, "scale": -0.5}])
    assert job.config.lora == (Lora(file=two), Lora(file=one, scale=-0.5))
    assert Job.from_json(job.absolute().to_json()).config.lora == job.config.lora


def test_each_may_be_for_one_of_two_experts(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.safetensors"), write(tmp_path / "two.safetensors")
    given = [(f"high:{one}", 1.0), (f"low:{two}", 0.5), (two, 2.0)]
    config = build_job(prompt="a", out=tmp_path / "a.mp4", lora=given).absolute().config
    assert config.lora == (
        Lora(file=one, expert="high"),
        Lora(file=two, scale=0.5, expert="low"),
        Lora(file=two, scale=2.0),
    )


@pytest.mark.parametrize(
    ("words", "loras"),
    [
        ("--lora a.safetensors", [("a.safetensors", 1.0)]),
        ("--lora a.safetensors=0.5 x", [("a.safetensors", 0.5)]),
        ("--lora=a.safetensors=-.5 x", [("a.safetensors", -0.5)]),
        ("x --lora low:a.safetensors 2 --lora=high:b=1e-1", [("low:a.safetensors", 2.0), ("high:b", 0.1)]),
        ("--lora=b -2 x", [("b", -2.0)]),
        ("--lora a=b/c.safetensors x", [("a=b/c.safetensors", 1.0)]),
        ("--lora a=3=1 --lora b x", [("a=3", 1.0), ("b", 1.0)]),
        ("-- --lora", []),
    ],
)
def test_the_scale_may_be_left_out_or_be_of_the_same_word(words: str, loras: list[tuple[str, float]]) -> None:
    [generate] = [one for name, one in cli.cli.commands.items() if name == "generate"]
    assert list(generate.make_context("generate", words.split()).params["lora"]) == loras


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora", "Option '--lora' requires"),
        ("--lora a.safetensors=much x", "'much' given; a number from -1000 to 1000 is needed"),
        ("--lora a.safetensors= x", "'' given; a number from -1000 to 1000 is needed"),
        ("--lora a.safetensors nan x", "'nan' given; a number from -1000 to 1000 is needed"),
        ("--lora a.safetensors much x", "unexpected extra argument"),
    ],
)
def test_a_scale_that_is_no_number_is_refused(
    words: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", *words.split()]) == 2
    assert said in " ".join(capfd.readouterr().err.split())


def test_each_is_looked_at_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = write(tmp_path / "good.safetensors"), tmp_path / "a.mp4"
    bad = str(tmp_path / "none.safetensors")
    given = ["generate", "a", "--out", str(out), "--lora", good, "1", "--lora", bad, "0.5"]
    assert cli.run(given) == 2
    assert (
        capsys.readouterr().err
        == f"lockstep: lora: {bad!r} given; it cannot be read: No such file or directory\n"
    )
    assert not out.exists()


def test_one_that_the_config_names_is_looked_at_as_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "mine.yaml", tmp_path / "a.mp4"
    size = "{width: 64, height: 48, frames: 5}"
    config.write_text(f"model: wan-tiny\nfps: 8\ndefaults: {size}\nlora: {{file: none.safetensors}}\n")
    given = ["queue", "add", "a", "--config", str(config), "--out", str(out), "--queue", str(tmp_path / "q")]
    assert cli.run(given) == 2
    assert "none.safetensors' given; it cannot be read" in capsys.readouterr().err


def test_a_tilde_is_the_home_in_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves that of `--spectrum=~/p.yaml` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.yaml").write_text("stream: guided\nschedule: {kind: paper}\n")
    write(tmp_path / "one.safetensors")
    given = ["queue", "add", "a", "--spectrum=~/p.yaml", "--out=~/a.mp4", "--queue=~/queue"]
    assert cli.run([*given, "--lora", "~/one.safetensors", "--lora=low:~/one.safetensors=2"]) == 0
    with closing(Queue(tmp_path / "queue")) as queue:
        job = queue.entry(1).job
    assert job.request.spectrum == str(tmp_path / "p.yaml")
    assert job.outputs.video == tmp_path / "a.mp4"
    one = str(tmp_path / "one.safetensors")
    assert job.config.lora == (Lora(file=one), Lora(file=one, scale=2.0, expert="low"))


@pytest.mark.parametrize("command", ["calibrate", "compare"])
@pytest.mark.parametrize("kind", ["missing", "unreadable", "unused"])
def test_commands_without_the_option_look_at_those_of_the_config(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: str,
) -> None:
    monkeypatch.setattr("runtime.engine.Engine.__init__", lambda *_: pytest.fail("a model was loaded"))
    lora, config = tmp_path / "it.safetensors", tmp_path / "mine.yaml"
    size = "{width: 64, height: 48, frames: 5}"
    config.write_text(f"model: wan-tiny\nfps: 8\ndefaults: {size}\nlora: {{file: it.safetensors}}\n")
    if kind == "unreadable":
        lora.write_bytes(b"half")
    if kind == "unused":
        save_file({"vae.weight": torch.ones(2, 2)}, lora)
    out = tmp_path / ("a.json" if command == "calibrate" else "a.mp4")
    prompt = [] if command == "calibrate" else ["a red circle"]
    assert cli.run([command, *prompt, "--config", str(config), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lockstep: lora: {str(lora)!r} given; ") and said.count("\n") == 1
    assert not out.exists()
