"""`ray job submit` to a real cluster with token authentication: done, stopped, resumed, refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from launch.commands import ray_job
from tests.forked import Command, completed
from tests.places import ROOT
from tests.ranks import free_port

PROMPT = "a red circle moving left on a black background"
RAY = "ray.scripts.scripts"

pytestmark = [pytest.mark.alone, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a user whose token lies in a file. A job that is stopped has time to end, however slow it is."""
    token = tmp_path_factory.mktemp("home") / "auth_token"
    token.write_text("0123456789abcdef0123456789abcdef")
    kept = "RAY_worker_niceness"  # ranks would wait for the other tests that run meanwhile
    clean = {name: told for name, told in os.environ.items() if name == kept or not name.startswith("RAY_")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    return clean | own


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """The job server of a cluster of this machine."""
    dashboard, port, agent = free_port(), free_port(), free_port()
    start = ["start", "--head", "--num-cpus=4", f"--port={port}", f"--dashboard-port={dashboard}"]
    start += [f"--dashboard-agent-listen-port={agent}"]  # its own is another cluster's, perhaps
    start += ["--disable-usage-stats", "--block"]
    nothing = subprocess.DEVNULL
    with Command(start, RAY, env=environment, stdout=nothing, stderr=nothing) as head:
        url = f"http://127.0.0.1:{dashboard}"
        try:
            while not accepts(url, environment):  # the server, then the node's agent
                assert head.poll() is None, "ray start failed"
                time.sleep(0.2)
            yield url
        finally:
            head.terminate()


def accepts(address: str, environment: dict[str, str]) -> bool:
    """Whether it takes a job that does nothing."""
    try:
        return "submission_id" in asked(address, "", environment, entrypoint="true")
    except OSError:
        return False


def asked(
    address: str, path: str, environment: dict[str, str], method: str | None = None, **posted: str
) -> Any:
    """What the job server answers; `ray job` itself takes seconds to start."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    content = json.dumps(posted).encode() if posted else None
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = Request(f"{address}/api/jobs/{path}", content, headers, method=method)
    with urlopen(request, timeout=30) as answer:
        return json.load(answer)


def ray(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return completed(arguments, RAY, env=environment)


def entrypoint(folder: Path, *options: str) -> list[str]:
    job = [sys.executable, "-m", "launch.ray_job", PROMPT, "--ranks", "2", "--cfg", "2"]
    return ["--", *job, "--out", str(folder / "a.mp4"), "--checkpoint-every", "1", *options]


def test_a_job_is_stopped_and_another_goes_on_from_its_checkpoint(
    address: str, environment: dict[str, str], tmp_path: Path
) -> None:
    steps = ["--size", "64x48", "--frames", "5", "--steps", "100", "--spectrum", "off"]
    submit = ["job", "submit", "--address", address, "--working-dir", str(ROOT)]
    submit_first = [*submit, "--no-wait", "--submission-id", "first", *entrypoint(tmp_path, *steps)]
    begun = ray(*submit_first, environment=environment)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    while not list(tmp_path.glob("*/*/manifest-*")):
        time.sleep(0.2)  # the test's own timeout ends this if the job fails
    about = asked(address, "first", environment)["metadata"]
    assert (about["lockstep_prompt"], about["lockstep_config"]) == (PROMPT, "wan-tiny")
    assert asked(address, "first/stop", environment, method="POST") == {"stopped": True}
    while asked(address, "first", environment)["status"] == "RUNNING":
        time.sleep(0.2)
    assert "lockstep: cancelled (stopped after step" in asked(address, "first/logs", environment)["logs"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.checkpoints"]
    stopped_at = max(int(path.name.split("-")[1]) for path in tmp_path.glob("*/*/manifest-*"))

    resumed = ray(*submit, *entrypoint(tmp_path, *steps, "--resume"), environment=environment)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "step 100/100" in resumed.stdout and "succeeded" in resumed.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["topology"]["world"] == 2
    assert 0 < report["resumed_at"] == stopped_at + 1 < 100


@pytest.mark.slow
def test_a_job_that_cannot_be_served_fails_with_the_reason(
    address: str, environment: dict[str, str], tmp_path: Path
) -> None:
    submit = ["job", "submit", "--address", address, "--working-dir", str(ROOT)]
    done = ray(*submit, *entrypoint(tmp_path, "--ranks", "10"), environment=environment)
    assert done.returncode != 0
    assert "the cluster has room for 4" in done.stdout


@pytest.mark.slow
def test_a_film_is_made_by_a_job(address: str, environment: dict[str, str], tmp_path: Path) -> None:
    shots = [f"  - {{id: s{number}, prompt: {PROMPT}, seed: {number}}}\n" for number in range(3)]
    size = "width: 64\nheight: 48\ndefaults: {steps: 4, frames: 5, spectrum: paper}\n"
    (tmp_path / "film.yaml").write_text(f"title: By a job\n{size}shots:\n{''.join(shots)}")
    submit = ["job", "submit", "--address", address, "--working-dir", str(ROOT), "--", sys.executable]
    submit += ["-m", "launch", "storyboard", str(tmp_path / "film.yaml"), "--replicas", "2", "--out"]
    done = ray(*submit, str(tmp_path / "film"), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "film" / "film.mp4") in done.stdout
    assert len(json.loads((tmp_path / "film" / "manifest.json").read_text())["shots"]) == 3
    relative = ray(*submit, "film", environment=environment)
    assert relative.returncode != 0 and "give an absolute path" in relative.stdout


def test_without_the_token_nothing_is_submitted(
    address: str, environment: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("f" * 32)
    with pytest.raises(HTTPError, match="403"):
        asked(address, "", environment | {"RAY_AUTH_TOKEN_PATH": str(path)}, entrypoint="true")


@pytest.mark.slow
def test_a_cluster_that_dies_ends_the_command_with_what_is_needed_to_resume(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """It is not the command's, so it is not started again."""
    port = free_port()
    start = ["start", "--head", "--num-cpus=4", f"--port={port}", "--include-dashboard=false"]
    start += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--block"]
    own = environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    command = ["generate", PROMPT, "--ranks", "2", "--steps", "300"]
    command += ["--spectrum", "off", "--timeout", "5", "--out", str(tmp_path / "a.mp4")]
    nothing = subprocess.DEVNULL
    with Command(start, RAY, env=environment, stdout=nothing, stderr=nothing) as head:
        try:
            while not takes_drivers(head, port):
                assert head.poll() is None, "ray start failed"
                time.sleep(0.2)
            with Command(command, env=own, stderr=subprocess.PIPE) as process:
                assert process.stderr is not None
                line = "begin"
                while line and "step 30/" not in line:
                    line = process.stderr.readline()
                children = psutil.Process(head.pid).children(recursive=True)
                next(child for child in children if child.name() == "gcs_server").kill()
                said = process.communicate(timeout=200)[1]
        finally:
            head.terminate()
    assert process.returncode == 3, said
    assert "--resume" in said and "Traceback" not in said
    assert list(tmp_path.glob("**/manifest-*"))


def takes_drivers(head: subprocess.Popen[bytes], port: int) -> bool:
    """Whether its node is there: `ray start` begins its agents last."""
    with contextlib.suppress(OSError, psutil.Error), socket.create_connection(("127.0.0.1", port), timeout=1):
        names = [" ".join(child.cmdline()) for child in psutil.Process(head.pid).children(recursive=True)]
        return any(name.startswith("ray::RuntimeEnvAgent") for name in names)
    return False


def test_a_relative_output_of_a_packed_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "runtime_resources" / "working_dir_files"
    packed.mkdir(parents=True)
    monkeypatch.chdir(packed)
    assert ray_job.run([PROMPT, "--out", "a.mp4"]) == 2
    assert "give an absolute path on a disk that the nodes share" in capfd.readouterr().err
