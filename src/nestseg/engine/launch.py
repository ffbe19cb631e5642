"""The processes and devices of a run: joining them on lightning-fabric, and starting them on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its list

from nestseg.build import choose_device
from nestseg.core.errors import RunError
from nestseg.engine.ranks import ERROR_FILE, LAUNCHER, NO_ANSWER, Place, end_with_launcher, join
from nestseg.engine.stop import STOP_SIGNALS, STOPPED_EXIT_CODE

_LAST_WORDS = 3.0
"""Seconds that ranks get to end by themselves after one of them failed; then they are killed."""
_POLL = 0.05


def launch(device: str) -> Fabric:
    """Join the run's processes: one, or as many as `launch_devices` or torchrun started.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        A launched Fabric: its rank, world size and device are final.

    Raises:
        RunError: If the device is not there, there are more processes than devices, or the processes do not find each
            other.
    """
    kind = choose_device(device).type
    end_with_launcher()
    place = Place.read(os.environ)
    if place is None:
        # named, lest Fabric take a job of SLURM for several processes
        fabric = Fabric(accelerator=kind, devices=1, precision="32-true", plugins=[LightningEnvironment()])
    else:
        _check_devices(kind, place.local_world_size)
        join(place, kind=kind)
        fabric = Fabric(
            accelerator=kind,
            devices=place.local_world_size,
            num_nodes=place.world_size // place.local_world_size,
            strategy=DDPStrategy(
                gradient_as_bucket_view=True,
                # No parameter is unused. But without the search for them, torch lays gradients out anew after its first
                # step; of three ranks or more the layout decides in which order numbers are added up, and so a resumed
                # run, whose first step is another, would not end with the same bits.
                find_unused_parameters=place.world_size > 2,
                # As torch does by default, rank 0's buffers are copied to all before each forward pass: statistics of
                # BatchNorm that differ without SyncBatchNorm are the same everywhere as those that are saved.
                broadcast_buffers=True,
            ),
            precision="32-true",
            plugins=[TorchElasticEnvironment()],
        )
    fabric.launch()
    require_float32(fabric.device)
    return fabric


def _check_devices(kind: str, processes: int) -> None:
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, processes)
    if processes > available:
        raise RunError(
            "E-RUN-045",
            f"{processes} processes on this machine, which has {available} devices of type {kind}",
            fix=f"start at most {available}, or give --device cpu",
        )


def require_float32(device: torch.device) -> None:
    """Keep CUDA from rounding the inputs of every convolution to TF32, so that scores do not depend on the GPU."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


class _Failure(NamedTuple):
    """What a rank wrote before it ended: see `nestseg.engine.ranks.rank_errors`."""

    nanoseconds: int
    rank: int
    code: str | None
    message: str
    text: str


def launch_devices(arguments: Sequence[str], *, run: Path, devices: int, max_restarts: int = 3) -> int:
    """Run a ``nestseg train`` command in several processes of this machine, one a device.

    A rank that is killed by a signal or no longer answers ends the others; all start again and resume from the newest
    checkpoint. A first SIGTERM, SIGINT or SIGUSR1 goes to every rank once, so that they stop at a checkpoint of the
    same step; a second one kills them.

    Args:
        arguments: The words of the command, ``train`` first; ``--devices N`` among them is left out.
        run: The run folder that they name.
        devices: Number of processes.
        max_restarts: How often ranks start again.

    Returns:
        The exit code: 0 done, 75 stopped at a checkpoint, 1 after an error, which is printed, 128 and the number of a
        signal that stopped the run before a checkpoint.

    Raises:
        RunError: E-RUN-044 if a rank was killed more often than may be; E-RUN-047 if this process is a rank itself, or
            for less than one process.
    """
    if devices < 1 or Place.read(os.environ) is not None:
        raise RunError(
            "E-RUN-047",
            f"--devices {devices} {'in a rank of torchrun' if devices > 0 else 'is less than one'}",
            fix="leave out either torchrun or --devices, which starts a process a device itself",
        )
    words = _without_devices(arguments)
    # a folder that holds another run is not to be continued by mistake
    ours = "--resume" in words or not _is_run(run)
    with _caught_signals() as caught:
        for attempt in range(max_restarts + 1):
            if attempt and ours and "--resume" not in words and _is_run(run):
                words.append("--resume")
            ended = _run_once(words, devices=devices, attempt=attempt, caught=caught)
            if isinstance(ended, int):
                return ended
            if attempt < max_restarts:
                _tell(f"{ended}; all start again ({attempt + 1} of {max_restarts})")
    raise RunError(
        "E-RUN-044",
        f"{ended}, after {max_restarts} restarts",
        fix="see the end of the system's log for a shortage of memory; continue with --resume",
        path=run,
    )


def _is_run(run: Path) -> bool:
    return (run / "recipe.yaml").is_file()


def _without_devices(arguments: Sequence[str]) -> list[str]:
    words, skip = [], False
    for word in arguments:
        if not skip and not word.startswith("--devices="):
            skip = word == "--devices"
            if not skip:
                words.append(word)
        else:
            skip = False
    return words


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect signals in the list that this gives; the loop over the ranks looks at it."""
    caught: list[int] = []

    def catch(signum: int, _: FrameType | None) -> None:
        caught.append(signum)

    previous = {signum: signal.signal(signum, catch) for signum in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _run_once(words: Sequence[str], *, devices: int, attempt: int, caught: list[int]) -> int | str:
    """Start all ranks and wait for their end.

    Returns:
        An exit code, or in words why they are to start again.
    """
    # The store outlives every rank, so that the others can still read what a stopped one wrote. It is new at each
    # start: of an old one, ranks read addresses of ranks that are gone.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    with tempfile.TemporaryDirectory(prefix="nestseg-ranks-") as name:
        folder = Path(name)
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(devices):
                ranks.append(_start_rank(words, folder, rank=rank, devices=devices, attempt=attempt, port=store.port))
            _wait_for_ranks(ranks, caught)
        finally:
            own_end = [rank.poll() for rank in ranks]
            _kill(ranks)
        if len(caught) > 1:
            return 128 + caught[1]
        return _judge(own_end, _read_failures(folder), stopped_by=caught[0] if caught else 0)


def _start_rank(
    words: Sequence[str], folder: Path, *, rank: int, devices: int, attempt: int, port: int
) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    environment = {
        # for gloo, which otherwise looks for the address of this machine's name; the user may know better
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "OMP_NUM_THREADS": str(max(1, cores // devices)),
        # torch's warnings of lost connections are pages long, and rank_errors says what they mean
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        LAUNCHER: str(os.getpid()),
        ERROR_FILE: str(folder / f"{rank}.json"),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    return subprocess.Popen(  # noqa: S603  # this program, with the words of its own command line
        [sys.executable, "-m", "nestseg", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        # all would say the same; of errors and warnings each has its own
        stdout=None if rank == 0 else subprocess.DEVNULL,
        # out of reach of a terminal's Ctrl-C, which is passed on
        start_new_session=True,
    )


def _wait_for_ranks(ranks: Sequence[subprocess.Popen[bytes]], caught: list[int]) -> None:
    """Return when all ranks ended, when those left must be killed, or at a second signal."""
    passed_on, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if len(caught) > 1:
            return
        if len(caught) > passed_on:
            passed_on = len(caught)
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(caught[0])
        codes = [rank.poll() for rank in ranks]
        if any(code is not None and code < 0 for code in codes):
            return
        if deadline == float("inf") and any(code not in (None, 0, STOPPED_EXIT_CODE) for code in codes):
            deadline = time.monotonic() + _LAST_WORDS
        time.sleep(_POLL)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what is left of the ranks, their loader workers too."""
    for rank in ranks:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for rank in ranks:
        rank.wait()


def _read_failures(folder: Path) -> list[_Failure]:
    failures = []
    for file in folder.glob("*.json"):
        try:
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # killed while it wrote
            continue
        message = record["message"]
        failures.append(
            _Failure(
                record["nanoseconds"],
                int(file.stem),
                record["code"],
                message["message"],
                message["extraInfo"]["py_callstack"],
            )
        )
    return sorted(failures)


def _judge(codes: Sequence[int | None], failures: Sequence[_Failure], *, stopped_by: int) -> int | str:
    """Make one exit code of many; print the error of the rank that failed first."""
    if all(code == 0 for code in codes):
        return 0
    if all(code in (0, STOPPED_EXIT_CODE) for code in codes):
        return STOPPED_EXIT_CODE
    killed = {rank: code for rank, code in enumerate(codes) if code is not None and code < 0}
    first = failures[0] if failures else None
    if killed and stopped_by:
        # it came before ranks listened for signals
        return 128 + stopped_by
    if killed:
        return " and ".join(f"rank {rank} was killed by {_signal_name(-code)}" for rank, code in killed.items())
    if first is not None and first.code == NO_ANSWER:
        return first.message
    if first is not None:
        _tell(f"error: {first.message}" if first.code else first.text.rstrip())
        _tell(f"that was rank {first.rank} of {len(codes)}, the first to fail")
        return 1
    failed = next(code for code in codes if code not in (None, 0, STOPPED_EXIT_CODE))
    assert failed is not None
    return failed


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
