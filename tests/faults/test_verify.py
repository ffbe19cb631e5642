"""A data set with every fault at once: all are reported in one pass, and nothing else is (P10 to P34, F5, F14).

The corpus is made here, by code: a folder in CamVid's layout in which each fault occurs several times, between clean
samples. Faults that need another layout have tests of their own below.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.data.camvid import CamVid
from nestseg.data.dataset import SampleFiles, read_pair
from nestseg.data.toystreets import TAXONOMY as TOYSTREETS
from nestseg.data.toystreets import ToyStreets
from nestseg.data.verify import KINDS, LabelRule, Problem, Report, Split, format_report, verify_dataset, verify_named
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.files import Expected, check_picture
from nestseg.data.verify.verify import _Other, _work_in_parallel

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
SIZE = (48, 64)
REPEATS = 10


# Clean files


def draw_labels(seed: int, *, size: tuple[int, int] = SIZE, ids: int = 11) -> np.ndarray:
    """Blocks of 12x16 pixels."""
    blocks = np.random.default_rng(seed).integers(0, ids, (-(-size[0] // 12), -(-size[1] // 16)), dtype=np.uint8)
    return blocks.repeat(12, 0).repeat(16, 1)[: size[0], : size[1]]


def draw_image(seed: int, *, size: tuple[int, int] = SIZE) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 40, (*size, 3))
    return Image.fromarray((draw_labels(seed, size=size)[:, :, None] * 18 + noise).astype(np.uint8))


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, image_format, **options)
    return encoded.getvalue()


def encode_labels(ids: np.ndarray) -> bytes:
    return encode(Image.fromarray(ids))


def encode_png(samples: np.ndarray, *, bits: int, size: tuple[int, int] | None = None) -> bytes:
    """Write a grey PNG of any bit depth; ``size`` is what its header claims."""
    height, width = size or samples.shape
    rows = [b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in samples]
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


# Faults of a file: seed -> what stands in its place


def jpeg(seed: int) -> bytes:
    return encode(draw_image(seed), "JPEG", quality=90)


def png(seed: int) -> bytes:
    return encode(draw_image(seed))


def cut(data: bytes, seed: int) -> bytes:
    return data[: 30 + (len(data) - 34) * (seed % 100) // 100]


IMAGE_FAULTS: dict[str, tuple[kinds.Kind, Callable[[int], bytes]]] = {
    "P16-empty": (kinds.EMPTY, lambda seed: b""),
    "P16-html": (kinds.WEB_PAGE, lambda seed: b"<!DOCTYPE html><html>404</html>"),
    "P16-xml": (kinds.WEB_PAGE, lambda seed: b'<?xml version="1.0"?><Error>AccessDenied</Error>'),
    "P16-lfs": (kinds.LFS_POINTER, lambda seed: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "P16-zeros": (kinds.ZEROS, lambda seed: bytes(1000 + seed)),
    "P10-archive": (kinds.NOT_A_PICTURE, lambda seed: b"PK\x03\x04" + bytes([seed % 256]) * 500),
    "P17-jpeg-cut": (kinds.CUT, lambda seed: cut(jpeg(seed), seed)),
    "P17-jpeg-no-end": (kinds.CUT, lambda seed: jpeg(seed)[:-2]),
    "P17-jpeg-zero-tail": (kinds.CUT, lambda seed: jpeg(seed)[: 700 + seed] + bytes(900)),
    "P19-png-cut": (kinds.CUT, lambda seed: png(seed)[:-20]),
    "P19-png-no-iend": (kinds.CUT, lambda seed: png(seed)[:-12]),
    "P19-png-flip": (kinds.CHECKSUM, lambda seed: flip(png(seed), 300 + seed)),
    "P19-png-trailing": (kinds.TRAILING, lambda seed: png(seed) + b"junk"),
    "P31-huge": (kinds.TOO_LARGE, lambda seed: encode_png(draw_labels(seed), bits=8, size=(30_000, 30_000))),
    "P31-large": (kinds.TOO_LARGE, lambda seed: encode_png(draw_labels(seed), bits=8, size=(10_000, 10_000))),
    "P21-float": (
        kinds.SAMPLE_DEPTH,
        lambda seed: encode(Image.fromarray(draw_labels(seed).astype(np.float32)), "TIFF"),
    ),
    "P19-png-header": (kinds.CHECKSUM, lambda seed: flip(png(seed), 18)),
}


def blend(seed: int) -> bytes:
    small = Image.fromarray(draw_labels(seed, size=(24, 32)))
    return encode(small.resize((64, 48), Image.Resampling.BILINEAR))


def colour(seed: int) -> Image.Image:
    palette = np.array([*CamVid.taxonomy.palette, (0, 0, 0)], np.uint8)
    return Image.fromarray(palette[draw_labels(seed)])


def with_value(seed: int, value: int) -> np.ndarray:
    labels = draw_labels(seed)
    labels[:5, :7] = value
    return labels


LABEL_FAULTS: dict[str, tuple[kinds.Kind, Callable[[int], bytes]]] = {
    "P16-label-empty": (kinds.EMPTY, lambda seed: b""),
    "P16-label-html": (kinds.WEB_PAGE, lambda seed: b"\n <html><body>login</body></html>"),
    "P19-label-cut": (kinds.CUT, lambda seed: encode_labels(draw_labels(seed))[:-15]),
    "P19-label-flip": (kinds.CHECKSUM, lambda seed: flip(encode_labels(draw_labels(seed)), 60)),
    "P25-label-jpeg": (kinds.LABEL_FORMAT, lambda seed: encode(Image.fromarray(draw_labels(seed)), "JPEG")),
    "P25-label-bmp": (kinds.LABEL_FORMAT, lambda seed: encode(Image.fromarray(draw_labels(seed)), "BMP")),
    "P25-label-blended": (kinds.LABEL_BLENDED, blend),
    "P25-label-was-jpeg": (
        kinds.LABEL_VALUES,
        lambda seed: encode(
            Image.open(io.BytesIO(encode(Image.fromarray(with_value(seed, 11) * 20), "JPEG", quality=60)))
        ),
    ),
    "P15-label-rgb": (kinds.LABEL_COLOURS, lambda seed: encode(colour(seed))),
    "P15-label-rgba": (kinds.LABEL_COLOURS, lambda seed: encode(colour(seed).convert("RGBA"))),
    "P15-label-three-equal": (
        kinds.LABEL_COLOURS,
        lambda seed: encode(Image.fromarray(draw_labels(seed)).convert("RGB")),
    ),
    "P15-label-grey-alpha": (
        kinds.LABEL_COLOURS,
        lambda seed: encode(Image.fromarray(draw_labels(seed)).convert("LA")),
    ),
    "P24-label-16-bit": (kinds.LABEL_DEPTH, lambda seed: encode(Image.fromarray(draw_labels(seed).astype(np.uint16)))),
    "P24-label-minus-one": (
        kinds.LABEL_DEPTH,
        lambda seed: encode(Image.fromarray(np.where(draw_labels(seed) > 9, 65535, 3).astype(np.uint16))),
    ),
    "P24-label-1-bit": (kinds.LABEL_DEPTH, lambda seed: encode_png(draw_labels(seed, ids=2), bits=1)),
    "P24-label-4-bit": (kinds.LABEL_DEPTH, lambda seed: encode_png(draw_labels(seed), bits=4)),
    "P24-label-value": (kinds.LABEL_VALUES, lambda seed: encode_labels(with_value(seed, 40 + seed % 200))),
    "P24-label-one-based": (kinds.LABEL_VALUES, lambda seed: encode_labels(with_value(seed, 11) + 1)),
    "P24-label-255": (kinds.LABEL_VALUES, lambda seed: encode_labels(with_value(seed, 255))),
    "P24-label-0-255": (kinds.LABEL_VALUES, lambda seed: encode_labels(draw_labels(seed, ids=2) * 255)),
    "P24-label-one-pixel": (
        kinds.LABEL_VALUES,
        lambda seed: encode_labels(
            np.where(np.arange(64) + 64 * np.arange(48)[:, None] == seed, 99, draw_labels(seed))
        ),
    ),
    "P23-label-size": (kinds.SIZES, lambda seed: encode_labels(draw_labels(seed, size=(48, 63)))),
    "P23-label-turned": (kinds.SIZES, lambda seed: encode_labels(draw_labels(seed).T.copy())),
}


class Corpus:
    """A folder being filled, and what must be found in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, str] = {}
        """Code by path."""
        self.seed = 0
        self.num_files = 0

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.num_files += 1

    def add_pair(self, name: str, *, split: str = "train", suffix: str = ".png") -> tuple[Path, Path]:
        """Write a clean pair."""
        self.seed += 1
        image = self.root / split / f"{name}{suffix}"
        label = self.root / f"{split}annot" / f"{name}.png"
        self.write(image, jpeg(self.seed) if suffix == ".jpg" else png(self.seed))
        self.write(label, encode_labels(draw_labels(self.seed)))
        return image, label

    def expect(self, path: Path, kind: kinds.Kind) -> None:
        self.faults[str(path)] = kind.code


def fill(root: Path) -> Corpus:
    """Write every fault `REPEATS` times, and a clean sample beside each."""
    corpus = Corpus(root)
    for number in range(REPEATS):
        for name, (kind, make) in IMAGE_FAULTS.items():
            image, _ = corpus.add_pair(f"{name}-{number}", suffix=".jpg" if "jpeg" in name else ".png")
            image.write_bytes(make(corpus.seed))
            corpus.expect(image, kind)
        for name, (kind, make) in LABEL_FAULTS.items():
            _, label = corpus.add_pair(f"{name}-{number}")
            label.write_bytes(make(corpus.seed))
            corpus.expect(label, kind)
        add_odd_entries(corpus, number)
        add_lone_files(corpus, number)
        add_turned(corpus, number)
        for clean in range(20):
            corpus.add_pair(f"clean-{number}-{clean}", split="val" if clean % 4 == 0 else "train")
    add_manifest(corpus)
    return corpus


def add_odd_entries(corpus: Corpus, number: int) -> None:
    """P30: entries of a folder that are no files."""
    for name in ("pipe", "folder", "broken-link", "loop"):
        path, _ = corpus.add_pair(f"P30-{name}-{number}")
        path.unlink()
        corpus.expect(path, kinds.NOT_REGULAR if name in {"pipe", "folder"} else kinds.UNREADABLE)
        if name == "pipe":
            os.mkfifo(path)
        elif name == "folder":
            path.mkdir()
        else:
            path.symlink_to(path.name if name == "loop" else "nowhere.png")


def add_lone_files(corpus: Corpus, number: int) -> None:
    """P27: samples that are not whole."""
    image, label = corpus.add_pair(f"P27-no-label-{number}")
    label.unlink()
    corpus.expect(image, kinds.NO_LABEL)
    image, label = corpus.add_pair(f"P27-no-image-{number}")
    image.unlink()
    corpus.expect(label, kinds.NO_IMAGE)
    image, label = corpus.add_pair(f"P27-case-{number}")
    label.rename(label.with_name(f"p27-CASE-{number}.png"))
    corpus.expect(image, kinds.NAMES_DIFFER)
    image, label = corpus.add_pair(f"P29-caf\u00e9-{number}")
    label.rename(label.with_name(unicodedata.normalize("NFD", label.name)))
    corpus.expect(image, kinds.NAMES_DIFFER)
    image, _ = corpus.add_pair(f"P27-two-{number}", suffix=".jpg")
    corpus.write(image.with_suffix(".png"), png(number))
    corpus.expect(image.with_suffix(".png"), kinds.REPEATED)


def add_turned(corpus: Corpus, number: int) -> None:
    """P22: an orientation with which the label map fits neither the stored nor the upright image."""
    image, label = corpus.add_pair(f"P22-turned-{number}", suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 2 + number % 7
    image.write_bytes(encode(draw_image(number), "JPEG", exif=exif))
    label.write_bytes(encode_labels(draw_labels(number, size=(40, 64))))
    corpus.expect(label, kinds.SIZES)


def add_manifest(corpus: Corpus) -> None:
    """P18: files that changed after the manifest was written, and some that are gone."""
    rotten = [corpus.add_pair(f"P18-rot-{number}", suffix=".jpg") for number in range(REPEATS)]
    notes = [corpus.root / f"notes-{number}.txt" for number in range(REPEATS)]
    paths = [path for pair in rotten for path in pair]
    paths += sorted((corpus.root / "val").iterdir())
    for path in notes:
        corpus.write(path, b"as prepared")
    entries = [describe(path, corpus.root) for path in [*paths, *notes]]
    entries += [{**entries[0], "path": f"train/gone-{number}.jpg"} for number in range(REPEATS)]
    (corpus.root / "camvid-manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
    for number, ((image, _), note) in enumerate(zip(rotten, notes, strict=True)):
        data = image.read_bytes()
        # within the coded pixels, where no decoder notices
        image.write_bytes(data[:-400] + bytes([data[-400] ^ 1]) + data[-399:])
        note.write_bytes(b"changed" if number % 2 else b"as Prepared")
        corpus.expect(image, kinds.HASH)
        corpus.expect(note, kinds.HASH)
        corpus.expect(corpus.root / f"train/gone-{number}.jpg", kinds.NOT_THERE)


def describe(path: Path, root: Path) -> dict[str, object]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return {"path": path.relative_to(root).as_posix(), "size": len(data), "sha256": digest, "archive": None}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return fill(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def report(corpus: Corpus) -> Report:
    return verify_named("camvid", corpus.root, splits=("train", "val"), num_workers=2)


# The corpus


def test_the_corpus_is_as_large_as_promised(corpus):
    assert len({re.sub(r"-\d+\..*", "", Path(path).name) for path in corpus.faults}) >= 34
    assert len(corpus.faults) >= 500
    assert corpus.num_files >= 500


def test_every_fault_is_reported_in_one_pass_and_nothing_else_is(corpus, report):
    found: dict[str, set[str]] = {}
    for problem in report.errors:
        found.setdefault(problem.path, set()).add(problem.code)
    missed = {path: code for path, code in corpus.faults.items() if code not in found.get(path, set())}
    assert not missed
    labels_look = {path for path, codes in found.items() if codes == {kinds.LABELS_LOOK.code}}
    assert set(found) - set(corpus.faults) <= labels_look
    assert all(codes == {corpus.faults[path]} for path, codes in found.items() if path in corpus.faults)
    assert report.exit_code == 1


def test_every_problem_says_where_why_and_what_to_do(report):
    assert report.problems
    for problem in report.problems:
        assert re.fullmatch(r"E-VERIFY-\d{3} \| [^|]+ \| [^|]+ \| fix: \w[^|]+", str(problem)), str(problem)
        assert "\n" not in str(problem)


def test_the_text_groups_problems_with_count_ten_files_and_fix(report):
    text = format_report(report)
    assert f"error {kinds.EMPTY.code}: empty file ({2 * REPEATS})\n" in text
    block = text.split(f"error {kinds.EMPTY.code}")[1].split("\n\n")[0]
    assert block.count(" | empty file") == 10
    assert f"and {2 * REPEATS - 10} more" in block
    assert "fix: fetch the file again" in block
    assert "Traceback" not in text
    assert f"{len(report.errors):,} errors" in text.splitlines()[-1]


def test_the_json_is_strict_and_holds_every_problem(report):
    content = json.loads(json.dumps(report.to_json(), allow_nan=False), parse_constant=pytest.fail)
    assert content["num_errors"] == len(report.errors) > 500
    assert len(content["problems"]) == len(report.problems)
    assert {"code", "level", "path", "reason", "fix", "split"} <= set(content["problems"][0])


def test_processes_find_what_one_finds_and_say_how_far_they_are(corpus, report):
    steps: list[tuple[int, int]] = []
    alone = verify_named(
        "camvid",
        corpus.root,
        splits=("train", "val"),
        num_workers=0,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert alone.to_json() == report.to_json()
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_what_training_refuses_is_listed(corpus, report):
    """Whatever `read_pair` cannot read has an error on one of its two files."""
    listed = {problem.path for problem in report.errors}
    num_refused = 0
    for image in sorted((corpus.root / "train").iterdir()):
        label = corpus.root / "trainannot" / f"{image.stem}.png"
        if "P31-huge" in image.name or "P31-large" in image.name:
            continue  # Pillow warns, and pytest makes that an error
        try:
            read_pair(
                image,
                label,
                label_map=CamVid.label_map,
                allowed=CamVid.label_values,
                taxonomy=CamVid.taxonomy,
            )
        except DataError:
            num_refused += 1
            assert {str(image), str(label)} & listed, image
    assert num_refused > 200


def test_opening_the_corpus_still_raises(corpus):
    with pytest.raises(DataError, match=r"E-DATA-023 .*given twice"):
        CamVid(corpus.root, "train")


# Clean data


@pytest.mark.parametrize(
    ("name", "folder"),
    [("camvid", "camvid"), ("voc", "voc_mini"), ("cityscapes", "cityscapes_mini"), ("ade20k", "ade20k_mini")],
)
def test_real_samples_raise_no_alarm(name, folder):
    root = REAL_DATA / folder
    if not root.is_dir():
        pytest.skip(f"no real samples at {root}; set NESTSEG_REAL_DATA to their folder")
    report = verify_named(name, root, num_workers=2)
    assert report.errors == ()
    # samples of a data set lack splits and classes; nothing else is said of them
    assert {problem.code for problem in report.warnings} <= {kinds.ABSENT_SPLIT.code, kinds.ABSENT_CLASS.code}
    assert report.exit_code == 0
    assert sum(split.num_samples for split in report.splits) >= 3


def test_toystreets_in_a_folder_raises_no_alarm(tmp_path):
    """The abstract door: samples and a rule, no class of a data set."""
    splits = []
    for split in ("train", "val"):
        scenes = ToyStreets(None, split, num_images=20)
        samples = []
        for index in range(len(scenes)):
            sample = scenes.read(index)
            image, label = tmp_path / f"{split}-{index}.jpg", tmp_path / f"{split}-{index}.png"
            Image.fromarray(sample.image).save(image, quality=95)
            Image.fromarray(sample.target).save(label)
            samples.append(SampleFiles(f"{split}-{index}", image, label))
        splits.append(Split(split, samples))
    rule = LabelRule(
        taxonomy=TOYSTREETS,
        values=frozenset({*range(8), 255}),
        label_map=np.where(np.arange(256) < 8, np.arange(256), 255).astype(np.uint8),
    )
    report = verify_dataset(splits, rule, root=tmp_path, num_workers=0)
    assert report.problems == ()


def test_toystreets_itself_has_nothing_to_verify():
    report = verify_named("toystreets", None)
    assert [problem.code for problem in report.problems] == [kinds.NO_FILES_AT_ALL.code]
    assert report.exit_code == 0


# Damage, everywhere in a file


def codes_of(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [problem.code for problem in check_picture(str(path), max_pixels=10**8).problems]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_found(tmp_path, progressive):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = encode(draw_image(1, size=(24, 24)), "JPEG", progressive=progressive, exif=exif)
    assert codes_of(tmp_path / "a.jpg", data) == []
    for length in range(len(data)):
        assert codes_of(tmp_path / "a.jpg", data[:length]), length
    # a tail of zeros may begin with the end marker; before it, it is found
    for length in range(len(data) - 2):
        assert codes_of(tmp_path / "a.jpg", data[:length].ljust(len(data), b"\0")), length


def test_a_jpeg_whose_thumbnail_alone_has_an_end_is_found(tmp_path):
    data = encode(draw_image(1), "JPEG")
    thumbnail = encode(draw_image(2, size=(16, 16)), "JPEG")
    segment = b"\xff\xe3" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = data[:2] + segment + data[2:]
    assert codes_of(tmp_path / "a.jpg", whole) == []
    assert codes_of(tmp_path / "a.jpg", whole[:-300]) == [kinds.CUT.code]


def test_a_png_part_without_a_proper_name_is_found(tmp_path):
    """Its checksum holds and its pixels load: Pillow's ``verify`` alone notices."""
    data, body = png(1), b"a\0c!" + bytes(4)
    part = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
    assert codes_of(tmp_path / "a.png", data[:-12] + part + data[-12:]) == [kinds.DAMAGED.code]


def test_fill_bytes_before_a_marker_are_no_fault(tmp_path):
    data = jpeg(1)
    assert codes_of(tmp_path / "a.jpg", data[:2] + b"\xff\xff" + data[2:]) == []


def test_bytes_after_the_end_of_a_jpeg_are_no_fault(tmp_path):
    """Phones append a second picture or a video."""
    assert codes_of(tmp_path / "a.jpg", jpeg(1) + jpeg(2)) == []
    assert codes_of(tmp_path / "a.jpg", jpeg(1) + bytes(100)) == []


def test_a_png_with_any_byte_changed_or_cut_anywhere_is_found(tmp_path):
    data = encode(draw_image(1, size=(9, 9)))
    assert codes_of(tmp_path / "a.png", data) == []
    for position in range(len(data)):
        assert codes_of(tmp_path / "a.png", flip(data, position)), position
        assert codes_of(tmp_path / "a.png", data[:position]), position


@given(
    content=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0"]),
)
@settings(max_examples=150, deadline=None)
def test_no_content_ends_in_a_traceback(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / "any-content"
    assert codes_of(path, start + content)


def test_all_bit_rot_is_found_with_a_manifest(tmp_path):
    """P18: 300 flips, of which a decoder notices few."""
    data = jpeg(1)
    expected = Expected(len(data), hashlib.sha256(data).digest())
    draw = np.random.default_rng(0)
    for position in draw.integers(0, len(data), 300).tolist():
        path = tmp_path / "a.jpg"
        path.write_bytes(flip(data, position))
        found = check_picture(str(path), max_pixels=10**8, expected=expected).problems
        assert kinds.HASH.code in {problem.code for problem in found}


def test_strict_decoder_finds_some_flips_of_a_jpeg_without_a_manifest_and_none_in_a_good_one(tmp_path):
    """P18 without a manifest."""
    data, path, found = jpeg(1), tmp_path / "a.jpg", 0
    path.write_bytes(data)
    assert check_picture(str(path), max_pixels=10**8).problems == ()
    for position in np.random.default_rng(0).integers(0, len(data), 300).tolist():
        path.write_bytes(flip(data, position))
        found += bool(check_picture(str(path), max_pixels=10**8).problems)
    assert found >= 60


# What is counted and said, without being an error


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    """A clean folder of four samples in each of two splits, in which every class occurs."""
    corpus = Corpus(tmp_path)
    for split in ("train", "val"):
        for index in range(4):
            _, label = corpus.add_pair(f"{split}-{index}", split=split)
            labels = draw_labels(index)
            labels[0, :11] = range(11)
            label.write_bytes(encode_labels(labels))
    return corpus


def verify(corpus: Corpus) -> Report:
    return verify_named("camvid", corpus.root, splits=("train", "val"), num_workers=0)


def of_kind(report: Report, kind: kinds.Kind) -> list[Problem]:
    return [problem for problem in report.problems if problem.code == kind.code]


def test_a_clean_folder_has_no_problems(small):
    assert verify(small).problems == ()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "grey"),
        ("LA", "grey with alpha"),
        ("RGBA", "RGBA"),
        ("1", "1-bit"),
        ("P", "palette"),
        ("CMYK", "CMYK"),
        ("I;16", "grey 16-bit"),
    ],
)
def test_other_kinds_of_images_are_counted_with_what_happens_to_them(small, mode, kind):
    """P20, P21."""
    image = Image.fromarray(np.full(SIZE, 999, np.uint16)) if mode == "I;16" else draw_image(5).convert(mode)
    path = small.root / "train/train-1.png"
    path.write_bytes(encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    report = verify(small)
    (problem,) = report.problems
    assert problem.code == kinds.IMAGE_KIND.code
    assert re.search(rf"^1 of {kind} samples, \w.*: .*train-1.png", problem.reason)
    assert report.splits[0].image_kinds == {"RGB": 3, kind: 1}
    assert report.exit_code == 0


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientations_are_counted_where_the_labels_fit(small, orientation):
    """P22: as stored, or upright by a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, label = small.root / "train/train-1.png", small.root / "trainannot/train-1.png"
    image.write_bytes(encode(draw_image(1), "JPEG", exif=exif))
    if orientation > 4:
        label.write_bytes(encode_labels(np.asarray(Image.open(label)).T.copy()))
    (problem,) = verify(small).problems
    assert problem.code == kinds.ORIENTATION.code
    assert f"({orientation}: 1)" in problem.reason


def test_tiny_images_are_counted(small):
    """P31."""
    for name, size in (("dot", (1, 1)), ("line", (1, 4000))):
        image, label = small.add_pair(name)
        image.write_bytes(encode(draw_image(1, size=size)))
        label.write_bytes(encode_labels(draw_labels(1, size=size)))
    (problem,) = verify(small).problems
    assert problem.code == kinds.TINY.code
    assert problem.reason.startswith("2 less than 16 pixels")


def test_limits_are_named_with_the_size_that_is_above_them(corpus, report):
    """P31."""
    reasons = {problem.reason for problem in of_kind(report, kinds.TOO_LARGE)}
    assert "10000x10000 = 100,000,000 pixels; allowed: 89,478,485 pixels; it was not decoded" in reasons
    assert any("900000000" in reason for reason in reasons)


def test_labels_that_are_ignored_as_a_whole_are_named(small):
    """P26."""
    label = small.root / "valannot/val-1.png"
    label.write_bytes(encode_labels(np.full(SIZE, 11, np.uint8)))
    (problem,) = verify(small).problems
    assert (problem.code, problem.path) == (kinds.ALL_IGNORED.code, str(label))


def test_classes_that_never_occur_or_cover_everything_are_named_with_a_table(small):
    """P26."""
    for label in (small.root / "trainannot").iterdir():
        label.write_bytes(encode_labels(np.full(SIZE, 3, np.uint8)))
    report = verify(small)
    (absent,) = of_kind(report, kinds.ABSENT_CLASS)
    assert "10 of 11 classes never occur: sky, building, pole, pavement" in absent.reason
    (dominant,) = of_kind(report, kinds.DOMINANT_CLASS)
    assert dominant.reason == "class road covers 100.000% of the labelled pixels"
    assert re.search(r"^road +100.000%", format_report(report), flags=re.MULTILINE)
    assert report.exit_code == 0


def test_an_image_in_training_and_evaluation_is_named(small):
    """P28."""
    shutil.copy(small.root / "train/train-2.png", small.root / "val/val-3.png")
    (problem,) = verify(small).problems
    assert (problem.code, problem.split) == (kinds.IN_TWO_SPLITS.code, "val")
    assert problem.path.endswith("val-3.png")
    assert "train-2.png of train" in problem.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("-rf", "starts with a dash"),
        ("trailing ", "starts or ends with blanks"),
        ("two\nlines", "control characters"),
        (unicodedata.normalize("NFD", "caf\u00e9"), "NFD"),
        (os.fsdecode(b"latin\xe9"), "not UTF-8"),
    ],
)
def test_odd_names_work_and_are_named(small, name, reason):
    """P29."""
    small.add_pair(name)
    report = verify(small)
    (problem,) = report.problems
    assert problem.code == kinds.ODD_NAME.code
    assert reason in problem.reason
    assert "\n" not in str(problem)
    json.dumps(report.to_json(), ensure_ascii=False).encode()
    format_report(report).encode()


def test_harmless_names_raise_nothing(small):
    """P29."""
    for name in ("a b", "\u00e4\u00f6 \u8857", "dots.in.name", "n" * 250):
        small.add_pair(name)
    assert verify(small).problems == ()


def test_names_that_clash_elsewhere_are_named(small):
    """P27."""
    small.add_pair("TRAIN-0")
    (problem,) = verify(small).problems
    assert problem.code == kinds.CLASHING_NAMES.code


def test_an_unreadable_file_is_named(tmp_path):
    """P30."""
    path = tmp_path / "closed.png"
    path.write_bytes(png(1))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        (problem,) = check_picture(str(path), max_pixels=10**8).problems
    finally:
        os.seteuid(user)
    assert (problem.code, problem.reason) == (kinds.UNREADABLE.code, "cannot be read: Permission denied")


def test_a_folder_that_is_not_a_data_set_is_an_error_for_every_split(tmp_path):
    report = verify_named("camvid", tmp_path, num_workers=0)
    assert [problem.code for problem in report.problems] == [kinds.LAYOUT.code] * 3
    assert report.exit_code == 1


def test_a_broken_manifest_is_named(small):
    (small.root / "camvid-manifest.json").write_text('{"files": [{"path": "a"}]}')
    (problem,) = verify(small).problems
    assert problem.code == kinds.MANIFEST.code


def test_a_manifest_that_holds_is_silent(small):
    files = [describe(path, small.root) for path in small.root.rglob("*.png")]
    (small.root / "camvid-manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert verify(small).problems == ()


# Layouts of the data sets


def make_voc(root: Path) -> Corpus:
    corpus = Corpus(root)
    for name in ("a", "b", "c"):
        corpus.write(root / f"JPEGImages/{name}.jpg", jpeg(ord(name)))
        corpus.write(root / f"SegmentationClass/{name}.png", encode_labels(draw_labels(ord(name), ids=20)))
    corpus.write(root / "ImageSets/Segmentation/train.txt", b"a\r\nb  \r\n")
    corpus.write(root / "ImageSets/Segmentation/val.txt", b"c\n\n")
    return corpus


def errors_of(name: str, root: Path) -> list[Problem]:
    return list(verify_named(name, root, num_workers=0).errors)


def test_windows_lines_and_trailing_blanks_in_lists_work(tmp_path):
    """P29."""
    make_voc(tmp_path)
    assert errors_of("voc", tmp_path) == []


def test_faults_of_lists_and_files_are_reported_together(tmp_path):
    """P27, P29: a bad list does not hide bad files."""
    corpus = make_voc(tmp_path)
    corpus.write(tmp_path / "ImageSets/Segmentation/train.txt", b"a\nb\na\ngone\nx.jpg y.png\n")
    corpus.write(tmp_path / "JPEGImages/b.jpg", b"")
    errors = errors_of("voc", tmp_path)
    assert {problem.code for problem in errors} == {kinds.LIST.code, kinds.NO_FILES.code, kinds.EMPTY.code}
    (listed,) = [problem for problem in errors if problem.code == kinds.LIST.code]
    assert "line 3: a is in line 1 already; line 5" in listed.reason


def test_a_list_without_its_label_maps_is_an_error_and_an_absent_split_is_none(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("a\n")
    (problem,) = errors_of("voc", tmp_path)
    assert (problem.code, problem.split) == (kinds.LAYOUT.code, "trainaug")
    assert "SegmentationClassAug" in problem.reason


def make_cityscapes(root: Path) -> None:
    for split, city in (("train", "aachen"), ("val", "ulm")):
        name = f"{city}_000000_000019"
        corpus = Corpus(root)
        corpus.write(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", png(len(city)))
        labels = encode_labels(draw_labels(len(city), ids=34))
        corpus.write(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", labels)


def test_cityscapes_needs_no_train_ids(tmp_path):
    """P12."""
    make_cityscapes(tmp_path)
    assert errors_of("cityscapes", tmp_path) == []


@pytest.mark.parametrize("folder", ["gtFine", "leftImg8bit"])
def test_half_of_cityscapes_names_the_other_archive(tmp_path, folder):
    """P13."""
    make_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / folder)
    errors = errors_of("cityscapes", tmp_path)
    assert [problem.fix for problem in errors] == [f"fetch what is missing: {folder}_trainvaltest.zip"] * 2


def test_half_of_a_split_is_an_error_although_another_split_is_whole(tmp_path):
    """P13."""
    make_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit/val")
    (problem,) = errors_of("cityscapes", tmp_path)
    assert (problem.code, problem.split) == (kinds.LAYOUT.code, "val")
    shutil.rmtree(tmp_path / "gtFine/val")
    assert errors_of("cityscapes", tmp_path) == []


def test_full_ade20k_is_recognised(tmp_path):
    """P14."""
    (tmp_path / "images/training/a/abbey").mkdir(parents=True)
    for problem in errors_of("ade20k", tmp_path):
        assert "the full ADE20K data set" in problem.reason
        assert "ADEChallengeData2016.zip" in problem.fix


# Processes


def test_a_worker_that_is_killed_costs_no_finding(corpus, report):
    killed = []

    def kill_one(done: int, total: int) -> None:
        if not killed and done > 100:
            child = multiprocessing.active_children()[0]
            child.kill()
            killed.append(child.pid)

    after = verify_named("camvid", corpus.root, splits=("train", "val"), num_workers=2, on_progress=kill_one)
    assert killed
    assert after.to_json() == report.to_json()


class Bomb(_Other):
    """A job that ends the process it arrives in."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (9,)


def test_a_file_that_ends_its_process_is_named():
    jobs = [(_Other("x", Expected(0, b"")),), (Bomb("bomb.png", Expected(0, b"")),), (_Other("y", Expected(0, b"")),)]
    found = [result for chunk in _work_in_parallel(list, iter(jobs), 1) for result in chunk]
    crashed = [problem for result in found for problem in getattr(result, "problems", ())]
    assert [(problem.code, problem.path) for problem in crashed] == [(kinds.CRASHED.code, "bomb.png")]
    assert len(found) == 3


@pytest.mark.slow
def test_memory_stays_bounded_for_a_hundred_thousand_files(tmp_path):
    """P34, F6: 50,000 pairs, one bad of each of three kinds, below 500 MB in the largest process."""
    corpus = Corpus(tmp_path)
    image, label = corpus.add_pair("0")
    for number in range(1, 50_000):
        os.link(image, image.with_name(f"{number}.png"))
        os.link(label, label.with_name(f"{number}.png"))
    bad = {"7": b"", "30000": b"<html>", "49999": png(1)[:-5]}
    for name, data in bad.items():
        path = image.with_name(f"{name}.png")
        path.unlink()
        path.write_bytes(data)
    script = (
        "import json, re, resource, sys\n"
        "from nestseg.data.verify import verify_named\n"
        "if __name__ == '__main__':\n"
        "    report = verify_named('camvid', sys.argv[1], num_workers=2)\n"
        # not ru_maxrss: in a child it starts at what the process that started it had, here pytest
        "    own = int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "    usage = [own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]\n"
        "    print(json.dumps([usage, sorted(problem.path for problem in report.errors)]))\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage, paths = json.loads(output)
    assert paths == sorted(str(image.with_name(f"{name}.png")) for name in bad)
    assert max(usage) < 500_000


def test_every_kind_has_its_own_code_and_a_title():
    assert len(KINDS) == sum(isinstance(value, kinds.Kind) for value in vars(kinds).values())
    assert all(re.fullmatch(r"E-VERIFY-\d{3}", code) for code in KINDS)
