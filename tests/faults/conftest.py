"""Training runs that a test can kill, signal, starve and continue, at a few seconds each.

`make_job` gives a `Job`: a real run of the command line in a forked child of `fork_server.py`, on 14 drawn pictures in
CamVid's layout (3 steps an epoch, 12 steps, an evaluation every 5, dropout, EMA), with timm's smallest network where a
ResNeSt would take twenty times as long. `Job.fingerprint` hashes all that a finished run leaves; `uninterrupted` has
that of the run nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nestseg.recipes import resolve_recipe

NUM_STEPS = 12
OPTIMIZERS = {"fcn": "sgd", "pspnet": "adamw", "deeplabv3": "sgd", "deeplabv3plus": "adamw"}
SETTINGS = {
    "backbone.name": "timm:test_resnet",
    "backbone.pretrained": "none",
    "head.channels": 16,
    "auxiliary_head.enabled": False,
    "data.crop_size": [32, 64],
    "data.batch_size": 4,
    "augmentation.base_size": [40, 72],
    "optimizer.lr": 0.002,
    "schedule.max_steps": NUM_STEPS,
    "schedule.warmup_steps": 2,
    "ema": {"decay": 0.9},
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 2,
    "evaluation.base_size": None,
    "evaluation.every_steps": 5,
    "log.every_steps": 1,
}
# code, then where it is (a path before the reason, or a field or rank in it), what is wrong, what to do
_ERROR = re.compile(r"error: (E-[A-Z]+-\d{3}) \| (.+ \| .+|.*\b([a-z_]+\.[a-z_]+|rank \d+)\b.*) \| fix: .+")


def note(figure: str, **values: Any) -> None:
    """Note what was counted, for ``benchmarks/faults.py``; nowhere unless that asks for it."""
    if place := os.environ.get("NESTSEG_FAULT_FIGURES"):
        with Path(place, f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"figure": figure, **values}) + "\n")


class Ending(NamedTuple):
    """How a process ended: exit code, below zero for a signal; all it wrote; seconds since it started."""

    code: int
    output: str
    seconds: float


class Child:
    """A running ``nestseg`` of its own process group."""

    def __init__(self, server: ForkServer, pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output
        self._started = time.monotonic()

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def signal(self, signum: int, *, group: bool = False) -> None:
        """Send a signal to the process, or as a terminal does, to its loader workers too."""
        try:
            (os.killpg if group else os.kill)(self.pid, signum)
        except ProcessLookupError:
            # a group that the child has not yet made
            os.kill(self.pid, signum)

    def wait(self, seconds: float = 90) -> Ending:
        """Wait for the end; a process that says what went wrong must say it as all errors are said (F14)."""
        code = self._server.ask(do="wait", pid=self.pid, seconds=seconds)["code"]
        if code is None:
            self.signal(signal.SIGKILL, group=True)
            self._server.ask(do="wait", pid=self.pid, seconds=10)
            raise AssertionError(f"still running after {seconds} s:\n{self.output[-3000:]}")
        ending = Ending(code, self.output, time.monotonic() - self._started)
        if code >= 0:
            assert "Traceback (most recent call last)" not in ending.output, ending.output[-3000:]
            errors = [line for line in ending.output.splitlines() if line.startswith("error:")]
            assert errors or code != 1, ending.output[-3000:]
            for line in errors:
                match = _ERROR.fullmatch(line)
                assert match, line
                note("F14", code=match[1])
        return ending


class ForkServer:
    """The process that has torch and forks `Child`; as root, with mounts that nobody else sees."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        program = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self.mount_problem: str | None = "mounting takes root"
        if os.geteuid() == 0:
            private = ["unshare", "--mount", "--propagation", "private"]
            test = subprocess.run([*private, "true"], capture_output=True, text=True, check=False)
            self.mount_problem = test.stderr.strip() or None
            program = program if self.mount_problem else [*private, *program]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the fork server did not start"

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self._process.stdout.readline())

    def fork(self, arguments: Sequence[str], *, prelude: str = "", environment: Mapping[str, str] = {}) -> Child:
        self._count += 1
        output = self._folder / f"child-{self._count:04d}.txt"
        pid = self.ask(
            do="fork",
            arguments=list(arguments),
            prelude=prelude,
            environment=dict(environment),
            output=str(output),
        )["pid"]
        return Child(self, pid, output)

    def call(self, *command: str) -> str:
        """Run a command that must succeed where children see its mounts."""
        answer = self.ask(do="call", command=list(command))
        assert answer["code"] == 0, f"{' '.join(command)}: {answer['output']}"
        return answer["output"]

    def seen(self, path: Path) -> Path:
        """Say where the test finds what a child has at a path."""
        if self.mount_problem:
            return path
        # unshare is replaced by the server, so that its pid is the server's
        return Path(f"/proc/{self._process.pid}/root{path}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Group:
    """The ranks of one start of a run."""

    def __init__(self, children: Sequence[Child]) -> None:
        self.children = tuple(children)

    @property
    def first(self) -> Child:
        return self.children[0]

    def kill(self, *, workers: bool) -> None:
        """SIGKILL every rank at once; with their loader workers, or leaving those behind."""
        for child in self.children:
            child.signal(signal.SIGKILL, group=workers)

    def wait(self, seconds: float = 90) -> Ending:
        """Wait for all ranks, return the first's end."""
        endings = [child.wait(seconds) for child in self.children]
        return endings[0]


class Job:
    """A training run of 12 steps, at a folder of its own."""

    def __init__(
        self,
        server: ForkServer,
        folder: Path,
        data: Path,
        *,
        head: str = "deeplabv3plus",
        ranks: int = 1,
        workers: int = 0,
        run: Path | None = None,
        **changes: Any,
    ) -> None:
        self.server, self.folder, self.data, self.head, self.ranks = server, folder, data, head, ranks
        self.run = run or folder / "run"
        self.recipe = folder / "recipe.yaml"
        values = SETTINGS | {"optimizer.name": OPTIMIZERS[head], "data.num_workers": workers}
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        overrides = [f"{name}={json.dumps(value)}" for name, value in values.items()]
        recipe = resolve_recipe(f"{head}_resnest14-d32_camvid", overrides)
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(recipe.to_yaml(), encoding="utf-8")

    @property
    def seen(self) -> Path:
        """The run folder, as the test can open it."""
        return self.server.seen(self.run)

    def start(self, *options: str, prelude: str = "", ranks: int | None = None) -> Group:
        """Start the run, or with ``--resume`` continue it, and return at once."""
        words = ["train", str(self.recipe), "--data", str(self.data), "--run", str(self.run), "--device", "cpu"]
        count = ranks or self.ranks
        if count == 1:
            return Group([self.server.fork([*words, *options], prelude=prelude)])
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        # what torchrun tells its processes
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_WORLD_SIZE": "1",
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test",
        }
        own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return Group([self.server.fork([*words, *options], prelude=prelude, environment=place) for place in own])

    def train(self, *options: str, prelude: str = "", ranks: int | None = None) -> Ending:
        """Start and wait for the end."""
        return self.start(*options, prelude=prelude, ranks=ranks).wait()

    def finish(self) -> Ending:
        """Continue after a kill: resume, or start where the kill came before there was anything to resume."""
        ending = self.train(*(["--resume"] if (self.seen / "recipe.yaml").exists() else []))
        assert ending.code == 0, ending.output[-3000:]
        return ending

    def wait_for_checkpoint(self, step: int, *, child: Child, seconds: float = 60) -> None:
        """Return as soon as the checkpoint of a step, or a later one, is there."""
        end = time.monotonic() + seconds
        while not any(found >= step for found in self.checkpoints()):
            assert time.monotonic() < end, f"no checkpoint of step {step}:\n{child.output[-3000:]}"
            time.sleep(0.002)

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return sorted(int(path.name.split("-")[1]) for path in (self.seen / "checkpoints").glob("step-????????"))

    def records(self) -> list[dict[str, Any]]:
        """The records of the log, each of which must be whole."""
        return [json.loads(line) for line in (self.seen / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def fingerprint(self, *, best: bool = True, state: bool = True) -> str:
        """Hash what a finished run leaves: weights, BatchNorm, optimizer, EMA, random state, the published model.

        Args:
            best: Whether the score of best.safetensors is part of it; it is another where that file was not written.
            state: Whether the last checkpoint is part of it; without, the published model alone.
        """
        checkpoint = self.seen / "checkpoints" / f"step-{NUM_STEPS:08d}"
        digest = hashlib.sha256()
        if not state:
            _add_value(digest, load_file(self.seen / "model.safetensors"))
            return digest.hexdigest()
        _add_value(digest, load_file(checkpoint / "model.safetensors"))
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        if not best:
            del state["best_mean_iou"]
        _add_value(digest, state)
        _add_value(digest, load_file(self.seen / "model.safetensors"))
        return digest.hexdigest()


def _add_value(digest: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            digest.update(f"{name}:".encode())
            _add_value(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)} values".encode())
        for item in value:
            _add_value(digest, item)
    else:
        digest.update(repr(value).encode())


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("children"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """14 pictures to train on and 3 to score, 40x72, in CamVid's layout."""
    root = tmp_path_factory.mktemp("camvid")
    draw = np.random.default_rng(5)
    colours = draw.integers(0, 256, (12, 3), np.uint8)
    for split, count in (("train", 14), ("val", 3)):
        for index in range(count):
            labels = draw.integers(0, 12, (5, 9), np.uint8).repeat(8, 0).repeat(8, 1)
            image = colours[labels] // 2 + draw.integers(0, 100, (40, 72, 3), np.uint8)
            for folder, array in ((split, image), (f"{split}annot", labels)):
                (root / folder).mkdir(exist_ok=True)
                Image.fromarray(array).save(root / folder / f"{index:02d}.png")
    return root


@pytest.fixture
def make_job(fork_server, pictures, tmp_path) -> Callable[..., Job]:
    """Make a `Job` in this test's folder; ``name`` tells several apart, other arguments are those of `Job`."""

    def make(name: str = "job", **options: Any) -> Job:
        return Job(fork_server, tmp_path / name, pictures, **options)

    return make


class Uninterrupted(NamedTuple):
    """The run that nobody disturbed."""

    fingerprint: str
    seconds: float
    job: Job


@pytest.fixture(scope="session")
def uninterrupted(fork_server, pictures, tmp_path_factory) -> Callable[..., Uninterrupted]:
    """Run a head with so many ranks to the end, once, and keep every checkpoint."""
    known: dict[tuple[str, int], Uninterrupted] = {}

    def run(head: str = "deeplabv3plus", ranks: int = 1) -> Uninterrupted:
        if (head, ranks) not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            every_step = {"checkpoint__every_steps": 1, "checkpoint__keep": NUM_STEPS + 1}
            job = Job(fork_server, folder, pictures, head=head, ranks=ranks, **every_step)
            ending = job.train()
            assert ending.code == 0, ending.output
            known[head, ranks] = Uninterrupted(job.fingerprint(), ending.seconds, job)
        return known[head, ranks]

    return run


@pytest.fixture
def note_figure() -> Callable[..., None]:
    """What a test counted goes to ``benchmarks/faults.py`` by this."""
    return note


@pytest.fixture
def mounts(fork_server) -> ForkServer:
    """The fork server, where it can mount."""
    if fork_server.mount_problem:
        pytest.skip(f"no mounts of our own: {fork_server.mount_problem}")
    return fork_server
