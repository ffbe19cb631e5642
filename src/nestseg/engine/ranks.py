"""How the processes of a run, its ranks, find each other, and how they say which of them failed.

torchrun, or `nestseg.engine.launch_devices`, starts the ranks and tells each its place in environment variables. A key
of theirs in the store, which torch opens for the addresses of the ranks, holds what each was told, which step it began
last, and whether it failed: when a rank no longer answers, the others can name it.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not in its list

from nestseg.core.dist import use_host_group
from nestseg.core.errors import NestsegError, RunError
from nestseg.engine.stop import RunPruned, RunStopped

LAUNCHER = "NESTSEG_LAUNCHER"
"""Variable that `launch_devices` sets in its ranks: its process id. It prints their errors, so that they do not."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable of torchrun, and of `launch_devices`: where a rank writes what went wrong."""
NO_ANSWER = "E-RUN-040"
"""Code of the error of a rank that no longer answers."""

JOIN_TIMEOUT = 25.0
"""Seconds that ranks wait for each other at the start; ``NESTSEG_JOIN_TIMEOUT`` is another number."""
RANK_TIMEOUT = 600.0
"""Seconds that ranks wait for one of them in training; ``NESTSEG_RANK_TIMEOUT`` is another number."""
_ROLL_CALL = 5.0
"""Seconds that a rank whose exchange failed waits for the others to say that theirs did too."""
_NCCL_MARGIN = 60.0
"""Seconds more until NCCL ends a process: the exchange between hosts, whose error can be worded, is to fail first."""


class Place(NamedTuple):
    """Where a process stands among the ranks.

    Args:
        rank: Number among all ranks.
        world_size: Number of ranks.
        local_rank: Number among those of this machine.
        local_world_size: Number of ranks of each machine.
        address: Host that has the store, that of rank 0.
        port: Port of the store.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the place that the environment gives; None for a process that is alone.

        Raises:
            RunError: E-RUN-041, if a variable is missing or makes no sense.
        """
        if environment.get("WORLD_SIZE", "1") == "1":
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        told = ", ".join(f"{name}={environment.get(name, 'not set')}" for name in names)
        try:
            rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in names[:4])
            place = cls(
                rank,
                world_size,
                local_rank,
                local_world_size,
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
            )
        except (KeyError, ValueError):
            place = None
        if place is None or not (
            0 <= place.rank < place.world_size
            and 0 <= place.local_rank < place.local_world_size
            and place.world_size % place.local_world_size == 0
            and 0 < place.port < 1 << 16
        ):
            raise RunError(
                "E-RUN-041",
                f"this process was told {told}, which is no place among ranks",
                fix="start ranks by --devices N or torchrun, which set all of these; for one process, unset WORLD_SIZE",
            )
        return place


@final
@dataclass(slots=True)
class _Roll:
    """What this process knows of the ranks it joined."""

    place: Place
    store: Store
    step: int = 0


# there is one process group a process, and torch keeps it in a global of its own
_roll: _Roll | None = None


def join(place: Place, *, kind: str) -> None:
    """Make the process group of the ranks.

    Args:
        place: Of this process.
        kind: Type of the device that ranks compute on.

    Raises:
        RunError: E-RUN-041 to E-RUN-043, within ``NESTSEG_JOIN_TIMEOUT`` seconds: the port is taken, rank 0 cannot be
            reached, a rank is missing, or ranks were told different numbers of ranks.
    """
    global _roll
    timeout = read_seconds("NESTSEG_JOIN_TIMEOUT", JOIN_TIMEOUT)
    patience = read_seconds("NESTSEG_RANK_TIMEOUT", RANK_TIMEOUT)
    store = _open_store(place, timeout=timeout)
    _call_roll(store, place, timeout=timeout)
    _roll = _Roll(place, PrefixStore("nestseg", store))
    cuda = kind == "cuda"
    device = torch.device("cuda", place.local_rank) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=PrefixStore("ranks", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=patience + (_NCCL_MARGIN if cuda else 0)),
        device_id=device,
    )
    if cuda:
        host = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
        assert isinstance(host, dist.ProcessGroup), "every rank is in it"
        use_host_group(host)
        # NCCL warns of a group that is left to the end of the process
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def read_seconds(name: str, default: float) -> float:
    """Return a number of seconds from the environment.

    Raises:
        RunError: E-RUN-041, if it is not a number above zero.
    """
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise RunError("E-RUN-041", f"{name} is {text}", fix="give a number of seconds, such as 60", path=name)
    return seconds


def end_with_launcher() -> None:
    """Ask the system for a SIGTERM, so that the run stops at a checkpoint, when the launcher is killed (Linux)."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in sys/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it was killed before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def _open_store(place: Place, *, timeout: float) -> Store:
    """Open the store: rank 0 does, unless the launcher did already; the others connect to it."""
    where = f"{place.address}:{place.port}"
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise RunError(
            "E-RUN-042",
            f"MASTER_ADDR {place.address} is no host that this machine knows: {error.strerror}",
            fix="give the name or address of the machine of rank 0",
            path=where,
        ) from error
    hosts = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=hosts,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if hosts:
            raise RunError(
                "E-RUN-042",
                f"rank 0 cannot listen there: {_first_line(error)}",
                fix="another program has the port, or the address is not this machine's: give torchrun --standalone, "
                "or another --master-port",
                path=where,
            ) from error
        raise RunError(
            "E-RUN-042",
            f"rank {place.rank} did not reach rank 0 there within {timeout:g} s",
            fix="check that rank 0 runs, MASTER_ADDR and MASTER_PORT, and the firewall; NESTSEG_JOIN_TIMEOUT=300 waits "
            "longer for a slow start",
            path=where,
        ) from error


def _call_roll(store: Store, place: Place, *, timeout: float) -> None:
    """Wait for all ranks, and see that they agree on how many they are."""
    names = [f"roll/{rank}" for rank in range(place.world_size)]
    end = time.monotonic() + timeout
    try:
        store.set(names[place.rank], str(place.world_size))
        for rank, name in enumerate(names):
            store.wait([name], timedelta(seconds=max(0.01, end - time.monotonic())))
            told = int(store.get(name))
            if told != place.world_size:
                raise RunError(
                    "E-RUN-043",
                    f"rank {place.rank} was told of {place.world_size} ranks, rank {rank} of {told}",
                    fix="start all machines with the same --nnodes and --nproc-per-node",
                )
    except RuntimeError as error:
        try:
            missing = ", ".join(map(str, _absent(store, names)))
            who = f"missing after {timeout:g} s: rank {missing} of {place.world_size}"
        except RuntimeError:
            who = f"rank 0 left before all {place.world_size} ranks had come"
        raise RunError(
            "E-RUN-043",
            who,
            fix="see what that rank says; check that every machine runs the same number of processes; "
            "NESTSEG_JOIN_TIMEOUT=300 waits longer for a slow start",
            path=f"{place.address}:{place.port}",
        ) from error


def heartbeat(step: int) -> None:
    """Note in the store that this rank begins a step; with one process, nothing."""
    if _roll is not None:
        _roll.step = step
        # it is only for messages, and where the store is gone the run is about to stop
        with suppress(RuntimeError):
            _roll.store.set(f"step/{_roll.place.rank}", str(step))


@contextmanager
def rank_errors() -> Iterator[None]:
    """Say whose error it was when one of several ranks fails; with one process, nothing.

    An error is written to the file that the launcher named, with its time, so that of the errors of all ranks the first
    can be shown. A rank whose exchange with the others failed asks who does not answer.

    Raises:
        RunError: E-RUN-040, in place of the error of an exchange, that names the ranks which hang or were killed.
        SystemExit: In place of any error, in ranks of `launch_devices`, which prints it.
    """
    try:
        yield
    except (RunStopped, RunPruned):
        raise
    except Exception as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        failed_at = time.time_ns()
        text = traceback.format_exc()
        named: Exception = error
        if _roll is not None:
            named = _name_culprit(_roll, error)
        _write_error(named, text, failed_at=failed_at)
        if LAUNCHER in os.environ:
            raise SystemExit(1) from error
        if named is error:
            raise
        raise named from error


def _name_culprit(roll: _Roll, error: Exception) -> Exception:
    """Return an error that says which other rank is the cause, if an exchange with it is what failed."""
    own = f"failed/{roll.place.rank}"
    if not _is_of_exchange(error):
        with suppress(RuntimeError):
            roll.store.set(own, _first_line(error))
        return error
    found: list[Exception] = []

    def ask() -> None:
        with suppress(RuntimeError):
            roll.store.set(own, "")
            found.append(_ask_ranks(roll, error))

    # a store whose process is stopped can keep its client waiting without end
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * _ROLL_CALL)
    # rank 0 has the store, and the ranks take their steps together
    return found[0] if found else _no_answer({0: str(roll.step)})


def _ask_ranks(roll: _Roll, error: Exception) -> Exception:
    names = [f"failed/{rank}" for rank in range(roll.place.world_size)]
    with suppress(RuntimeError):
        roll.store.wait(names, timedelta(seconds=_ROLL_CALL))
    silent = _absent(roll.store, names)
    if silent:
        return _no_answer({rank: _last_step(roll.store, rank) for rank in silent})
    said = [roll.store.get(name).decode() for name in names]
    return next((_failed_elsewhere(rank, text) for rank, text in enumerate(said) if text), error)


def _no_answer(steps: Mapping[int, str]) -> RunError:
    seconds = read_seconds("NESTSEG_RANK_TIMEOUT", RANK_TIMEOUT)
    who = " and ".join(f"rank {rank}, which began step {step} last," for rank, step in steps.items())
    return RunError(
        NO_ANSWER,
        f"no answer from {who} for {seconds:g} s, or it was killed",
        fix="look at that process and its machine, then continue with --resume; NESTSEG_RANK_TIMEOUT=1800 waits longer",
    )


def _failed_elsewhere(rank: int, text: str) -> RunError:
    return RunError("E-RUN-046", f"rank {rank} failed: {text}", fix="see what that rank says")


def _is_of_exchange(error: Exception) -> bool:
    """Whether an exchange between ranks failed; gloo's errors are known by their text alone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _absent(store: Store, names: list[str]) -> list[int]:
    return [rank for rank, name in enumerate(names) if not store.check([name])]


def _last_step(store: Store, rank: int) -> str:
    name = f"step/{rank}"
    return store.get(name).decode() if store.check([name]) else "none"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _write_error(error: Exception, text: str, *, failed_at: int) -> None:
    """Write an error file as torchrun reads it; it can then say which rank was the first."""
    file = os.environ.get(ERROR_FILE)
    if file is None:
        return
    expected = isinstance(error, NestsegError)
    record: dict[str, Any] = {
        "message": {
            "message": str(error) if expected else f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": text, "timestamp": str(failed_at // 10**9)},
        },
        "nanoseconds": failed_at,
        "code": error.code if isinstance(error, NestsegError) else None,
    }
    Path(file).write_text(json.dumps(record), encoding="utf-8")
