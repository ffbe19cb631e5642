"""Pictures larger than memory: what they cost, and what becomes of damage, kills and full disks (D4, D5, D6, F9, P31).

Memory is measured in a process of its own, which predicts a small picture first: what torch and the network take is
there by then, and only what the large picture adds is counted.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.core.large_image import open_windows
from nestseg.core.resize import Window
from nestseg.core.taxonomy import Taxonomy
from nestseg.engine.predict import predict_files
from nestseg.inference.modes import MultiScale, Slide
from nestseg.inference.predictor import Predictor

GIB = 2**30
TILE = 512
TAXONOMY = Taxonomy(name="toy", classes=("dark", "red", "green"), palette=((0, 0, 0), (255, 0, 0), (0, 200, 0)))

PROGRAM = """
import json, re, sys, time
from pathlib import Path
import numpy as np, torch
from nestseg.core.taxonomy import Taxonomy
from nestseg.engine.predict import predict_files
from nestseg.inference.modes import Slide
from nestseg.inference.predictor import Predictor

def brightest_channel(image):
    return torch.stack([torch.full(image[:, 0].shape, 50.0), image[:, 0].float(), image[:, 1].float()], 1)

torch.set_num_threads(1)
picture, out, blend, large_pixels = sys.argv[1:]
taxonomy = Taxonomy(name="toy", classes=("dark", "red", "green"), palette=((0, 0, 0), (255, 0, 0), (0, 200, 0)))
predictor = Predictor(brightest_channel, taxonomy, mode=Slide(window=(512, 512), blend=blend))
predictor.predict(np.zeros((600, 600, 3), np.uint8))
status = lambda name: 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
# sets the peak to what is held now; ru_maxrss would begin with the peak of the process that started this one
Path("/proc/self/clear_refs").write_text("5")
before, start = status("VmRSS"), time.monotonic()
note = lambda line: print(line, file=sys.stderr, flush=True)
result = predict_files(predictor, [Path(picture)], out=Path(out), large_pixels=int(large_pixels), on_note=note)
failed = [str(error) for error in result.failed]
print(json.dumps({"added": status("VmHWM") - before, "seconds": time.monotonic() - start, "failed": failed}))
"""


def brightest_channel(image: torch.Tensor) -> torch.Tensor:
    """Class 1 where red is brightest, 2 where green is, else 0."""
    image = image.float()
    return torch.stack([torch.full_like(image[:, 0], 50), image[:, 0], image[:, 1]], 1)


def class_of_tile(row: int, column: int) -> int:
    return (row + 2 * column) % 3


def write_tiled(path: Path, side: int) -> None:
    """Write a square RGB picture whose tiles have the colours of the three classes."""
    colours = [np.broadcast_to(np.array(colour, np.uint8), (TILE, TILE, 3)) for colour in TAXONOMY.palette]
    count = -(-side // TILE)
    tiles = (colours[class_of_tile(row, column)] for row in range(count) for column in range(count))
    tifffile.imwrite(
        path,
        tiles,
        shape=(side, side, 3),
        dtype="uint8",
        tile=(TILE, TILE),
        photometric="rgb",
        compression="zlib",
        compressionargs={"level": 1},
    )


def assert_labels_of_tiles(path: Path, side: int) -> None:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert page.shape == (side, side)
        assert page.tile == (TILE, TILE)
        count = 0
        for tile, (_, _, y, x, _), _ in page.segments():
            inside = tile[0, : side - y, : side - x, 0]
            assert (inside == class_of_tile(y // TILE, x // TILE)).all(), (y, x)
            count += 1
        assert count == (-(-side // TILE)) ** 2


def predict_in_a_process(picture: Path, out: Path, *, blend: str, large_pixels: int) -> dict[str, float]:
    command = [sys.executable, "-c", PROGRAM, str(picture), str(out), blend, str(large_pixels)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["failed"] == []
    assert f"{blend} blending" in done.stderr
    return figures


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("huge") / "huge.tif"
    write_tiled(path, 20_000)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("blend", ["flat", "linear", "hann"])
def test_d6_f9_20000_by_20000_pixels_are_labelled_inside_model_plus_1_gib(huge, tmp_path, note_figure, blend):
    figures = predict_in_a_process(huge, tmp_path, blend=blend, large_pixels=64_000_000)
    note_figure("F9", blend=blend, added_bytes=figures["added"], seconds=figures["seconds"])
    assert figures["added"] < GIB
    assert_labels_of_tiles(tmp_path / "huge.tif", 20_000)
    with Image.open(tmp_path / "huge_overlay.png") as overlay:
        assert overlay.size == (2000, 2000)


def test_d6_4000_by_4000_pixels_cost_a_band_of_windows(tmp_path):
    write_tiled(tmp_path / "large.tif", 4000)
    figures = predict_in_a_process(tmp_path / "large.tif", tmp_path / "out", blend="hann", large_pixels=1_000_000)
    # a band of scores is 512 * 4000 * 3 * 4 bytes = 25 MB; whole, they would be 192 MB and the picture 48 MB
    assert figures["added"] < 150e6
    assert_labels_of_tiles(tmp_path / "out" / "large.tif", 4000)


def small_predictor(**options: object) -> Predictor:
    return Predictor(brightest_channel, TAXONOMY, **options)


def test_d6_labels_of_a_large_picture_are_those_of_the_small_path(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    tifffile.imwrite(tmp_path / "tiff.tif", image, photometric="rgb", tile=(128, 256), compression="zlib")
    np.save(tmp_path / "rows.npy", image)
    Image.fromarray(image).save(tmp_path / "png.png")
    files = [tmp_path / "tiff.tif", tmp_path / "rows.npy", tmp_path / "png.png"]
    notes: list[str] = []
    predictor = small_predictor(base_size=(64, 128))
    expected = small_predictor().predict(image)
    result = predict_files(predictor, files, out=tmp_path / "out", large_pixels=600_000, on_note=notes.append)
    assert result.failed == []
    assert [file.name for file in result.written] == ["tiff.tif", "rows.tif", "png.png"]
    for file in result.written:
        with Image.open(file) as labels:
            assert np.array_equal(np.asarray(labels), expected.labels)
        with Image.open(file.with_name(f"{file.stem}_overlay.png")) as overlay:
            assert np.array_equal(np.asarray(overlay), expected.overlay(image))
    assert (
        "700x900 pixels, labelled at its own resolution, not resized to (64, 128): single scale, windows 512x512"
        in notes[0]
    )
    assert notes[1] == f"{files[0]}: 20 % of its rows are labelled"
    assert len([note for note in notes if note.endswith(" 100 % of its rows are labelled")]) == 3
    again = predict_files(predictor, files, out=tmp_path / "out", large_pixels=600_000)
    assert again.skipped == files
    # at the threshold a picture is small
    assert predict_files(predictor, files[:1], out=tmp_path / "small", large_pixels=630_000).written[0].suffix == ".png"


def test_d6_overview_is_the_mean_of_squares_and_a_label_inside_each(tmp_path):
    image = np.zeros((4100, 30, 3), np.uint8)
    image[:2050, :, 0] = 255
    image[2050:, :, 1] = 200
    np.save(tmp_path / "tall.npy", image)
    result = predict_files(small_predictor(), [tmp_path / "tall.npy"], out=tmp_path / "out", large_pixels=1)
    assert result.failed == []
    with Image.open(tmp_path / "out" / "tall_overlay.png") as file:
        overlay = np.asarray(file)
    assert overlay.shape == (1367, 10, 3)  # thirds: 4100 rows are more than 2 * 2048
    assert (overlay[:683] == (255, 0, 0)).all()
    # rows 2049, 2050 and 2051: a third red, and the label of the middle, green
    assert (overlay[683] == ((85 + 0) / 2 // 1, (133 + 200) // 2, 0)).all()
    assert (overlay[684:] == (0, 200, 0)).all()


def test_d6_the_predictors_own_windows_and_whatever_is_inside_are_kept(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    np.save(tmp_path / "a.npy", image)
    for mode, words in [
        (Slide(window=(32, 48), blend="linear"), "windows 32x48 every 22x32 with linear blending"),
        (MultiScale(flip=True), "windows 512x512 every 342x342 with flat blending, in each"),
    ]:
        notes: list[str] = []
        predictor = small_predictor(mode=mode)
        predict_files(
            predictor, [tmp_path / "a.npy"], out=tmp_path / "out", large_pixels=1, overwrite=True, on_note=notes.append
        )
        assert words in notes[0]
        with Image.open(tmp_path / "out" / "a.tif") as labels:
            assert np.array_equal(np.asarray(labels), predictor.predict(image).labels)


def test_p31_picture_above_the_cap_is_named_and_stops_no_other(tmp_path):
    Image.new("RGB", (60, 50)).save(tmp_path / "large.png")
    Image.new("RGB", (6, 5)).save(tmp_path / "small.png")
    result = predict_files(small_predictor(), [tmp_path], out=tmp_path / "out", large_pixels=100, max_pixels=2999)
    assert [file.name for file in result.written] == ["small.png"]
    assert [(error.code, error.path) for error in result.failed] == [("E-DATA-100", tmp_path / "large.png")]
    assert not (tmp_path / "out" / "large.png").exists()


def test_damage_in_a_late_tile_leaves_no_label_file_and_stops_no_other(tmp_path):
    for name in ("bad", "good"):
        write_tiled(tmp_path / f"{name}.tif", 1500)
    data = bytearray((tmp_path / "bad.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "bad.tif") as file:
        start, count = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    data[start : start + count] = bytes(count)
    (tmp_path / "bad.tif").write_bytes(data)
    with open_windows(tmp_path / "bad.tif") as source:
        assert source.read(Window(0, 0, 1024, 1500)).shape == (1024, 1500, 3)
    result = predict_files(small_predictor(), [tmp_path], out=tmp_path / "out", large_pixels=1_000_000)
    assert [(error.code, error.path) for error in result.failed] == [("E-DATA-012", str(tmp_path / "bad.tif"))]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["good.tif", "good_overlay.png"]


def read_or_refuse(path: Path) -> np.ndarray | DataError:
    """Read all of a picture, or its top left corner if it claims to be larger than it was."""
    try:
        with open_windows(path) as source:
            height, width = source.size
            return source.read(Window(0, 0, min(height, 33), min(width, 40)))
    except DataError as error:
        return error


@pytest.mark.parametrize(
    "options", [{"tile": (16, 16), "compression": "zlib"}, {}, {"rowsperstrip": 4, "compression": "zlib"}], ids=str
)
def test_tiff_and_npy_cut_at_any_place_are_named_or_read(tmp_path, options):
    image = np.random.default_rng(0).integers(0, 256, (33, 40, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", **options)
    np.save(tmp_path / "a.npy", image)
    for path in (tmp_path / "a.tif", tmp_path / "a.npy"):
        whole = path.read_bytes()
        for end in range(0, len(whole), 41):
            path.write_bytes(whole[:end])
            found = read_or_refuse(path)
            if isinstance(found, DataError):
                assert str(found.path) == str(path)
            else:
                assert np.array_equal(found, image)
                assert path.suffix == ".tif", "an npy file has no byte to spare"


def test_tiff_with_a_changed_byte_is_named_or_read(tmp_path, caplog):
    image = np.random.default_rng(0).integers(0, 256, (33, 40, 3), np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(16, 16), compression="zlib", metadata=None)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    with tifffile.TiffFile(path) as file:
        first = file.pages[0].dataoffsets[0]
    found = []
    for place in [*range(first), *rng.integers(first, len(whole), 60)]:
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        found.append(read_or_refuse(path))
    # zlib has a checksum, so that changed pixels cannot pass; fields of the header that do not matter may change
    assert all(isinstance(result, DataError) for result in found[-60:])
    assert any(not isinstance(result, DataError) for result in found[:-60])


@pytest.fixture
def limited_files() -> Iterator[None]:
    """Writes beyond 3,000 bytes of a file fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", ["npy", "png"])
def test_d5_full_disk_stops_with_the_output_named_and_the_old_file_kept(tmp_path, suffix, request):
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    source = tmp_path / f"a.{suffix}"
    np.save(source, image) if suffix == "npy" else Image.fromarray(image).save(source)
    target = tmp_path / "out" / ("a.tif" if suffix == "npy" else "a.png")
    target.parent.mkdir()
    target.write_bytes(b"old")
    request.getfixturevalue("limited_files")
    with pytest.raises(DataError, match="E-DATA-018") as caught:
        predict_files(small_predictor(), [source], out=target.parent, large_pixels=1, overwrite=True)
    assert Path(str(caught.value.path)).parent == target.parent
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_d4_kill_leaves_no_label_file_and_the_next_call_starts_anew(tmp_path):
    write_tiled(tmp_path / "large.tif", 2000)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "large.tif"), str(tmp_path / "out"), "flat", "1000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "% of its rows" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not list((tmp_path / "out").iterdir()):
        time.sleep(0.05)
    assert all(file.name.startswith(".tmp-") for file in (tmp_path / "out").iterdir())
    result = predict_files(small_predictor(), [tmp_path / "large.tif"], out=tmp_path / "out", large_pixels=1000)
    assert [file.name for file in result.written] == ["large.tif"]
    assert_labels_of_tiles(tmp_path / "out" / "large.tif", 2000)


def test_d3_label_file_would_replace_its_own_large_picture(tmp_path):
    write_tiled(tmp_path / "large.tif", 600)
    with pytest.raises(DataError, match="E-DATA-055"):
        predict_files(small_predictor(), [tmp_path / "large.tif"], out=tmp_path, large_pixels=1000, overwrite=True)


def test_zarr_folder_is_a_picture_small_or_large(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    zarr.create_array(str(tmp_path / "a.zarr"), shape=image.shape, chunks=(16, 16, 3), dtype="uint8")[:] = image
    for large_pixels, name in [(6300, "a.png"), (6299, "a.tif")]:
        result = predict_files(
            small_predictor(), [tmp_path / "a.zarr"], out=tmp_path / "out", large_pixels=large_pixels, overwrite=True
        )
        assert [file.name for file in result.written] == [name]
        with Image.open(result.written[0]) as labels:
            assert np.array_equal(np.asarray(labels), small_predictor().predict(image).labels)
