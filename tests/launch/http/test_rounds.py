"""Rounds that the server makes beside its answers."""

import threading

import pytest

from launch.http.rounds import Rounds
from launch.serve.queue import QueueError


@pytest.mark.parametrize("error", [OSError("disk full"), QueueError("locked"), KeyError("a fault of ours")])
def test_no_error_ends_the_rounds(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    made, twice = [0], threading.Event()

    def work() -> None:
        made[0] += 1
        if made[0] > 1:
            twice.set()
        raise error

    rounds = Rounds("test", 0.01, work, "it is done later")
    rounds.start()
    again = twice.wait(30)
    rounds.stop()
    assert again
    assert "it is done later" in caplog.text and str(error) in caplog.text
