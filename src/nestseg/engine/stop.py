"""Signals: the first asks a run to stop at a checkpoint, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Self, final

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED_EXIT_CODE = 75
"""Exit code of a run that stopped at a checkpoint; sysexits.h calls it EX_TEMPFAIL: try again later."""


class RunStopped(Exception):  # noqa: N818  # nothing went wrong
    """A run stopped because it was asked to; its checkpoint is written.

    Args:
        run: The run folder.
        step: Step of the checkpoint.
        signum: The signal that asked; 0 where another rank got it.
    """

    def __init__(self, run: Path, *, step: int, signum: int) -> None:
        self.run, self.step, self.signum = run, step, signum
        name = signal.Signals(signum).name if signum else "a signal to another rank"
        super().__init__(f"stopped by {name} at a checkpoint of step {step}; continue with --resume --run {run}")


class RunPruned(Exception):  # noqa: N818  # nothing went wrong
    """A run was given up after an evaluation, since whoever started it saw no promise in it.

    Args:
        run: The run folder; it can be resumed.
        step: Step of the evaluation.
    """

    def __init__(self, run: Path, *, step: int) -> None:
        self.run, self.step = run, step
        super().__init__(f"given up after the evaluation at step {step}: {run}")


@final
class StopRequest:
    """Listens for signals while entered; in a thread other than the main one Python hears none.

    ``signum`` is the signal that came, 0 while none has. A second signal ends the process by ``os._exit``, without
    waiting for anything: all files are written so that this cannot hurt them.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._came = 0.0
        # torchrun passes a signal on to processes that a terminal has sent it to already
        self._grace = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
            # one that came to whoever listens around this is for this too
            outers = (getattr(handler, "__self__", None) for handler in self._previous.values())
            self.signum = next((outer.signum for outer in outers if isinstance(outer, StopRequest)), 0)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        # a signal in the last moment of a run is for whoever listens around it
        outer = getattr(self._previous.get(self.signum), "__self__", None)
        if isinstance(outer, StopRequest):
            outer.signum = self.signum

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._came = signum, time.monotonic()
            # not through sys.stderr, which this may have interrupted; nobody may be left to read it
            with suppress(OSError):
                os.write(2, b"stopping at a checkpoint after this step; a second signal stops at once\n")
        elif time.monotonic() - self._came >= self._grace:
            os._exit(128 + signum)
