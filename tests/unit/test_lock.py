"""One process at a time in a run folder, and none locked out by a dead one (T26)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nestseg.core.errors import RunError
from nestseg.engine.lock import RunLock, lock_holder

HOLD = """
import sys, time
from pathlib import Path
from nestseg.engine.lock import RunLock
import os
with RunLock(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader worker, which lives on for a while when its parent is killed
        time.sleep(3)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_told_who_holds_the_folder_and_a_kill_frees_it(tmp_path, holder):
    who = lock_holder(tmp_path)
    assert who["pid"] == holder.pid
    with pytest.raises(RunError, match=rf"E-RUN-007 .*pid {holder.pid} on \S+ since 20\d\d-.*fix:"), RunLock(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path):
        pass


def test_a_folder_without_a_lock_is_free(tmp_path):
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path):
        pass
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path):
        pass
