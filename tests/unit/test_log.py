"""What a run writes while it runs: records, CSV files, speed, time left, the verdict about the loader, trackers."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from nestseg.core.errors import RunError
from nestseg.engine import log as log_module
from nestseg.engine.log import LogWarning, Meter, RunLog, describe_wait, read_records
from nestseg.engine.trackers import TRACKERS, TrackerThread, check_trackers, flatten
from nestseg.recipe import LogSection

CPU = torch.device("cpu")


def values_of(step: int, **others: float | None) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "lr": 0.01,
        "images_per_second": 12.5,
        "data_wait_share": 0.05,
        "memory_mib": 512.0,
        "seconds_left": 90.0,
        **others,
    }


def evaluate(log: RunLog, step: int, **others: object) -> None:
    values = {"mean_iou": 0.5, "loss": 0.7, "pixel_accuracy": 0.9, "iou_per_class": {"road": 0.75, "a, b": None}}
    log.record("evaluation", step=step, **{**values, **others})


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def wait(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        time.sleep(seconds / 20)


def test_every_record_is_a_line_and_every_step_a_row(tmp_path):
    with RunLog(tmp_path, max_steps=20, silent=True) as log:
        log.record("start", step=0, recipe="fcn")
        log.step(values_of(10))
        evaluate(log, 10)
        log.step(values_of(20))
    found = read_records(tmp_path / "log.jsonl")
    assert [record["kind"] for record in found.records] == ["start", "step", "evaluation", "step"]
    assert found.num_damaged == 0
    assert found.num_bytes == (tmp_path / "log.jsonl").stat().st_size
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", record["time"]) for record in found.records)
    steps = read_csv(tmp_path / "log.csv")
    names = ["step", "loss", "lr", "images_per_second", "data_wait_share", "memory_mib", "seconds"]
    assert [list(row) for row in steps] == [names, names]
    assert [row["step"] for row in steps] == ["10", "20"]
    assert float(steps[0]["loss"]) == 0.1
    (scores,) = read_csv(tmp_path / "evaluation.csv")
    assert scores == {
        "step": "10",
        "mean_iou": "0.5",
        "loss": "0.7",
        "pixel_accuracy": "0.9",
        "iou road": "0.75",
        "iou a, b": "",
    }


def test_a_run_without_evaluations_has_no_file_of_them(tmp_path):
    with RunLog(tmp_path, max_steps=20, silent=True) as log:
        log.step(values_of(10))
    assert not (tmp_path / "evaluation.csv").exists()


def test_numbers_that_json_does_not_have_become_null_however_deep_e10(tmp_path):
    nan, inf = float("nan"), float("inf")
    with RunLog(tmp_path, max_steps=20, silent=True) as log:
        log.step(values_of(10, loss=nan))
        evaluate(log, 10, mean_iou=inf, iou_per_class={"road": nan}, more=[1.0, (inf,)])

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    step, evaluation = (json.loads(line, parse_constant=refuse) for line in lines)
    assert step["loss"] is None
    assert (evaluation["mean_iou"], evaluation["iou_per_class"], evaluation["more"]) == (
        None,
        {"road": None},
        [1, [None]],
    )
    assert read_csv(tmp_path / "log.csv")[0]["loss"] == ""


def test_rank_other_than_the_first_writes_and_says_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, max_steps=20, silent=True, trackers=["tensorboard"]) as log:
        log.say("hello")
        log.step(values_of(10))
        evaluate(log, 10)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_elsewhere_than_on_a_terminal_a_step_is_one_line(tmp_path, capsys):
    with RunLog(tmp_path, max_steps=40000) as log:
        log.step(values_of(1234, loss=0.41231, lr=0.00987, seconds_left=3723.4))
        log.step(values_of(1284, loss=None))
    first, second = capsys.readouterr().err.splitlines()
    assert first == ("step 1234/40000  loss 0.4123  lr 0.00987  12.5 images/s  512 MiB  data wait 5%  left 1:02:03")
    assert "loss -  lr" in second


def test_a_terminal_shows_everything_and_the_last_score(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with RunLog(tmp_path, max_steps=200) as log:
        log.say("[bold]as it is[/bold]")
        evaluate(log, 100, mean_iou=0.4567)
        log.step(values_of(100, seconds_left=65.2))
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    assert "[bold]as it is[/bold]" in text
    shown = ("100/200", "loss 0.0100", "lr 0.01", "12.5 images/s", "512 MiB", "data wait 5%", "left 0:01:05")
    assert all(words in text for words in (*shown, "mIoU 45.67 % at 100")), text


def test_a_resume_leaves_no_step_twice_and_drops_what_was_lost(tmp_path):
    with RunLog(tmp_path, max_steps=60, silent=True) as log:
        log.record("start", step=0)
        for step in (10, 20, 30, 40):
            log.step(values_of(step, loss=1.0))
            evaluate(log, step)
    whole = (tmp_path / "log.jsonl").read_bytes()
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')  # torn by a kill
    (tmp_path / "log.csv").write_text("step\n99\n", encoding="utf-8")
    with RunLog(tmp_path, max_steps=60, start=20, silent=True) as log:
        log.record("resume", step=20)
        log.record("start", step=20)
        log.step(values_of(30, loss=3.0))
        evaluate(log, 30, mean_iou=0.6)
    assert (tmp_path / "log.jsonl").read_bytes().startswith(whole), "it only grows"
    found = read_records(tmp_path / "log.jsonl")
    assert found.num_damaged == 0
    assert [(one["step"], one["loss"]) for one in found.records if one["kind"] == "step"] == [(10, 1), (20, 1), (30, 3)]
    assert [(row["step"], row["loss"]) for row in read_csv(tmp_path / "log.csv")] == [
        ("10", "1.0"),
        ("20", "1.0"),
        ("30", "3.0"),
    ]
    assert [(row["step"], row["mean_iou"]) for row in read_csv(tmp_path / "evaluation.csv")] == [
        ("10", "0.5"),
        ("20", "0.5"),
        ("30", "0.6"),
    ]


def test_a_run_that_begins_again_in_its_folder_supersedes_everything(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, max_steps=60, silent=True) as log:
            log.record("start", step=0)
            log.step(values_of(10))
    assert [record["kind"] for record in read_records(tmp_path / "log.jsonl").records] == ["start", "start", "step"]
    assert len(read_csv(tmp_path / "log.csv")) == 1


def test_seconds_go_on_after_a_resume_and_do_not_see_the_wall_clock_t28(tmp_path, monkeypatch):
    with RunLog(tmp_path, max_steps=60, silent=True) as log:
        log.step(values_of(10))
    line = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    (tmp_path / "log.jsonl").write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 500.0', line), encoding="utf-8")
    meter = Meter(step=10, max_steps=60, batch_size=1, device=CPU)
    with RunLog(tmp_path, max_steps=60, start=10, silent=True) as log:
        monkeypatch.setattr(time, "time", lambda: -1e9)  # the clock of the machine is set back
        meter.count()
        wait(0.02)
        log.step({**meter.read(lr=0.1, loss=1.0), "step": 20})
    last = read_csv(tmp_path / "log.csv")[-1]
    assert 500.0 < float(last["seconds"]) < 510.0
    assert 0.5 < read_records(tmp_path / "log.jsonl").records[-1]["seconds_left"] < 25


def test_lines_that_are_no_records_are_counted_and_passed_over(tmp_path):
    file = tmp_path / "log.jsonl"
    good = b'{"kind": "step", "step": 1, "loss": NaN}\n'
    file.write_bytes(good + b"\0\0\0\n[1]\n{}\n\xff\n\n" + b"[" * 100_000 + b"\n" + b'{"kind": "end"}\n{"kind": "tor')
    found = read_records(file)
    assert [record["kind"] for record in found.records] == ["step", "end"]
    assert found.records[0]["loss"] is None
    assert found.num_damaged == 5
    assert file.read_bytes()[found.num_bytes :] == b'{"kind": "tor'


class Clock:
    """A clock that moves when told; stands for the monotonic ones."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(log_module, "time", made)
    return made


def test_meter_gives_speed_and_share_without_pauses_and_the_start_of_the_loader(clock):
    meter = Meter(step=100, max_steps=200, batch_size=8, device=CPU)
    with meter.waiting():
        clock.now += 30.0  # loader processes start
    for _ in range(2):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.count()
    with meter.paused("evaluation", every_steps=None):
        clock.now += 600.0
    values = meter.read(lr=0.25, loss=1.5)
    assert 10 < values.pop("memory_mib") < 100_000
    assert values == {
        "step": 102,
        "loss": 1.5,
        "lr": 0.25,
        "images_per_second": 4.0,
        "data_wait_share": 0.25,
        "seconds_left": 98 * 2.0,
    }
    meter.count()
    clock.now += 4.0
    values = meter.read(lr=0.25, loss=None)
    assert (values["loss"], values["images_per_second"], values["data_wait_share"]) == (None, 2.0, 0.0)
    assert values["seconds_left"] == pytest.approx(97 * (0.8 * 2.0 + 0.2 * 4.0))


def test_time_left_counts_evaluations_and_checkpoints_to_come(clock):
    meter = Meter(step=0, max_steps=105, batch_size=1, device=CPU)

    def take_steps(count: int) -> float:
        for _ in range(count):
            clock.now += 1.0
            meter.count()
        left = meter.read(lr=0.1, loss=1.0)["seconds_left"]
        assert left is not None
        return left

    assert take_steps(10) == pytest.approx(95)
    with meter.paused("evaluation", every_steps=10):
        clock.now += 20.0
    assert take_steps(40) == pytest.approx(55 + 10 * 20), "steps 20 to 100, and 105"
    with meter.paused("evaluation", every_steps=10):
        clock.now += 30.0
    with meter.paused("checkpoint", every_steps=50):
        clock.now += 5.0
    assert take_steps(10) == pytest.approx(45 + 6 * 30 + 2 * 5), "60 to 100 and 105; 100 and 105"
    assert take_steps(45) == pytest.approx(6 * 30 + 2 * 5), "none of them was done"


@pytest.mark.parametrize(
    ("share", "num_workers", "cores", "packed", "verdict"),
    [
        (0.19, 0, 8, False, None),
        (0.62, 3, 16, False, "loader-bound: 62 % waiting; try data.num_workers=8 or nestseg data pack"),
        (0.62, 3, 4, False, "loader-bound: 62 % waiting; try data.num_workers=4 or nestseg data pack"),
        (0.62, 4, 4, False, "loader-bound: 62 % waiting; try nestseg data pack"),
        (0.62, 9, 4, False, "loader-bound: 62 % waiting; try nestseg data pack"),
        (0.62, 4, 4, True, "loader-bound: 62 % waiting; 4 cores are busy with it: use more, or augment less"),
        (0.62, 2, 8, True, "loader-bound: 62 % waiting; try data.num_workers=6"),
        (0.5, 0, 8, False, "loader-bound: 50 % waiting; try data.num_workers=1 or nestseg data pack"),
        (0.8, 0, 8, False, "loader-bound: 80 % waiting; try data.num_workers=4 or nestseg data pack"),
        (1.0, 0, 2, True, "loader-bound: 100 % waiting; try data.num_workers=2"),
        (0.2, 4, 8, False, "loader-bound: 20 % waiting; try data.num_workers=5 or nestseg data pack"),
    ],
)
def test_verdict_about_the_loader_names_what_can_still_be_done(share, num_workers, cores, packed, verdict):
    assert describe_wait(share, num_workers=num_workers, cores=cores, packed=packed) == verdict


def test_the_verdict_is_said_once_a_change_and_recorded(tmp_path, capsys):
    def judge(share: float) -> str | None:
        return describe_wait(share, num_workers=2, cores=2, packed=False)

    with RunLog(tmp_path, max_steps=1000, judge_wait=judge) as log:
        for step, share in enumerate((0.05, 0.5, 0.6, 0.15, 0.3, 0.05, 0.04, 0.4), start=1):
            log.step(values_of(step, data_wait_share=share))
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert said == [
        "loader-bound: 50 % waiting; try nestseg data pack",
        "the loader keeps up: 5% waiting",
        "loader-bound: 40 % waiting; try nestseg data pack",
    ]
    records = [record for record in read_records(tmp_path / "log.jsonl").records if record["kind"] == "loader"]
    assert [(record["step"], record["verdict"]) for record in records] == list(zip((2, 6, 8), said, strict=True))


def test_the_table_of_trackers_has_what_a_recipe_may_name_and_its_extras():
    allowed = LogSection.model_json_schema()["properties"]["trackers"]["items"]["enum"]
    assert list(TRACKERS) == allowed
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name} = \[", pyproject, re.MULTILINE) for name in TRACKERS)


def test_unknown_tracker_is_named():
    with pytest.raises(RunError, match=r"E-RUN-060 .* did you mean tensorboard") as error:
        check_trackers(["tensorbord"])
    assert error.value.code == "E-RUN-060"


def test_missing_package_of_a_tracker_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(RunError, match="E-RUN-061") as error:
        check_trackers(["tensorboard", "wandb"])
    assert 'pip install "nestseg[wandb]"' in error.value.fix


def test_tensorboard_gets_every_value_and_hides_steps_that_were_lost(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_trackers(["tensorboard"])
    for start in (0, 20):
        with RunLog(
            tmp_path,
            max_steps=40,
            start=start,
            silent=True,
            trackers=["tensorboard"],
            settings={"seed": 7, "data": {"crop_size": [32, 64]}},
            name="fcn",
        ) as log:
            for step in (start + 10, start + 20, start + 30)[: 3 if start == 0 else 1]:
                log.step(values_of(step, loss=float(step + start)))
                evaluate(log, step)
        time.sleep(1.1)  # event files are ordered by the second in their names
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars == {
        *(f"train/{name}" for name in ("loss", "lr", "images_per_second", "data_wait_share", "memory_mib")),
        *(f"val/{name}" for name in ("mean_iou", "loss", "pixel_accuracy")),
        "iou/road",
    }
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 10), (20, 20), (30, 50)]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 7" in text


def test_flatten_names_fields_by_dots_and_keeps_empty_sections():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {"a.b.c": 1, "a.d": {}, "e": None}


# Call shapes only: what these packages do with the calls was tried by hand, in an environment that has them.


def test_call_shape_of_wandb(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda *words, **more: calls.append(("define_metric", words, more)),
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append(("finish",)),
    )
    fake = types.SimpleNamespace(
        init=lambda **more: calls.append(("init", more)) or run,
        Settings=lambda **more: more,
        login=lambda **more: calls.append(("login", more)) or False,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "streets")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(RunError, match="E-RUN-062"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    assert calls == [("login", {"prompt": False, "verify": False})]
    calls.clear()
    for start in (0, 5):
        thread = TrackerThread("wandb", tmp_path, title="fcn r", settings={"seed": 7}, start=start)
        thread.log({"train/loss": 0.5}, step=start + 1)
        thread.finish()
        thread.wait(30)
        assert thread.failure is None
    inits = [call[1] for call in calls if call[0] == "init"]
    assert [init["id"] for init in inits] == [inits[0]["id"]] * 2, "a resumed run goes on"
    assert (inits[0]["project"], inits[0]["name"], inits[0]["config"]) == ("streets", "fcn r", {"seed": 7})
    assert inits[0]["resume"] == "allow"
    assert [call for call in calls if call[0] in ("log", "finish")] == [
        ("log", {"train/loss": 0.5, "step": 1}),
        ("finish",),
        ("log", {"train/loss": 0.5, "step": 6}),
        ("finish",),
    ]


def test_call_shape_of_mlflow(tmp_path, monkeypatch):
    calls = []

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            calls.append(("open", tracking_uri))

        def get_experiment_by_name(self, name: str) -> None:
            assert name == "nestseg"

        def create_experiment(self, name: str) -> str:
            return "3"

        def create_run(self, experiment: str, run_name: str) -> types.SimpleNamespace:
            calls.append(("create", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        def update_run(self, run_id: str, status: str) -> None:
            calls.append(("update", run_id, status))

        def log_batch(self, run_id: str, metrics: object = (), params: object = ()) -> None:
            calls.append(("log", run_id, metrics, params))

        def set_terminated(self, run_id: str) -> None:
            calls.append(("end", run_id))

    entities = types.SimpleNamespace(
        Metric=lambda name, value, timestamp, step: (name, value, step), Param=lambda name, value: (name, value)
    )
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for start in (0, 5):
        thread = TrackerThread("mlflow", tmp_path, title="fcn r", settings={"data": {"seed": 7}}, start=start)
        thread.log({"iou/road (x), y": 0.5}, step=start + 1)
        thread.finish()
        thread.wait(30)
        assert thread.failure is None
    address = f"sqlite:///{tmp_path.resolve()}/trackers/mlflow/mlflow.db"
    assert calls == [
        ("open", address),
        ("create", "3", "fcn r"),
        ("log", "abc", (), [("data.seed", "7")]),
        ("log", "abc", [("iou/road _x__ y", 0.5, 1)], ()),
        ("end", "abc"),
        ("open", address),
        ("update", "abc", "RUNNING"),
        ("log", "abc", [("iou/road _x__ y", 0.5, 6)], ()),
        ("end", "abc"),
    ]


def test_call_shape_of_trackio(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append(("finish",))
    )
    fake = types.SimpleNamespace(init=lambda **more: calls.append(("init", more)) or run)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for start in (0, 5):
        thread = TrackerThread("trackio", tmp_path, title="fcn r", settings={"seed": 7}, start=start)
        thread.log({"train/loss": 0.5}, step=start + 1)
        thread.finish()
        thread.wait(30)
        assert thread.failure is None
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first == second
    assert re.fullmatch("fcn r [0-9a-f]{8}", first["name"])
    assert (first["config"], first["resume"]) == ({"seed": 7}, "allow")
    assert [call for call in calls if call[0] == "log"] == [
        ("log", {"train/loss": 0.5}, 1),
        ("log", {"train/loss": 0.5}, 6),
    ]


def test_log_warning_is_of_this_package_so_that_the_command_line_shows_it():
    assert LogWarning.__module__.startswith("nestseg.")
