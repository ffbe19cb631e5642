"""Published weights: a table whose every entry can be believed, and a cache that notices tampering."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nestseg.core.errors import DownloadError, WeightsError
from nestseg.models.resnest import BACKBONES
from nestseg.recipes import PUBLISHED_MEAN_IOU, parse_name
from nestseg.weights import registry
from nestseg.weights.registry import (
    PublishedWeights,
    UncheckedWeightsWarning,
    cache_folder,
    fetch_weights,
    find_weights,
    list_weights,
    load_registry,
    parse_registry,
)

ENTRIES = list(load_registry().values())
FILE, OTHER = b"the weights" * 1000, b"other weights" * 1000
SHA256, OTHER_SHA256 = hashlib.sha256(FILE).hexdigest(), hashlib.sha256(OTHER).hexdigest()

SMALL_REGISTRY = f"""
[data.imagenet]
text = "ImageNet: terms"
url = "https://example.org/terms"

[sources.test]
project = "tests"
page = "https://example.org"
licence = "Apache-2.0"
layout = "official"
dilation_variant = "official"
logits_resizes = 1

[[weights]]
name = "test:full"
backbone = "resnest14"
urls = ["URL/a/model.pth"]
sha256 = "{SHA256}"
size = {len(FILE)}

[[weights]]
name = "test:prefix"
backbone = "resnest14"
urls = ["URL/absent/model.pth", "URL/b/model.pth"]
sha256 = "{OTHER_SHA256[:8]}"

[[weights]]
name = "test:unknown"
backbone = "resnest14"
urls = ["URL/a/model.pth"]
sha256 = ""
"""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def site(monkeypatch):
    """Serve two files under one base name and put three names for them into the registry; return what is served."""
    served, asked = {"/a/model.pth": FILE, "/b/model.pth": OTHER}, []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            asked.append(self.path)
            time.sleep(served.get("pause", 0))
            body = served.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    entries = parse_registry(SMALL_REGISTRY.replace("URL", f"http://127.0.0.1:{server.server_address[1]}"))
    monkeypatch.setattr(registry, "load_registry", lambda: entries)
    served["asked"] = asked
    yield served
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_says_what_it_is_and_fits_something_that_there_is(entry):
    assert entry.backbone in BACKBONES
    assert all(url.startswith("https://") for url in entry.urls)
    assert len({url.rpartition("/")[2] for url in entry.urls}) == 1
    assert entry.licence
    assert "ImageNet" in entry.data_licence
    assert entry.page.startswith("https://")
    if entry.kind == "backbone":
        assert entry.fits == entry.backbone
        assert entry.name.partition(":")[2] == entry.backbone
    else:
        parts = parse_name(entry.fits)
        assert (parts.segmentor, parts.backbone) == (entry.segmentor, entry.backbone)
        assert (parts.output_stride, parts.dataset) == (entry.output_stride, entry.dataset)
        assert entry.name.partition(":")[2] == entry.fits
        assert entry.dataset[:3] in entry.data_licence.lower().replace("pascal ", "")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_hash_prefix_is_the_one_in_the_file_name_and_no_hash_is_claimed_without_one(entry):
    suffix = re.search(r"-([0-9a-f]{8})\.pth$", entry.file_name)
    assert entry.sha256 == (suffix[1] if suffix else "")


def test_every_published_file_is_there_and_no_file_twice():
    kinds = Counter(entry.name.partition(":")[0] for entry in ENTRIES)
    assert kinds == {"official": 11, "timm": 6, "mmseg-init": 3, "mmseg": 8, "ssseg": 12}
    addresses = [url for entry in ENTRIES for url in entry.urls]
    assert len(set(addresses)) == len(addresses)


def test_numbers_of_the_twelve_originals_are_those_of_the_zoo():
    assert {entry.fits: entry.value for entry in ENTRIES if entry.layout == "ssseg"} == PUBLISHED_MEAN_IOU


def test_protocol_and_dilation_variant_follow_the_layout():
    assert {(entry.layout, entry.dilation_variant) for entry in ENTRIES} == {
        ("official", "official"),
        ("timm", "timm"),
        ("mmseg", "plain"),
        ("ssseg", "plain"),
    }
    assert {entry.layout for entry in ENTRIES if entry.logits_resizes == 2} == {"mmseg"}
    assert all(entry.logits_resizes == 2 for entry in ENTRIES if entry.name.startswith("mmseg:"))


@pytest.mark.parametrize(
    ("line", "instead", "word"),
    [
        ('name = "test:full"', 'name = "test:prefix"', "listed twice"),
        ('name = "test:full"', 'name = "test:../full"', "pattern"),
        ('name = "test:full"', 'name = "test:full"\ncolour = "red"', "colour"),
        ('name = "test:full"', 'name = "test:full"\nsegmentor = "fcn"', "belong together"),
        ('name = "test:full"', 'name = "test:full"\nvalue = 0.5', "belong together"),
        (f'sha256 = "{SHA256}"', f'sha256 = "{SHA256[:12]}"', "sha256"),
        ('urls = ["URL/a/model.pth"]', "urls = []", "urls"),
        ('layout = "official"', 'layout = "unheard-of"', "layout"),
    ],
)
def test_registry_with_a_mistake_is_refused(line, instead, word):
    assert len(parse_registry(SMALL_REGISTRY)) == 3
    assert line in SMALL_REGISTRY
    with pytest.raises(ValueError, match=word):
        parse_registry(SMALL_REGISTRY.replace(line, instead, 1))


def test_registry_lives_without_torch():
    code = (
        "import sys; from nestseg.weights.registry import list_weights; list_weights(); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NESTSEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/nestseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_folder()) == "/home/somebody/.cache/nestseg"


def test_unknown_name_offers_the_nearest():
    for function in (find_weights, fetch_weights):
        with pytest.raises(
            WeightsError, match=r"E-WEIGHTS-030 \| official:resnet101 .*did you mean official:resnest101"
        ):
            function("official:resnet101")
    with pytest.raises(WeightsError, match="nestseg weights list"):
        find_weights("zzz")


def test_weights_that_were_not_fetched_are_named_with_the_command_and_the_network_is_left_alone(site):
    with pytest.raises(WeightsError, match="E-WEIGHTS-031") as raised:
        find_weights("test:full")
    assert raised.value.fix == "nestseg weights fetch test:full"
    assert site["asked"] == []


def test_fetched_file_is_found_under_its_hash(site, tmp_path):
    path = fetch_weights("test:full")  # a full hash agrees: nothing to warn of
    assert path == tmp_path / "cache" / "weights" / SHA256 / "model.pth"
    assert path.read_bytes() == FILE
    assert find_weights("test:full") == path
    assert fetch_weights("test:full") == path
    assert site["asked"] == ["/a/model.pth"]


def test_known_prefix_is_compared_and_never_called_more_than_that(site):
    with pytest.warns(UncheckedWeightsWarning) as caught:
        path = fetch_weights("test:prefix")
    messages = [str(warning.message) for warning in caught]
    assert any("8 of the 64 digits" in message for message in messages)
    assert any("HTTP 404" in message for message in messages)  # W9: the first address is dead, and that is said
    assert path.read_bytes() == OTHER
    site["/b/model.pth"] = FILE
    path.unlink()
    with pytest.raises(DownloadError, match=rf"{SHA256}.*{OTHER_SHA256[:8]}\.\.\."):
        fetch_weights("test:prefix")
    assert not path.exists()


def test_file_of_unknown_hash_is_taken_with_a_plain_statement_and_watched_from_then_on(site):
    with pytest.warns(UncheckedWeightsWarning, match=rf"nothing could be compared; its own, {SHA256}"):
        path = fetch_weights("test:unknown")
    assert find_weights("test:unknown") == path
    path.write_bytes(OTHER)
    with pytest.raises(WeightsError, match=rf"E-WEIGHTS-032 .*{OTHER_SHA256}.*{SHA256}"):
        find_weights("test:unknown")


@pytest.mark.parametrize("name", ["test:full", "test:prefix"])
@pytest.mark.filterwarnings("ignore::nestseg.weights.registry.UncheckedWeightsWarning")
def test_w2_file_that_was_tampered_with_is_found_at_every_use_and_replaced_by_fetching(site, name):
    path = fetch_weights(name)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    for _ in range(2):
        with pytest.raises(WeightsError, match="E-WEIGHTS-032") as raised:
            find_weights(name)
    for digest in (hashlib.sha256(content).hexdigest(), hashlib.sha256(content[:-1] + b"!").hexdigest()):
        assert digest in raised.value.reason
    assert f"nestseg weights fetch {name}" in raised.value.fix
    assert fetch_weights(name) == path
    assert find_weights(name).read_bytes() == content


def test_w2_file_that_the_registry_no_longer_means_is_refused(site, monkeypatch):
    fetch_weights("test:full")
    (changed,) = (entry for entry in registry.load_registry().values() if entry.name == "test:full")
    changed = changed.model_copy(update={"sha256": OTHER_SHA256})
    monkeypatch.setattr(registry, "load_registry", lambda: {"test:full": changed})
    with pytest.raises(WeightsError, match=rf"E-WEIGHTS-033 .*{SHA256}.*{OTHER_SHA256}"):
        find_weights("test:full")


@pytest.mark.filterwarnings("ignore::nestseg.weights.registry.UncheckedWeightsWarning")
def test_w3_files_of_one_base_name_do_not_meet(site):
    first, second, same = (fetch_weights(name) for name in ("test:full", "test:prefix", "test:unknown"))
    assert first.name == second.name
    assert (first.read_bytes(), second.read_bytes()) == (FILE, OTHER)
    assert same == first  # the same bytes are kept once


def test_file_at_hand_is_taken_after_the_same_comparison(site, tmp_path):
    at_hand = tmp_path / "downloaded (1).pth"
    at_hand.write_bytes(OTHER)
    with pytest.raises(DownloadError, match=OTHER_SHA256) as raised:
        fetch_weights("test:full", source=at_hand)
    assert raised.value.fix.endswith("nestseg weights fetch test:full --from FILE")
    at_hand.write_bytes(FILE)
    assert fetch_weights("test:full", source=at_hand).read_bytes() == FILE
    assert fetch_weights("test:full", source=at_hand.as_uri()) == find_weights("test:full")
    assert site["asked"] == []


@pytest.mark.parametrize("damage", ["{", "{}", json.dumps({"sha256": "0" * 64, "file_name": "../../x", "url": ""})])
def test_record_that_is_damaged_counts_as_not_fetched_and_fetching_mends_it(site, tmp_path, damage):
    path = fetch_weights("test:full")
    record = tmp_path / "cache" / "weights" / "names" / "test--full.json"
    record.write_text(damage)
    with pytest.raises(WeightsError, match="E-WEIGHTS-031"):
        find_weights("test:full")
    assert fetch_weights("test:full") == path


def test_w8_two_processes_that_fetch_one_name_download_it_once(site, tmp_path):
    address = registry.load_registry()["test:full"].urls[0].removesuffix("/a/model.pth")
    site["pause"] = 0.5
    table = tmp_path / "registry.toml"
    table.write_text(SMALL_REGISTRY.replace("URL", address))
    code = (
        "import pathlib, sys; from nestseg.weights import registry\n"
        "entries = registry.parse_registry(pathlib.Path(sys.argv[1]).read_text())\n"
        "registry.load_registry = lambda: entries\n"
        "print(registry.fetch_weights('test:unknown'))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(table)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert outputs == [(f"{find_weights('test:unknown')}\n", "")] * 2
    assert site["asked"] == ["/a/model.pth"]


def test_list_says_what_is_known_of_a_hash_and_what_is_in_the_cache(site):
    with pytest.warns(UncheckedWeightsWarning):
        fetch_weights("test:unknown")
    rows = {row.name: row for row in list_weights()}
    assert rows["test:full"].sha256 == SHA256
    assert rows["test:prefix"].sha256 == f"{OTHER_SHA256[:8]}... (8 digits known)"
    assert rows["test:unknown"].sha256 == "not known"
    assert [rows[name].cached for name in ("test:full", "test:prefix", "test:unknown")] == ["no", "no", "yes"]
    assert rows["test:full"].size == f"{len(FILE) / 1e6:.1f} MB"
    assert rows["test:prefix"].size == rows["test:prefix"].metric == "-"


def test_list_of_the_real_registry_has_a_word_in_every_field():
    rows = list_weights()
    assert [row.name for row in rows] == [entry.name for entry in ENTRIES]
    assert all(all(row) for row in rows)
    assert not any("verified" in field.lower() for row in rows for field in row)
    assert {len(row.sha256) for row in rows} == {len("not known"), len("528c19ca... (8 digits known)")}
    (row,) = (row for row in rows if row.name == "official:resnest101")
    assert (row.metric, row.size) == ("ImageNet top-1 at 256: 82.83 %", "193.8 MB")


def test_entries_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ENTRIES[0].sha256 = "0" * 64
    with pytest.raises(TypeError):
        load_registry()["mine"] = ENTRIES[0]  # type: ignore[index]  # that is the point
    assert isinstance(ENTRIES[0], PublishedWeights)
