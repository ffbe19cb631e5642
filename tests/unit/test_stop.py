"""Signals are heard once, by whoever runs, whatever became of the terminal (T3, T4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nestseg.engine.stop import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(signum, capfd):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) == before
    assert "a second signal stops at once" in capfd.readouterr().err


def test_a_signal_between_two_listeners_is_heard_by_both(capfd):
    with StopRequest() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as inner:
            assert inner.signum == signal.SIGTERM
    with StopRequest() as outer:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.signum == signal.SIGUSR1


@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 128 + signal.SIGTERM)])
def test_nobody_reads_standard_error_and_a_second_signal_ends_the_process(signals, code):
    script = (
        "import os, signal, sys\n"
        "from nestseg.engine.stop import StopRequest\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 2)\n"
        "with StopRequest() as stop:\n"
        "    for _ in range(int(sys.argv[1])):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(0 if stop.signum == signal.SIGTERM else 1)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(signals)], check=False)
    assert result.returncode == code
