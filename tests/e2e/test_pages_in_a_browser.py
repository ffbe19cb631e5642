"""Our pages as a person opens them: in Chromium, from disk, by pointer and by keyboard, on a screen and on a phone.

The browser is driven over the DevTools protocol through a pair of pipes, which needs no package. Screenshots go to the
folder that NESTSEG_SCREENSHOTS names, so that they can be looked at; without it they are taken and thrown away.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestseg.core.taxonomy import Taxonomy
from nestseg.data.toystreets import ToyStreets
from nestseg.engine.runs import plot_runs
from nestseg.metrics.calibration import ONE, compute_calibration
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import compute_scores
from nestseg.report.curves import PERCENT, Curve
from nestseg.report.data_page import write_data_report
from nestseg.report.evaluation_page import (
    Chart,
    EvaluationReport,
    ReportPicture,
    write_evaluation_report,
)

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60
PHONE, SCREEN = (390, 844), (1280, 900)


class Browser:
    """A headless Chromium and what it says."""

    def __init__(self, executable: str, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        # high numbers, so that putting them at 3 and 4 overwrites neither
        read_end, write_end = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs[0], ours[1]))
        self.reader, self.writer = ours[0], theirs[1]
        arguments = [
            executable,
            "--headless",
            "--no-sandbox",  # its own pages only, and root has no other choice
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--hide-scrollbars",
            "--no-first-run",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        self.pid = os.posix_spawn(
            executable,
            arguments,
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, read_end, 3),
                (os.POSIX_SPAWN_DUP2, write_end, 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        for end in (read_end, write_end, theirs[0], ours[1]):
            os.close(end)
        self.buffer = b""
        self.ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        message = {"id": next(self.ids), "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {SECONDS} seconds"
            part = os.read(self.reader, 1 << 20)
            assert part, "the browser ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)
        # it ends by itself when the pipes do; its children may outlive it by a moment
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, *, size: tuple[int, int] = SCREEN, scheme: str = "light") -> None:
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def events(self, *methods: str) -> list[dict[str, Any]]:
        ours = (one for one in self.browser.events if one.get("sessionId") == self.session)
        return [one["params"] for one in ours if one["method"] in methods]

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while not self.events("Page.loadEventFired"):
            self.browser.events.append(self.browser.receive())

    def ask(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            extra = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key], **extra)

    def click(self, selector: str) -> None:
        x, y = self.ask(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); "
            "one.scrollIntoView({block: 'center', inline: 'center'}); const box = one.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type_class(self, text: str) -> None:
        self.ask("document.querySelector('#class').focus(), document.querySelector('#class').select()")
        self.call("Input.insertText", text=text)

    def visible(self, selector: str) -> int:
        found: int = self.ask(
            f"[...document.querySelectorAll({json.dumps(selector)})].filter((one) => one.checkVisibility()).length"
        )
        return found

    def text(self, selector: str) -> str:
        found: str = self.ask(f"document.querySelector({json.dumps(selector)}).textContent")
        return found

    def screenshot(self, name: str, folder: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        picture = base64.b64decode(taken["data"])
        assert len(picture) > 10_000  # more than a blank page
        (folder / f"{name}.png").write_bytes(picture)

    def assert_sound(self) -> None:
        """No complaint, no request but for the file itself, every picture loaded, nothing wider than the window."""
        complaints = [*self.events("Runtime.exceptionThrown"), *self.events("Log.entryAdded")]
        complaints += [one for one in self.events("Runtime.consoleAPICalled") if one["type"] in ("error", "warning")]
        assert complaints == []
        asked = [one["request"]["url"] for one in self.events("Network.requestWillBeSent")]
        assert [url for url in asked[1:] if not url.startswith("data:image/")] == []
        assert asked[0].startswith("file://")
        broken = self.ask(
            "Promise.all([...document.images].map((one) => { one.loading = 'eager'; "
            "return one.decode().then(() => '', () => one.alt); })).then((all) => all.filter(Boolean))"
        )
        assert broken == []
        assert self.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    running = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = os.environ.get("NESTSEG_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_report(num_classes: int) -> EvaluationReport:
    """Scenes of ToyStreets, their eight classes spread over so many, and a model that errs in blocks."""
    rng = np.random.default_rng(0)
    scenes = ToyStreets(None, "val", num_images=12, size=(120, 208))
    if num_classes == scenes.taxonomy.num_classes:
        taxonomy = scenes.taxonomy
    else:
        palette = tuple((37 * i % 256, 91 * i % 256, 151 * i % 256) for i in range(num_classes))
        names = tuple(f"class with a long name {i}" if i % 7 == 3 else f"class {i}" for i in range(num_classes))
        taxonomy = Taxonomy(name="many", classes=names, palette=palette)
    confusion = ConfusionMatrix(num_classes)
    images: list[tuple[str, float | None]] = []
    pictures: list[ReportPicture] = []
    for index in range(len(scenes)):
        image, target = scenes.read(index)
        if num_classes != 8:
            # background is everywhere, so that a class is missing from some pictures only
            target = rng.permutation(num_classes).astype(np.uint8)[target]
        target[-10:] = 255
        shifted = np.roll(target, 3 + index % 4, axis=1) % 255
        blocks = np.kron(rng.random((6, 8)) < 0.15 + 0.02 * index, np.ones((20, 26), bool))
        labels = np.where(blocks, (shifted + 1) % num_classes, shifted % num_classes).astype(np.uint8)
        confusion.update(labels, target)
        alone = ConfusionMatrix(num_classes)
        alone.update(labels, target)
        mean_iou = compute_scores(alone, absent="skip").mean_iou
        images.append((scenes.name(index), mean_iou))
        kind = "best" if index < 3 else "worst" if index > 8 else "random"
        if index % 2 == 0 or kind != "random":
            pictures.append(
                ReportPicture(
                    name=scenes.name(index), kind=kind, mean_iou=mean_iou, image=image, target=target, labels=labels
                )
            )
    scores = compute_scores(confusion, absent="skip")
    steps = list(range(20, 420, 20))
    return EvaluationReport(
        title=f"A model of {num_classes} classes",
        taxonomy=taxonomy,
        scores=scores,
        confusion=confusion,
        protocol={"mode": "whole image, single scale", "ignored pixels": "not counted", "absent classes": "left out"},
        provenance={"model": "model.safetensors", "sha256": "0123456789abcdef" * 4, "commit": "0123456789abcdef"},
        interval=(scores.mean_iou - 0.03, scores.mean_iou + 0.025),
        boundary_iou=[None if iou is None else 0.5 * iou for iou in scores.iou_per_class],
        iou_by_size={
            "below 32 x 32": [None if iou is None else 0.4 * iou for iou in scores.iou_per_class],
            "above 96 x 96": scores.iou_per_class,
        },
        objects_by_size={size: [20] * num_classes for size in ("below 32 x 32", "above 96 x 96")},
        calibration=compute_calibration(
            np.array(
                [[100 * place, 9 * place * place, 10 * place * place * ONE + 5 * place * ONE] for place in range(10)]
            )
        ),
        extra_tables={"Categories": {"flat": 0.93, "human": None}},
        images=sorted(images, key=lambda pair: pair[1] or 0.0),
        pictures=pictures,
        curves=[
            Chart("mIoU", [Curve("val", steps, [step / 500 for step in steps])], PERCENT),
            Chart("Loss", [Curve("train", steps, [20 / step for step in steps]), Curve("val", steps, [0.4] * 20)]),
        ],
        latency={"median of an image": "41 ms", "peak memory": "1.1 GB"},
        recipe="name: toy\n" + "".join(f"field_{i}: {i}\n" for i in range(80)),
        partial=["val_0004.png could not be read"] if num_classes == 8 else [],
    )


@pytest.fixture(scope="module", params=[8, 150], ids=lambda number: f"{number}-classes")
def evaluation_page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    path = tmp_path_factory.mktemp("evaluation") / "index.html"
    write_evaluation_report(make_report(request.param), path)
    return request.param, path


@pytest.mark.parametrize(
    ("size", "scheme"), [(SCREEN, "light"), (SCREEN, "dark"), (PHONE, "light"), (PHONE, "dark")], ids=str
)
def test_evaluation_page_opens_from_disk_without_a_complaint_or_a_request(
    browser: Browser,
    evaluation_page: tuple[int, Path],
    size: tuple[int, int],
    scheme: str,
    screenshots: Path,
) -> None:
    num_classes, path = evaluation_page
    tab = Tab(browser, size=size, scheme=scheme)
    tab.open(path)
    tab.assert_sound()
    assert tab.visible("section") == 10
    tab.screenshot(f"evaluation-{num_classes}-{size[0]}-{scheme}", screenshots)
    paper = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_class_filter_leaves_rows_pictures_and_confusions_of_the_class(
    browser: Browser, evaluation_page: tuple[int, Path]
) -> None:
    num_classes, path = evaluation_page
    name = "person" if num_classes == 8 else "class 11"
    tab = Tab(browser)
    tab.open(path)
    before = {selector: tab.visible(selector) for selector in ("tr[data-truth]", ".case")}
    assert tab.visible("table[data-sortable] tbody tr") == num_classes
    tab.type_class(name)
    assert tab.visible("table[data-sortable] tbody tr") == 1  # exactly this one, although "class 110" begins alike
    assert 0 < tab.visible("tr[data-truth]") < before["tr[data-truth]"]
    rows = tab.ask(
        "[...document.querySelectorAll('tr[data-truth]:not([hidden]) th')].map((one) => one.textContent).join('|')"
    )
    assert all(name in row for row in rows.split("|"))
    assert 0 < tab.visible(".case") <= before[".case"]
    if num_classes == 150:
        assert tab.visible(".case") < before[".case"]
    assert tab.text(".filter output").startswith(f"1 of {num_classes} classes, ")
    tab.type_class("no such thing")
    assert tab.visible(".case") == tab.visible("tr[data-truth]") == 0
    assert tab.text(".filter output").startswith(f"0 of {num_classes} classes, 0 of ")
    tab.press("Escape")
    assert {selector: tab.visible(selector) for selector in before} == before
    tab.assert_sound()


def test_cell_of_the_matrix_is_clicked_to_its_words_and_pictures(
    browser: Browser, evaluation_page: tuple[int, Path], screenshots: Path
) -> None:
    num_classes, path = evaluation_page
    tab = Tab(browser)
    tab.open(path)
    # the dearest confusion that a picture shows
    pair = tab.ask("[...document.querySelectorAll('tr[data-pair]')].find((row) => row.querySelector('a')).dataset.pair")
    tab.click(f"td[data-pair='{pair}']")
    said = tab.text("#said")
    assert said.startswith(tab.ask(f"document.querySelector(\"td[data-pair='{pair}']\").title"))
    assert "is called" in said
    assert "Seen in picture" in said
    held = tab.ask("[...document.querySelectorAll('.case:not([hidden])')].map((one) => one.dataset.pairs)")
    assert held
    assert all(pair in pairs.split(" ") for pairs in held)
    truth = pair.split("-")[0]
    assert set(
        tab.ask("[...document.querySelectorAll('tr[data-truth]:not([hidden])')].map((one) => one.dataset.truth)")
    ) == {truth}
    assert tab.ask("document.querySelector('tr[aria-current=true]').dataset.pair") == pair
    tab.screenshot(f"evaluation-{num_classes}-cell", screenshots)
    tab.click("#said a")
    assert tab.ask("location.hash").startswith("#picture-")
    tab.assert_sound()


def test_matrix_is_walked_with_arrow_keys(browser: Browser, evaluation_page: tuple[int, Path]) -> None:
    _, path = evaluation_page
    tab = Tab(browser)
    tab.open(path)
    place = "(() => { const one = document.activeElement; return [one.parentElement.rowIndex, one.cellIndex]; })()"
    assert tab.visible(".matrix td[tabindex='0']") == 1
    tab.ask("document.querySelector(\".matrix td[tabindex='0']\").focus()")
    first_row, first_column = tab.ask(place)
    tab.press("ArrowDown")
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    assert tab.ask(place) == [first_row + 1, first_column + 2]
    tab.press("Home")
    assert tab.ask(place) == [first_row + 1, first_column]
    # to the diagonal of a class that occurs
    row = tab.ask(
        "[...document.querySelectorAll('.matrix tbody tr')].findLastIndex((row, place) => row.cells[place + 1].title)"
    )
    for key, times in (("ArrowDown", row - 1), ("ArrowRight", row)):
        for _ in range(times):
            tab.press(key)
    assert tab.ask(place) == [first_row + row, first_column + row]
    tab.press("Enter")
    assert "is right" in tab.text("#said")
    assert tab.ask("document.querySelector('#class').value") == tab.ask(
        "document.activeElement.parentElement.cells[0].textContent"
    )
    assert tab.ask("document.activeElement.getAttribute('aria-selected')") == "true"
    assert tab.visible(".matrix td[tabindex='0']") == 1
    tab.press("Escape")
    assert tab.text("#said") == tab.ask("document.querySelector('#class').value") == ""
    tab.assert_sound()


def test_table_of_classes_sorts_by_any_column_with_missing_values_last(
    browser: Browser, evaluation_page: tuple[int, Path]
) -> None:
    _, path = evaluation_page
    tab = Tab(browser)
    tab.open(path)
    column = "[...document.querySelectorAll('table[data-sortable] tbody tr')].map((row) => row.cells[{}].textContent)"
    tab.ask("document.querySelectorAll('table[data-sortable] thead button')[1].click()")
    values = tab.ask(column.format(1))
    known = [float(value) for value in values if value != "-"]
    assert known == sorted(known, reverse=True)
    assert values[: len(known)].count("-") == 0
    tab.ask("document.querySelectorAll('table[data-sortable] thead button')[1].click()")
    values = tab.ask(column.format(1))
    assert [float(value) for value in values if value != "-"] == sorted(known)
    assert values[: len(known)].count("-") == 0
    tab.ask("document.querySelectorAll('table[data-sortable] thead button')[0].click()")
    ids = [int(value) for value in tab.ask(column.format(0) + ".map((text) => parseInt(text))")]
    assert ids == sorted(ids)
    tab.assert_sound()


def test_without_scripts_all_of_the_page_is_there(browser: Browser, evaluation_page: tuple[int, Path]) -> None:
    num_classes, path = evaluation_page
    tab = Tab(browser)
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(path)
    tab.call("Emulation.setScriptExecutionDisabled", value=False)  # for the questions
    assert tab.visible(".filter") == 0  # what would do nothing is not shown
    assert tab.visible("thead button") == 0
    assert tab.visible("table[data-sortable] tbody tr") == num_classes
    assert tab.visible("tr[data-truth] a") > 0
    assert tab.visible(".case") == tab.ask("document.querySelectorAll('.case').length") > 0


def test_another_script_does_not_run_in_the_page(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    write_evaluation_report(make_report(8), path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", "<script>document.title = 'taken'</script></body>"), encoding="utf-8")
    tab = Tab(browser)
    tab.open(path)
    assert tab.ask("document.title") == "A model of 8 classes"
    assert tab.visible(".filter") == 1
    assert tab.events("Log.entryAdded")  # so a complaint is seen where there is one


@pytest.mark.parametrize(("size", "scheme"), [(SCREEN, "light"), (PHONE, "dark")], ids=str)
@pytest.mark.parametrize("kind", ["data", "runs"])
def test_pages_of_data_stats_and_runs_plot_open_without_a_complaint_or_a_request(
    browser: Browser, kind: str, size: tuple[int, int], scheme: str, screenshots: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    if kind == "data":
        write_data_report(ToyStreets(None, "val", num_images=6), tmp_path, split="val", num_workers=0)
    else:
        records = [
            {"kind": "step", "step": step, "loss": 20 / step, "lr": 0.01, "images_per_second": 9.0, "seconds": 1.0}
            for step in range(10, 110, 10)
        ]
        records += [
            {"kind": "evaluation", "step": step, "mean_iou": step / 200, "loss": 0.5, "iou_per_class": {"sky": 0.5}}
            for step in (50, 100)
        ]
        for name in ("first", "second"):
            run = tmp_path / name
            run.mkdir()
            (run / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        plot_runs([tmp_path / "first", tmp_path / "second"], path, lock_holder=lambda _: None)
    tab = Tab(browser, size=size, scheme=scheme)
    tab.open(path)
    tab.assert_sound()
    tab.screenshot(f"{kind}-{size[0]}-{scheme}", screenshots)
