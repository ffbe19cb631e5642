"""The pages of `data stats` and `data preview`: one file, nothing from elsewhere, every name escaped."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.core.image_io import read_image
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.counts import count_split
from nestseg.data.loader import BatchPlan, RareClassSampling, training_batches
from nestseg.data.stats import describe_split
from nestseg.data.toystreets import ToyStreets
from nestseg.report.data_page import build_data_page, format_share, format_summary, write_data_report
from nestseg.report.html import Bar, Column, Section, Swatch, figure, image_uri, page, table
from nestseg.report.overlay import draw_overlay, shrink_sample
from nestseg.report.preview import draw_sheet, write_preview

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b's", "</td></table>")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(HTMLParser):
    """Everything that the tests ask about a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data
        if data.strip() and {"td", "th"} & set(self.open):
            self.cells.append(data.strip())

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Given:
    """A data set of arrays with any number of classes."""

    def __init__(self, classes: tuple[str, ...], num_images: int = 4) -> None:
        palette = tuple((7 * i % 256, 31 * i % 256, 97 * i % 256) for i in range(len(classes)))
        self.taxonomy = Taxonomy(name="<i>mine</i>", classes=classes, palette=palette)
        rng = np.random.default_rng(0)
        self.samples = []
        for index in range(num_images):
            target = rng.integers(0, max(1, len(classes) - 1), (40 + index, 60), np.uint8)
            target[:3] = 255
            self.samples.append(Sample(rng.integers(0, 256, (*target.shape, 3), np.uint8), target))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return f"<b>{index}</b>"

    def read(self, index: int) -> Sample:
        return self.samples[index]


def make_page(dataset: Given) -> str:
    counts = count_split(dataset)
    return build_data_page(describe_split(counts, dataset.taxonomy, split="tr<u>ain"), dataset, counts)


def check_self_contained(text: str) -> Outline:
    outline = Outline(text)
    assert not outline.find("script")
    assert not outline.find("link")
    assert all(not name.startswith("on") for _, attributes in outline.tags for name in attributes)
    assert all(str(image["src"]).startswith("data:image/") and image["alt"] for image in outline.find("img"))
    assert not re.search(r"https?:|url\(|@import", text)
    targets = [str(link["href"]) for link in outline.find("a")]
    ids = [str(attributes["id"]) for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    for attributes in [*outline.find("div"), *outline.find("pre")]:
        if attributes.get("class") == "scroll" or "role" in attributes:
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    (policy,) = [meta["content"] for meta in outline.find("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return outline


@pytest.mark.parametrize("num_classes", [1, 2, 150])
def test_page_is_one_file_that_works_for_any_number_of_classes(num_classes):
    outline = check_self_contained(make_page(Given(tuple(f"class number {i}" for i in range(num_classes)))))
    for index in range(num_classes):
        assert f"class number {index}" in outline.cells
    assert outline.find("img")


def test_names_cannot_become_markup():
    outline = check_self_contained(make_page(Given(HOSTILE)))
    for name in HOSTILE:
        assert name in outline.cells
    assert "<i>mine</i>: tr<u>ain" in outline.text
    assert not {"i", "u", "b"} & {tag for tag, attributes in outline.tags if not attributes}


def test_rows_say_what_was_counted():
    outline = Outline(make_page(Given(("road", "car", "tram"))))
    counts = count_split(Given(("road", "car", "tram")))
    for pixels in counts.class_pixels[:2]:
        assert f"{pixels:,}" in outline.cells
    assert "1 of 3 classes never occur, so nothing can be learnt about them: tram." in outline.text


def test_split_in_which_nothing_is_labelled_has_a_page():
    dataset = Given(("a", "b"))
    for sample in dataset.samples:
        sample.target[:] = 255
    outline = check_self_contained(make_page(dataset))
    assert "Nothing is labelled" in outline.text


def test_report_is_a_page_and_strict_json(tmp_path):
    calls: list[tuple[int, int]] = []
    scenes = ToyStreets(None, "val", num_images=10, size=(32, 64))
    stats = write_data_report(
        scenes, tmp_path / "new" / "out", split="val", num_workers=0, on_progress=lambda *done: calls.append(done)
    )
    assert calls[-1] == (10, 10)
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["index.html", "stats.json"]
    read = json.loads((tmp_path / "new" / "out" / "stats.json").read_text(), parse_constant=pytest.fail)
    assert read["num_images"] == stats.num_images == 10
    check_self_contained((tmp_path / "new" / "out" / "index.html").read_text(encoding="utf-8"))
    assert "Images: 10\nClasses that occur: 8 of 8\n" in format_summary(stats)


def test_bars_are_as_long_as_their_share_and_never_longer_than_their_cell():
    rows = [("a", Bar("1", 0.125)), ("b", Bar("2", 7)), ("c", Bar("3", 0)), ("d", Bar("4", 1e-9))]
    text = table("Bars", [Column("Name"), Column("Value", numeric=True)], rows)
    assert re.findall(r"width:([^\"]*)", text) == ["max(1px,12.50%)", "max(1px,100.00%)", "0", "max(1px,0.00%)"]


def test_table_with_a_row_of_another_length_is_our_mistake():
    with pytest.raises(ValueError, match="zip"):
        table("Rows", [Column("Name"), Column("Value")], [("a",)])


def test_swatch_shows_its_colour():
    text = table("Classes", [Column("Class")], [(Swatch("sky", (255, 0, 16), "3"),)])
    assert 'style="background:#ff0010"' in text


def test_picture_is_its_own_address():
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 12:] = (250, 10, 10)
    kind, content = image_uri(image).split(";base64,")
    assert kind == "data:image/jpeg"
    decoded = np.array(Image.open(io.BytesIO(base64.b64decode(content))))
    assert np.abs(decoded.astype(int) - image).max() < 60
    text = figure(image, caption="<c>", alt='"a"')
    assert 'width="24" height="16"' in text
    assert "&lt;c&gt;" in text
    assert 'alt="&quot;a&quot;"' in text


def test_page_lists_its_sections():
    outline = Outline(page("T", lead="L", sections=[Section("One", []), Section("Two", [])]))
    assert [link["href"] for link in outline.find("a")] == ["#content", "#part-1", "#part-2"]


@pytest.mark.parametrize(
    ("share", "words"),
    [(1, "100.0 %"), (0.0999, "9.99 %"), (0.001, "0.100 %"), (2e-6, "0.0002 %"), (1e-9, "< 0.0001 %")],
)
def test_shares_keep_three_digits(share, words):
    assert format_share(share) == words


def test_overlay_tints_classes_and_stripes_what_is_ignored():
    taxonomy = Taxonomy(name="two", classes=("a", "b"), palette=((200, 0, 0), (0, 200, 0)))
    image = np.full((20, 20, 3), 100, np.uint8)
    target = np.zeros((20, 20), np.uint8)
    target[:, 10:] = 1
    target[15:] = 255
    plain = draw_overlay(Sample(image, target), taxonomy)
    assert plain[0, 0].tolist() == [150, 50, 50]
    assert plain[0, 19].tolist() == [50, 150, 50]
    assert {tuple(pixel) for pixel in plain[15:].reshape(-1, 3).tolist()} == {(107, 107, 107), (121, 121, 121)}
    strong = draw_overlay(Sample(image, target), taxonomy, highlight=1)
    assert strong[5, 15].tolist() == [25, 175, 25]
    assert strong[5, 2].tolist() == [125, 75, 75]
    assert (image == 100).all()


def test_any_picture_becomes_small_and_8_bit():
    deep = np.arange(50 * 80 * 5, dtype=np.uint16).reshape(50, 80, 5)
    small = shrink_sample(Sample(deep, np.zeros((50, 80), np.uint8)), 40)  # type: ignore[arg-type]
    assert small.image.shape == (25, 40, 3)
    assert small.target.shape == (25, 40)
    assert small.image.dtype == np.uint8
    assert small.image.max() > 200
    flat = shrink_sample(Sample(np.full((4, 4, 1), 0.5, np.float32), np.zeros((4, 4), np.uint8)), 40)  # type: ignore[arg-type]
    assert flat.image.shape == (4, 4, 3)


def darken(sample: Sample, rng: np.random.Generator) -> Sample:
    top = int(rng.integers(0, 16))
    return Sample(sample.image[top : top + 16, :32] // 2, sample.target[top : top + 16, :32])


@pytest.mark.parametrize("rare", [False, True])
def test_preview_shows_what_the_loader_gives(rare, tmp_path):
    scenes = ToyStreets(None, "train", num_images=6, size=(32, 64))
    sampling = RareClassSampling.from_counts(count_split(scenes)) if rare else None
    plan = BatchPlan(num_samples=6, batch_size=3, seed=5, sampling=sampling)
    sheet, html = write_preview(scenes, darken, plan=plan, name="r<1>", out=tmp_path / "new", num_images=3, epoch=2)
    outline = check_self_contained(html.read_text(encoding="utf-8"))
    assert len(outline.find("img")) == 3
    (batch,) = training_batches(scenes, darken, plan=plan, start=4, stop=5)
    picture = read_image(sheet)
    for place, (index, image) in enumerate(zip(batch.sample_index.tolist(), batch.image, strict=True)):
        assert f"{scenes.name(index)}: seed 5, epoch 2, index {index}" in outline.text
        left = 12 + place * (32 + 4 + 32 + 12)
        assert np.array_equal(picture[12:28, left : left + 32], image.permute(1, 2, 0).numpy())
    assert ("for " in outline.text.split("index")[1]) == rare


def test_preview_of_more_images_than_there_are_shows_all(tmp_path):
    scenes = ToyStreets(None, "train", num_images=2, size=(32, 64))
    plan = BatchPlan(num_samples=2, batch_size=8, seed=0)
    _, html = write_preview(scenes, darken, plan=plan, name="r", out=tmp_path)
    assert len(Outline(html.read_text(encoding="utf-8")).find("img")) == 2
    with pytest.raises(DataError, match="E-DATA-096"):
        write_preview(scenes, darken, plan=plan, name="r", out=tmp_path, num_images=0)


def test_preview_names_a_sample_that_cannot_be_augmented(tmp_path):
    def refuse(sample: Sample, rng: np.random.Generator) -> Sample:
        raise DataError("E-DATA-060", "too long", fix="cut it")

    scenes = ToyStreets(None, "train", num_images=1, size=(32, 64))
    with pytest.raises(DataError, match=r"E-DATA-060 \| train_0000 \| too long"):
        write_preview(scenes, refuse, plan=BatchPlan(num_samples=1, batch_size=1, seed=0), name="r", out=tmp_path)


def test_long_lines_of_a_sheet_are_broken(tmp_path: Path):
    picture = np.zeros((10, 100, 3), np.uint8)
    short, long = (draw_sheet([(picture, text)]) for text in ("a b", "seed 1, epoch 2, index 3, for pedestrian"))
    assert short.shape[1] == long.shape[1] == 100 + 2 * 12
    assert long.shape[0] > short.shape[0]
    assert (long[:, :12] == 255).all()
    assert (long[:, -12:] == 255).all()
