"""Signals that mean the same are one, wherever they are heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.parallel.signals import SignalCount


def test_signals_within_a_second_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.2, 10.9, 11.1, 11.5, 12.2])
    monkeypatch.setattr("runtime.parallel.signals.time.monotonic", lambda: next(times))
    heard = SignalCount()
    assert [heard.hear() for _ in range(5)] == [True, False, False, True, False]
    assert heard.count == 2
    assert heard.since() == pytest.approx(2.2)
    heard.forget()
    assert (heard.count, heard.since()) == (0, 0.0)


IMPORTING = """
import os, signal, sys, time
from launch.shell.signals import stopped_by_signals

try:
    with stopped_by_signals(lambda: True):
        os.kill(os.getpid(), signal.SIGINT)   # asks for a stop
        time.sleep(1.1)
        import interrupted                    # a second one, while modules are imported
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped at once", interrupted.whole)
"""


def test_a_second_signal_that_waits_for_imports_is_not_taken_for_one_sent_twice(tmp_path: Path) -> None:
    module = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhole = True\n"
    (tmp_path / "interrupted.py").write_text(module)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], check=False, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.stdout == "stopped at once True\n", done.stderr
