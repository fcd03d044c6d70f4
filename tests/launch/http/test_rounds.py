"""Rounds that the server makes beside its answers."""

import threading
import time

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
    rounds.wait(30)
    assert again
    assert "it is done later" in caplog.text and str(error) in caplog.text


def test_the_end_does_not_wait_for_a_long_round() -> None:
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        over.wait()

    rounds = Rounds("test", 0.01, work, "")
    rounds.start()
    assert begun.wait(30)
    rounds.stop()
    before = time.monotonic()
    rounds.wait(0.05)
    assert time.monotonic() - before >= 0.05 and threading.active_count() > 1
    over.set()
    rounds.wait(30)
