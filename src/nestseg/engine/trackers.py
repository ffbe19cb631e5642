"""Where records go besides the run folder: TensorBoard, Weights & Biases, MLflow, Trackio.

Each is an extra of the same name and is imported only where a recipe names it. Addresses, projects and keys come from
the tracker's own environment variables: ``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``,
``MLFLOW_EXPERIMENT_NAME``, ``TRACKIO_DIR``, ``TRACKIO_SPACE_ID``, ... Without them TensorBoard, an offline W&B and
MLflow write into ``RUN/trackers``, Trackio into its own folder, which its dashboard reads.
"""

from __future__ import annotations

import importlib
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import yaml

from nestseg.core.errors import RunError, nearest

TRACKERS_FOLDER = "trackers"

_PROJECT = "nestseg"
_LONGEST_QUEUE = 10_000


class TrackedRun(NamedTuple):
    """What a tracker is told about a run when it is opened."""

    folder: Path
    """The tracker's own folder inside the run folder; it exists."""
    name: str
    """What the run is called there."""
    settings: Mapping[str, Any]
    """The recipe as plain values."""
    start: int
    """Steps already done; above 0 a run goes on, and what was sent of later steps is superseded."""


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send finite values of one step."""

    def close(self) -> None:
        """Send what is left."""


def check_trackers(names: Sequence[str]) -> None:
    """Import what the trackers need, so that a missing package is found before the first step.

    Raises:
        RunError: E-RUN-060 for a name that is no tracker; E-RUN-061 for a package that is missing or cannot be
            imported.
    """
    for name in names:
        if name not in TRACKERS:
            raise RunError("E-RUN-060", f"no tracker is called {name}", fix=nearest(name, TRACKERS))
        package = _PACKAGES[name]
        try:
            importlib.import_module(package)
        # a broken installation raises anything, of which a user can mend all
        except Exception as error:
            raise RunError(
                "E-RUN-061",
                f"log.trackers names {name}, but {package} cannot be imported: {' '.join(str(error).split())[:200]}",
                fix=f'pip install "nestseg[{name}]", or take it out of log.trackers',
            ) from error
    if "wandb" in names:
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    # a question on the terminal would come from the tracker's thread, in the middle of training
    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
        raise RunError(
            "E-RUN-062",
            "log.trackers names wandb, but nobody is logged in to W&B here",
            fix="wandb login, or WANDB_API_KEY=..., or WANDB_MODE=offline to send it later",
        )


@final
class TrackerThread:
    """Feeds one tracker from a thread of its own: training never waits for it, and outlives whatever happens in it.

    After the first failure nothing more is sent.

    Args:
        name: A key of `TRACKERS`.
        run: The run folder.
        title: What the run is called.
        settings: The recipe as plain values.
        start: Steps already done.
    """

    def __init__(self, name: str, run: Path, *, title: str, settings: Mapping[str, Any], start: int) -> None:
        self.name = name
        self.failure: str | None = None
        """What went wrong, in words; None while all is well."""
        tracked = TrackedRun(run / TRACKERS_FOLDER / name, title, settings, start)
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._run, args=(tracked,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send values of one step, soon."""
        if self.failure is None:
            self._put((step, values))

    def finish(self) -> None:
        """Say that no more will come."""
        if self.failure is None:
            self._put(None)

    def wait(self, seconds: float) -> None:
        """Wait until everything is sent, at most so long."""
        if self.failure is None:
            self._thread.join(max(0.0, seconds))
            if self._thread.is_alive():
                self.failure = "it did not finish in time"

    def _put(self, item: tuple[int, Mapping[str, float]] | None) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.failure = f"it is {_LONGEST_QUEUE} records behind"

    def _run(self, tracked: TrackedRun) -> None:
        try:
            tracked.folder.mkdir(parents=True, exist_ok=True)
            tracker = TRACKERS[self.name](tracked)
            while (item := self._queue.get()) is not None:
                step, values = item
                tracker.log(values, step=step)
            tracker.close()
        # other people's code, which may even call sys.exit; nothing above this frame would handle it
        except BaseException as error:  # noqa: BLE001
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@final
class _TensorBoard:
    """Event files in ``RUN/trackers/tensorboard``; steps that a resume takes again are hidden."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder), purge_step=run.start + 1 if run.start else None)
        self._writer.add_text("recipe", f"```\n{_to_yaml(run.settings)}```", run.start)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@final
class _Wandb:
    """A run of Weights & Biases; values have a step of their own, since W&B drops what comes back to an old one."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            dir=run.folder,
            config=dict(run.settings),
            id=_keep_id(run.folder, uuid.uuid4().hex[:16]),
            resume="allow",
            # its own copy of what we print would come between the lines of the display
            settings=wandb.Settings(console="off", quiet=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


@final
class _Mlflow:
    """A run of MLflow; without ``MLFLOW_TRACKING_URI`` in a database of its own, ``RUN/trackers/mlflow/mlflow.db``."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        address = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder.resolve()}/mlflow.db")
        self._client = MlflowClient(tracking_uri=address)
        old = _kept_id(run.folder)
        if old is not None:
            self._id = old
            self._client.update_run(old, status="RUNNING")
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(title)
        experiment = self._client.create_experiment(title) if found is None else found.experiment_id
        self._id = _keep_id(run.folder, self._client.create_run(experiment, run_name=run.name).info.run_id)
        params = [Param(name, str(value)[:500]) for name, value in flatten(run.settings).items()]
        for place in range(0, len(params), 100):  # as many as one request may hold
            self._client.log_batch(self._id, params=params[place : place + 100])

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


@final
class _Trackio:
    """A run of Trackio; it knows a run by its name alone, so that the name gets digits that make it unique."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=_keep_id(run.folder, f"{run.name} {uuid.uuid4().hex[:8]}"),
            config=dict(run.settings),
            resume="allow",
            embed=False,
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
"""What ``log.trackers`` of a recipe may name."""

_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by dotted fields.

    Example:
        >>> flatten({"seed": 0, "data": {"batch_size": 8, "mean": [1, 2]}})
        {'seed': 0, 'data.batch_size': 8, 'data.mean': [1, 2]}
    """
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _to_yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None, width=100)


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def _kept_id(folder: Path) -> str | None:
    file = folder / "id"
    return file.read_text(encoding="utf-8") or None if file.is_file() else None


def _keep_id(folder: Path, new: str) -> str:
    """Return the id under which the tracker knows this run; the new one if it knows none yet."""
    kept = _kept_id(folder)
    if kept is None:
        (folder / "id").write_text(new, encoding="utf-8")
    return kept or new
