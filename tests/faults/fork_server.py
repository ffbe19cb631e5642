"""Forks training processes: torch is imported once, a child then starts in milliseconds.

A program, not a module of the tests: `conftest.py` starts it and speaks with it in lines of JSON. It starts no thread
and no pool, so that a fork of it is as good as a new process.

    {"do": "fork", "arguments": [...], "prelude": "...", "environment": {...}, "output": "PATH"}  ->  {"pid": 17}
    {"do": "wait", "pid": 17, "seconds": 5}  ->  {"code": 0}    null where it still runs, -9 where a signal ended it
    {"do": "call", "command": ["mount", ...]}  ->  {"code": 0, "output": "..."}

A child runs ``prelude``, then ``nestseg`` with the arguments, as the command line would; the prelude is where a test
breaks the child's disk, clock or life, mostly with `before_call`. ``call`` runs a command that shares the children's
mounts.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Container
from typing import NoReturn

PRELOADED = (
    "nestseg.cli",
    "nestseg.engine.train",
    "nestseg.recipes",
    "lightning_fabric.plugins.environments.torchelastic",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.data",
    "timm",
    "yaml",
)
"""What a run imports, some of it only when it is first needed."""


def serve() -> None:
    """Answer until standard input ends."""
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    # what is there now is never collected, so that a child need not copy its pages
    gc.freeze()
    replies.write("ready\n")
    replies.flush()
    while line := requests.readline():
        request = json.loads(line)
        if request["do"] == "fork":
            pid = os.fork()
            if not pid:
                os.close(replies.fileno())
                leave(request)
            answer: dict[str, object] = {"pid": pid}
        elif request["do"] == "wait":
            answer = {"code": wait(request["pid"], request["seconds"])}
        else:
            result = subprocess.run(
                request["command"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            answer = {"code": result.returncode, "output": result.stdout}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def leave(request: dict) -> NoReturn:
    """Run a child and end it as the interpreter would, but for the seconds that taking torch down costs."""
    code = 1
    try:
        code = run(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what no program of ours may show; the tests look for it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # loader processes are joined here
    atexit._run_exitfuncs()
    os._exit(code)


def run(request: dict) -> int:
    """Be a new process: own group, own output, own environment, then the command line."""
    os.setpgid(0, 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    exec(compile(request["prelude"], "<prelude>", "exec"), {"before_call": before_call})
    from nestseg.cli import main

    return main(request["arguments"])


def before_call(owner: object, name: str, do: Callable[[], object], *, calls: Container[int]) -> None:
    """Have something done before some calls of a function, counted from 1."""
    real, count = getattr(owner, name), itertools.count(1)

    def counted(*arguments: object, **options: object) -> object:
        if next(count) in calls:
            do()
        return real(*arguments, **options)

    setattr(owner, name, counted)


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a child's end at most so long."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.003)


if __name__ == "__main__":
    serve()
