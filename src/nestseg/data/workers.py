"""Processes that work ahead: steps in, results out, whatever happens to a process.

A worker has a socket and nothing that it shares with others, no lock and no queue: one that is killed takes the step
that it was at, and no more. A result travels in a file that lives in memory alone: its arrays are neither pickled nor
copied on the side of the run, and ``/dev/shm``, which containers often keep small, is not used.
"""

from __future__ import annotations

import atexit
import errno
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO, Generic, NamedTuple, NoReturn, TypeVar, cast, final

import torch

from nestseg.core.errors import DataError

T = TypeVar("T")

OnSample = Callable[[int], None]
"""Called with the place of a sample in its step before the sample is read."""

Work = Callable[[int, OnSample], T]
"""Makes the result of a step."""

PREFETCH = 2
"""Steps that a worker is asked for ahead of the one that is due."""

_WAIT = 0.2  # seconds between two looks at whether the run is to stop
_WATCH = 1.0  # seconds between two looks of a worker at whether the run still lives
_ALIGNMENT = 64
_MESSAGE = 8  # bytes, either way
_SHOWN = 16
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class WorkerWarning(UserWarning):
    """A loader process died and was started again."""

    of_one_rank = True


def read_ahead(
    work: Work[T],
    *,
    steps: range,
    num_workers: int,
    timeout: float,
    name_samples: Callable[[int], Sequence[str]],
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[T, None, None]:
    """Yield the results of steps in their order from processes that work on the next ones.

    Step number i is made by worker i modulo ``num_workers``. A worker that dies is replaced, and the new one makes what
    the old one had been asked for: the same results, since they depend on the step alone. At the second death in a row
    at one step it is given up.

    Closing the generator kills the workers, whatever they are doing. They also end within seconds once this process is
    gone, and when the interpreter ends without closing it.

    Args:
        work: Makes the result of a step. An exception that it raises is raised here, with the worker's traceback as its
            cause.
        steps: The steps.
        num_workers: Processes, at least 1.
        timeout: Seconds that a step may be waited for. Time in which this process was stopped does not count.
        name_samples: Names the samples of a step, in their order, for messages.
        should_stop: Looked at while a step is waited for; the generator ends early when it says so.

    Raises:
        DataError: E-DATA-075 for a step at which two workers died; E-DATA-076 for one that takes too long.

    Warns:
        WorkerWarning: If a worker died and was replaced.
    """
    workers: list[_Worker[T]] = []
    end = partial(_kill_all, workers, os.getpid())
    # the interpreter's own way to end processes is SIGTERM, which they ignore, and then it waits for them
    atexit.register(end)
    died_at = None
    try:
        for first in range(min(num_workers, len(steps))):
            workers.append(_Worker(work))
            for step in steps[first : PREFETCH * num_workers : num_workers]:
                workers[first].ask(step)
        for turn, step in enumerate(steps):
            number = turn % num_workers
            while True:
                try:
                    result = workers[number].take(timeout, should_stop)
                    break
                except _WorkerDiedError as death:
                    if step == died_at:
                        raise _death_error(death, name_samples(step)) from None
                    died_at = step
                    warnings.warn(_word_restart(death, name_samples(step)), WorkerWarning, stacklevel=2)
                    workers[number] = workers[number].replace()
                except _WorkerHangsError as hang:
                    raise _hang_error(hang, name_samples(step), timeout) from None
                except _StopAskedError:
                    return
            for following in steps[turn + PREFETCH * num_workers :][:1]:
                workers[number].ask(following)
            if isinstance(result, _Failure):
                result.raise_again()
            yield result
    finally:
        atexit.unregister(end)
        end()


class _WorkerDiedError(Exception):
    """A worker ended before it gave the step that is due."""

    def __init__(self, how: str, step: int, place: int | None) -> None:
        super().__init__(how)
        self.how, self.step, self.place = how, step, place


class _WorkerHangsError(Exception):
    """The step that is due did not come in time."""

    def __init__(self, step: int, place: int | None) -> None:
        super().__init__(step)
        self.step, self.place = step, place


class _StopAskedError(Exception):
    """The run is to stop."""


class _WorkerTracebackError(Exception):
    """The traceback of a worker, as text; stands as the cause of the exception that is raised in its stead."""


@final
class _Failure(NamedTuple):
    """An exception on its way from a worker."""

    error: Exception
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """Take an exception while it is handled; one that cannot be pickled becomes a RuntimeError that words it."""
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
        except Exception:  # noqa: BLE001  a constructor may raise anything, and this must arrive whatever it is
            other = RuntimeError(f"{type(error).__qualname__}: {error}")
            for note in getattr(error, "__notes__", ()):
                other.add_note(note)
            return cls(other, text)
        return cls(error, text)

    def raise_again(self) -> NoReturn:
        raise self.error from _WorkerTracebackError(f"in a loader process:\n{self.traceback}")


@final
class _Worker(Generic[T]):
    """This process's end of one worker."""

    def __init__(self, work: Work[T]) -> None:
        self._work = work
        self._asked: deque[int] = deque()
        # the step that the worker is at and the sample in it; no lock, since a worker may be killed while it holds one
        self._position = multiprocessing.RawArray("q", [-1, 0])
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_WAIT)
        self._process = multiprocessing.Process(
            target=_serve, args=(theirs, work, self._position), name="nestseg loader", daemon=True
        )
        # held back until the worker ignores them: before, it would do with them what this process does
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def ask(self, step: int) -> None:
        """Ask for the result of a step; it is worked on after those asked for before."""
        self._asked.append(step)
        # if it is dead, the one who waits for a result finds out, after the results that are there
        with suppress(ConnectionError):
            self._socket.sendall(step.to_bytes(_MESSAGE, "little"))

    def take(self, timeout: float, should_stop: Callable[[], bool]) -> T | _Failure:
        """Wait for the first of the results that were asked for and not taken yet."""
        waited = 0.0
        while True:
            before = time.monotonic()
            try:
                message, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE, 1)
                break
            except ConnectionResetError:
                message = b""
                break
            except TimeoutError:
                # no longer than asked for: after a Ctrl-Z the clock says more than this process has waited
                waited += min(time.monotonic() - before, 2 * _WAIT)
            if should_stop():
                raise _StopAskedError
            if waited >= timeout:
                raise _WorkerHangsError(self._asked[0], self._place())
        if not message:
            raise _WorkerDiedError(self._word_end(), self._asked[0], self._place())
        if not descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._asked.popleft()
        result: T | _Failure = _receive(descriptors[0], head=int.from_bytes(message, "little"))
        return result

    def replace(self) -> _Worker[T]:
        """Return another worker that is asked for what this one, which is dead, still owes."""
        self.kill()
        self.join()
        other = _Worker(self._work)
        for step in self._asked:
            other.ask(step)
        return other

    def kill(self) -> None:
        """End the worker, whatever it is doing."""
        self._process.kill()

    def join(self) -> None:
        """Wait until a killed worker is gone."""
        self._process.join(1)
        self._socket.close()

    def _place(self) -> int | None:
        """Return which sample of the step that is due is being read; None if the step has not been begun."""
        step, place = self._position
        return place if step == self._asked[0] else None

    def _word_end(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is None:
            return "fell silent"
        if code >= 0:
            return f"ended with status {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:  # a real-time signal
            return f"was killed by signal {-code}"


def _kill_all(workers: Sequence[_Worker[T]], parent: int) -> None:
    if os.getpid() != parent:  # in a fork of the run, whose workers these are not
        return
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _serve(requests: socket.socket, work: Work[T], position: Sequence[int]) -> None:
    """Be a worker."""
    # the run decides when to stop: a signal to the whole group must not take the workers before its checkpoint
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    at = cast("list[int]", position)
    while request := requests.recv(_MESSAGE):
        at[1] = 0
        at[0] = step = int.from_bytes(request, "little")
        try:
            _send(requests, work(step, partial(at.__setitem__, 1)))
        except Exception as error:  # noqa: BLE001  whatever it is, it is for the run to see
            _send(requests, _Failure.of(error))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended; a thread does it, since a read from a dead disk may never return."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, which can leave their bytes out of the pickle."""

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _send(to: socket.socket, value: object) -> None:
    """Write a value to a file in memory and hand over the file: bytes of arrays first, then the pickle of the rest."""
    buffers: list[pickle.PickleBuffer] = []
    rest = io.BytesIO()
    _Pickler(rest, protocol=5, buffer_callback=buffers.append).dump(value)
    spans, end = [], 0
    with _open_memory() as file:
        for buffer in buffers:
            raw = buffer.raw()
            file.seek(end)
            file.write(raw)
            spans.append((end, end + raw.nbytes))
            end += -(-raw.nbytes // _ALIGNMENT) * _ALIGNMENT
        file.seek(end)
        file.write(pickle.dumps((spans, rest.getvalue())))
        file.flush()
        socket.send_fds(to, [end.to_bytes(_MESSAGE, "little")], [file.fileno()])


def _receive(descriptor: int, *, head: int) -> Any:
    """Read what `_send` wrote; arrays are views of the file, which lives as long as they do."""
    try:
        content = memoryview(mmap.mmap(descriptor, 0))
    finally:
        os.close(descriptor)
    spans, rest = pickle.loads(content[head:])  # noqa: S301  our own worker's bytes
    return pickle.loads(rest, buffers=[content[start:end] for start, end in spans])  # noqa: S301


def _open_memory() -> BinaryIO:
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it
            return os.fdopen(os.memfd_create("nestseg batch"), "wb")
    return cast("BinaryIO", tempfile.TemporaryFile())


def _word_restart(death: _WorkerDiedError, names: Sequence[str]) -> str:
    at = "before it began" if death.place is None else f"while it read {names[death.place]}, a sample of"
    return f"a loader process {death.how} {at} step {death.step}; another one makes the same batch again"


def _death_error(death: _WorkerDiedError, names: Sequence[str]) -> DataError:
    return DataError(
        "E-DATA-075",
        f"two loader processes in a row ended at step {death.step}; the last one {death.how}",
        fix="if memory ran out, which SIGKILL mostly means, lower data.num_workers; else look at the file, which may "
        "crash its decoder: nestseg data verify",
        path=None if death.place is None else names[death.place],
        table=_list_samples(death.step, names),
    )


def _hang_error(hang: _WorkerHangsError, names: Sequence[str], timeout: float) -> DataError:
    return DataError(
        "E-DATA-076",
        f"step {hang.step} was waited for {timeout:g} seconds; a loader process "
        + ("has not begun with it" if hang.place is None else "is still reading this"),
        fix="check that the disk or file server answers and that this is a regular file; a slow one needs a larger "
        "data.worker_timeout",
        path=None if hang.place is None else names[hang.place],
        table=_list_samples(hang.step, names),
    )


def _list_samples(step: int, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"  samples of step {step}:", *(f"  {name}" for name in names[:_SHOWN]), *more]
