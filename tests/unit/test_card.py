"""Model cards: complete, honest about what nobody stated, and no markup out of anybody's free text."""

from __future__ import annotations

import contextlib
import html
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from nestseg import Taxonomy
from nestseg.models.segmenter import create_model
from nestseg.store.card import escape_markdown, model_card
from nestseg.store.metadata import Architecture, ModelMetadata, Score

HOSTILE = [
    "a|b",
    "two\nlines\r\n\n# heading",
    "<script>alert(1)</script>",
    "<!-- hidden",
    "[text](https://evil.example)",
    "![x](https://evil.example/p.png)",
    "`code` ``` **bold** _it_ ~~gone~~",
    "---",
    "&lt;b&gt; &#106;",
    "back\\slash \\| end\\",
    "see https://evil.example and www.evil.example, mail@evil.example",
    "\u202eright to left\u200b",
    "$x$ {{ y }} @someone #1",
]


def make_metadata(classes: tuple[str, ...] = ("road", "traffic light"), **changes: object) -> ModelMetadata:
    architecture = Architecture(
        segmentor="deeplabv3plus",
        backbone="resnest101",
        num_classes=len(classes),
        output_stride=8,
        dilation_variant="official",
        auxiliary=True,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        backbone_norm="batch",
        head_norm="batch",
        frozen_stages=0,
        head_channels=512,
        auxiliary_channels=None,
        dropout=0.1,
        align_corners=False,
        concat_input=False,
        pool_scales=None,
        atrous_rates=None,
        shortcut_channels=None,
    )
    values = {
        "architecture": architecture,
        "dataset": "cityscapes",
        "classes": classes,
        "palette": ((128, 64, 128), *[(250, 170, 30)] * (len(classes) - 1)),
        "base_size": (512, 2048),
        "recipe": {"name": "deeplabv3plus_resnest101-d8_cityscapes"},
        "step": 80000,
        "versions": {"torch": "2.14.1", "nestseg": "0.2.0"},
        "scores": (
            Score(
                dataset="cityscapes", split="val", mean_iou=0.7931, num_images=500, protocol="single scale, whole image"
            ),
        ),
        "licence": "Apache-2.0",
        "data_licence": "Cityscapes terms: non-commercial",
    }
    return ModelMetadata.model_validate(values | changes)


def seen(text: str) -> str:
    """What is left of a text in one line of what can be seen."""
    return " ".join("".join(letter for letter in text if letter.isprintable() or letter.isspace()).split())


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n\n", card, flags=re.DOTALL)[1])


def render(card: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card[card.index("\n---\n\n") + 5 :])


def table_rows(page: str, header: str) -> list[list[str]]:
    table = next(table for table in re.findall(r"<table>.*?</table>", page, re.DOTALL) if f"<th>{header}</th>" in table)
    rows = re.findall(r"<tr>\n(.*?)</tr>", table, re.DOTALL)[1:]
    return [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows]


def test_the_front_matter_is_what_the_hub_indexes():
    front = front_matter(model_card(make_metadata(), repository="me/net"))
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "nestseg"
    assert front["pipeline_tag"] == "image-segmentation"
    assert front["datasets"] == ["cityscapes"]
    assert {"deeplabv3plus", "resnest101", "semantic-segmentation"} <= set(front["tags"])


def test_the_hubs_own_reader_finds_the_score_as_mean_iou():
    card = ModelCard(model_card(make_metadata(), repository="me/net"))
    (result,) = card.data.eval_results
    assert card.data.model_name == "deeplabv3plus_resnest101-d8_cityscapes"
    assert (result.task_type, result.dataset_type, result.dataset_split) == ("image-segmentation", "cityscapes", "val")
    assert (result.metric_type, result.metric_value) == ("mean_iou", 0.7931)
    assert "single scale, whole image" in result.metric_name


def test_the_page_tells_score_protocol_steps_versions_and_both_licences():
    page = render(model_card(make_metadata(), repository="me/net"))
    assert table_rows(page, "split") == [["cityscapes", "val", "500", "79.31 %", "single scale, whole image"]]
    for told in (
        "DeepLabV3+ on resnest101, output stride 8",
        "Steps: 80000",
        "Versions: nestseg 0.2.0, torch 2.14.1",
        "Licence of the weights: Apache-2.0",
        "Terms of the training data: Cityscapes terms: non-commercial",
        "short side of 512 and a long side of 2048",
        "123.675, 116.28, 103.53 and 58.395, 57.12, 57.375",
    ):
        assert told in page


def test_classes_come_with_their_ids_and_colours():
    rows = table_rows(render(model_card(make_metadata(), repository=None)), "class")
    assert rows == [["0", "road", "<code>#804080</code>"], ["1", "traffic light", "<code>#faaa1e</code>"]]


def test_what_nobody_stated_is_said_to_be_not_stated():
    card = model_card(
        make_metadata(licence=None, data_licence=None, scores=(), recipe=None, step=0, versions={}), repository=None
    )
    page = render(card)
    assert "license" not in front_matter(card)
    assert "model-index" not in front_matter(card)
    for told in ("Licence of the weights", "Terms of the training data", "Steps", "Versions", "Source"):
        assert f"{told}: not stated" in page
    assert "None were measured" in page


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("MIT", {"license": "mit"}),
        ("cc-by-nc-sa-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("Research only, ask us", {"license": "other", "license_name": "research-only-ask-us"}),
        ("cc-by-nc-5.0", {"license": "other", "license_name": "cc-by-nc-5.0"}),
    ],
)
def test_a_licence_that_the_hub_does_not_list_goes_under_other(licence, told):
    card = model_card(make_metadata(licence=licence), repository=None)
    assert {key: value for key, value in front_matter(card).items() if key.startswith("license")} == told


@pytest.mark.parametrize("text", HOSTILE)
def test_free_text_cannot_become_markup_anywhere(text):
    calm = model_card(make_metadata(), repository="me/net")
    score = Score(dataset=text, split=text, mean_iou=0.5, protocol=text)
    card = model_card(
        make_metadata(
            (text, "other"),
            dataset=text,
            scores=(score,),
            licence=text,
            data_licence=text,
            source=text,
            recipe={"name": text},
            versions={text: text},
        ),
        repository="me/net",
    )
    front = front_matter(card)
    assert set(front) <= {"license_name", *front_matter(calm)}
    tags = re.compile(r"<[^>]*>")
    page, calm_page = render(card), render(calm)
    assert tags.findall(page) == tags.findall(calm_page)
    assert html.unescape(table_rows(page, "class")[0][1]) == seen(text)
    assert html.unescape(table_rows(page, "split")[0][4]) == seen(text)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1))
def test_escaped_text_shows_as_itself(text):
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"x {escape_markdown(text)}.")
    assert html.unescape(page) == f"<p>x {seen(text)}.</p>\n"


def test_addresses_are_not_made_links():
    assert escape_markdown("www.evil.example https://evil.example") == r"www\.evil.example https\://evil.example"


def test_the_card_of_the_same_model_is_the_same():
    first = make_metadata(versions={"a": "1", "b": "2"})
    second = make_metadata(versions={"b": "2", "a": "1"})
    assert model_card(first, repository="me/net") == model_card(second, repository="me/net")


def test_the_snippet_of_a_hub_model_loads_it_by_its_name():
    assert 'nestseg.load_predictor("hf:me/net")' in model_card(make_metadata(), repository="me/net")


def test_the_snippet_of_a_folder_runs_as_written(tmp_path, capsys):
    torch.manual_seed(0)
    model = create_model("fcn", "resnest14", num_classes=2, output_stride=32, head_channels=8, auxiliary=False)
    taxonomy = Taxonomy(name="two", classes=("road", "sky"), palette=((1, 2, 3), (4, 5, 6)))
    model.save_pretrained(tmp_path, taxonomy=taxonomy)
    Image.new("RGB", (64, 48), (10, 200, 90)).save(tmp_path / "image.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    with contextlib.chdir(tmp_path):
        exec(snippet, {})
    with Image.open(tmp_path / "labels.png") as labels:
        assert labels.size == (64, 48)
    assert "road" in capsys.readouterr().out
