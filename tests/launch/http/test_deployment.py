"""The API as a deployment of Ray Serve, on a local Ray: it makes a video, and goes on when it is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from launch.http.deployment import Settings
from runtime.errors import BadRequestError
from tests.commands import marked
from tests.places import ROOT

_MARK = "LOCKSTEP_TEST_DEPLOYMENT"
SMALL = {"frames": 5, "steps": 4, "spectrum": "off", "seed": 3}


class Deployed:
    """`serve run` with a config file, on a Ray of its own.

    Attributes:
        url: where its proxy answers.
    """

    def __init__(self, folder: Path):
        self.mark, self._log = uuid.uuid4().hex, (folder / "log").open("ab")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        application = {
            "name": "lockstep",
            "import_path": "launch.http.deployment:app",
            "route_prefix": "/",
            "args": {"queue": str(folder / "queue")},
        }
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
        (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
        command = [
            "env",
            "--default-signal=INT",  # which a shell's background jobs ignore
            str(Path(sys.executable).with_name("serve")),
            "run",
            "--address",
            "local",
            str(folder / "serve.yaml"),
        ]
        env = os.environ | {_MARK: self.mark, "PYTHONPATH": str(ROOT)}
        env.pop("RAY_ADDRESS", None)
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=self._log, stderr=self._log)

    def all(self) -> list[psutil.Process]:
        """Processes that it has started and that still run."""
        return marked(_MARK, self.mark)

    def replica(self) -> psutil.Process:
        """The process that answers requests."""
        names = [(process, " ".join(process.cmdline())) for process in self.all()]
        [found] = [process for process, name in names if "ServeReplica:lockstep" in name]
        return found

    def ready(self) -> bool:
        """Whether a replica of the pool could begin with a request."""
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz").status_code == 200
        return False


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployed]:
    made = Deployed(tmp_path)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                made.process.wait(60)
        for process in made.all():
            process.kill()


def wait(until: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_deployment_makes_videos_and_is_replaced_when_it_is_killed(deployed: Deployed) -> None:
    wait(deployed.ready)
    client = openai.OpenAI(base_url=f"{deployed.url}/v1", api_key="none")
    video = client.videos.create_and_poll(prompt="a red circle", size="64x48", extra_body=SMALL)
    assert video.status == "completed", video.error
    assert client.videos.download_content(video.id).content[4:8] == b"ftyp"
    with httpx.stream("GET", f"{deployed.url}/v1/videos/{video.id}/events") as answer:
        kinds = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event")]
    assert kinds[0] == kinds[-1] == "state" and kinds.count("step") == 4
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="x", size="64x50")
    assert refused.value.code == "invalid_value"

    before = deployed.replica()
    before.kill()
    wait(lambda: not before.is_running())
    wait(deployed.ready)
    again = client.videos.remix(video.id, prompt="a blue square")
    assert client.videos.poll(again.id).status == "completed"
    assert {one.id for one in client.videos.list()} == {video.id, again.id}

    deployed.process.send_signal(signal.SIGINT)
    deployed.process.wait(120)
    wait(lambda: not deployed.all())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "queue: missing"),
        ({"queue": "queue"}, "queue: 'queue' given; an absolute path is needed"),
        ({"queue": "/queue", "ranks": "0"}, "ranks: '0' given"),
        ({"queue": "/queue", "port": "1"}, "port"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(given: dict[str, str], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        Settings.parse(given)
