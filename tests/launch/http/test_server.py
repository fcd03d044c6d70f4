"""`lockstep serve` as its users have it: a process with a pool on a real Ray, asked by OpenAI's client."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

import httpx
import openai
import psutil
import pytest

from launch import cli
from launch.http.keys import read_keys
from launch.serve.entries import State
from launch.serve.queue import Queue
from tests.commands import marked, running
from tests.forked import Command
from tests.places import ROOT

pytestmark = [
    pytest.mark.alone,
    pytest.mark.timeout(290),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]
_MARK = "LOCKSTEP_TEST_SERVER"
SMALL = {"frames": 5, "steps": 4, "spectrum": "off", "seed": 3}


class Server:
    """A server on a queue, which may be killed and started again."""

    def __init__(self, folder: Path):
        self.queue, self.keys, self.mark = folder / "queue", folder / "keys.yaml", uuid.uuid4().hex
        self._log: IO[bytes] = (folder / "stderr").open("ab")
        self.process: Command | None = None
        self._family: list[psutil.Process] = []

    def start(self) -> None:
        words = ["serve", "--port", "0", "--queue", str(self.queue), "--keys", str(self.keys)]
        env = os.environ | {_MARK: self.mark, "PYTHONPATH": str(ROOT)}
        env.pop("RAY_ADDRESS", None)
        self.process = Command(words, spares=1, env=env, stdout=subprocess.PIPE, stderr=self._log)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url

    def client(self, token: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self._family += psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        with self.process as process:
            return process.wait()

    def left(self) -> list[psutil.Process]:
        """Processes that any of the servers has started and that still run; forked ones bear no mark."""
        return [*marked(_MARK, self.mark), *filter(running, self._family)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    assert cli.run(["keys", "add", "ann", "--keys", str(made.keys)]) == 0
    try:
        made.start()
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.end()  # it clears up what it has started, whatever that calls itself
        for process in made.left():
            process.kill()


@pytest.fixture
def token(server: Server, capsys: pytest.CaptureFixture[str]) -> str:
    name = uuid.uuid4().hex
    assert cli.run(["keys", "add", "ann", "--name", name, "--keys", str(server.keys)]) == 0
    return capsys.readouterr().out.strip()


def wait(until: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_openais_client_makes_a_video(server: Server, token: str) -> None:
    client = server.client(token)
    video = client.videos.create_and_poll(prompt="a red circle", size="64x48", extra_body=SMALL)
    assert video.status == "completed", video.error
    assert video.progress == 100 and video.seconds == "0.625"
    assert client.videos.download_content(video.id).content[4:8] == b"ftyp"
    report = httpx.get(
        f"{server.url}/v1/videos/{video.id}/report", headers={"Authorization": f"Bearer {token}"}
    ).json()
    assert report["nfe"] == {"cond": 4, "uncond": 4} and report["videos"] == ["video.mp4"]
    with httpx.stream(
        "GET", f"{server.url}/v1/videos/{video.id}/events", headers={"Authorization": f"Bearer {token}"}
    ) as answer:
        kinds = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event")]
        assert "preview" in kinds
        kinds = [kind for kind in kinds if kind != "preview"]  # at most one a second
    assert kinds == ["state", "state", "begun", *["step"] * 4, "state"]
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    again = client.videos.remix(video.id, prompt="a blue square")
    assert client.videos.poll(again.id).status == "completed"
    assert [one.id for one in client.videos.list(limit=1)] == [again.id, video.id]  # pages by itself
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.retrieve(video.id)
    assert refused.value.code == "video_not_found"
    assert not (server.queue / "results" / video.id).exists()


def test_a_video_that_is_deleted_while_it_is_made_frees_its_ranks(server: Server, token: str) -> None:
    client = server.client(token)
    video = client.videos.create(prompt="x", size="64x48", extra_body={**SMALL, "steps": 200})
    wait(lambda: client.videos.retrieve(video.id).progress > 2)
    assert client.videos.delete(video.id).deleted
    after = client.videos.create_and_poll(prompt="x", size="64x48", extra_body=SMALL)
    assert after.status == "completed", after.error
    with closing(Queue(server.queue)) as queue:
        [entry] = [entry for entry in queue.entries() if entry.name == video.id]
        assert entry.state is State.CANCELLED and entry.progress.step < 200
        [next_one] = [entry for entry in queue.entries() if entry.name == after.id]
        assert next_one.kills == 0 and next_one.tries == 1
    wait(lambda: not (server.queue / "results" / video.id).exists())  # with its checkpoints


def test_a_server_that_is_killed_goes_on_with_what_it_accepted(server: Server, token: str) -> None:
    client = server.client(token)
    long = {**SMALL, "steps": 60}
    whole = client.videos.create(prompt="a red circle", size="64x48", extra_body=long)
    wait(lambda: client.videos.retrieve(whole.id).status == "completed")
    video = client.videos.create(prompt="a red circle", size="64x48", extra_body=long)
    later = client.videos.create(prompt="another", size="64x48", extra_body=SMALL)
    wait(lambda: client.videos.retrieve(video.id).progress > 20)
    server.end(signal.SIGKILL)
    server.start()
    client = server.client(token)
    for id in (video.id, later.id):
        wait(lambda id=id: client.videos.retrieve(id).status == "completed")  # type: ignore[misc]
    with closing(Queue(server.queue)) as queue:
        ends = [
            [state for state, _, _ in queue.history(entry.id) if state not in (State.WAITING, State.RUNNING)]
            for entry in queue.entries()
        ]
    assert all(len(end) == 1 for end in ends)
    reports = [
        httpx.get(f"{server.url}/v1/videos/{id}/report", headers={"Authorization": f"Bearer {token}"}).json()
        for id in (whole.id, video.id)
    ]
    assert reports[1]["resumed_at"] > 0
    assert reports[0]["frames_sha256"] == reports[1]["frames_sha256"]
    assert server.end() == 0
    wait(lambda: not server.left())
    assert token not in (server.keys.parent / "stderr").read_text()
    assert all(token not in key.sha256 for key in read_keys(server.keys).keys)
