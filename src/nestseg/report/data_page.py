"""The page of `nestseg data stats`: what a split holds, and pictures of its rarest classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nestseg.core.disk import replaced_file
from nestseg.core.taxonomy import Taxonomy
from nestseg.data.counts import SplitCounts, load_counts
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.stats import STRONG_IMBALANCE, SideStats, SplitStats, describe_split, find_rare_examples
from nestseg.report.html import (
    Bar,
    Column,
    Html,
    Section,
    Swatch,
    code,
    facts,
    figure,
    grid,
    notes,
    page,
    paragraph,
    subheading,
    table,
    write_page,
)
from nestseg.report.overlay import draw_overlay, put_side_by_side, shrink_sample

PAGE_FILE = "index.html"
STATS_FILE = "stats.json"

_LONGEST = 360


def write_data_report(
    dataset: SegmentationDataset,
    out: Path,
    *,
    split: str,
    num_workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SplitStats:
    """Write ``OUT/index.html`` and ``OUT/stats.json`` about a split.

    Args:
        dataset: The split.
        out: Folder to write to; it is made if there is none.
        split: Its name.
        num_workers: See `nestseg.data.counts.count_split`.
        on_progress: Called with the number of samples that are counted, and of all; not for a split that was counted
            before.

    Returns:
        What was found.

    Raises:
        DataError: E-DATA-092, if samples cannot be read.
        OSError: If something cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = load_counts(dataset, num_workers=num_workers, on_progress=on_progress)
    stats = describe_split(counts, dataset.taxonomy, split=split)
    with replaced_file(out / STATS_FILE) as temporary:
        temporary.write_text(stats.to_json(), encoding="utf-8")
    write_page(out / PAGE_FILE, build_data_page(stats, dataset, counts))
    return stats


def build_data_page(stats: SplitStats, dataset: SegmentationDataset, counts: SplitCounts) -> str:
    """Set the page about a split.

    Args:
        stats: What it holds.
        dataset: Where pictures come from.
        counts: Which pictures show which class.
    """
    sections = [
        Section("Overview", _overview(stats)),
        Section("Classes", _classes(stats)),
        Section("Sizes", _sizes(stats)),
        Section("Weights", _weights(stats)),
        Section("Rarest classes", _pictures(stats, dataset, counts)),
    ]
    lead = f"{stats.num_images:,} images, {len(stats.classes)} classes. Every pixel was counted."
    return page(f"{stats.dataset}: {stats.split}", lead=lead, sections=sections)


def format_summary(stats: SplitStats) -> str:
    """Word the headline and the warnings for a terminal."""
    return "\n".join([*(f"{what}: {value}" for what, value in _headline(stats)), *stats.warnings])


def _headline(stats: SplitStats) -> list[tuple[str, str]]:
    occurring = sum(one.pixels > 0 for one in stats.classes)
    pairs = [
        ("Images", f"{stats.num_images:,}"),
        ("Classes that occur", f"{occurring} of {len(stats.classes)}"),
        ("Labelled pixels", format_count(stats.labelled_pixels)),
        ("Ignored pixels", format_share(stats.ignored_share)),
    ]
    if stats.imbalance is not None:
        pairs.append(("Most to least frequent", f"{stats.imbalance.ratio:,.1f} : 1"))
    pairs.append(("Median size", f"{stats.heights.median:g} x {stats.widths.median:g}"))
    return pairs


def _overview(stats: SplitStats) -> list[Html]:
    parts = [facts(_headline(stats))]
    if stats.imbalance is not None and stats.imbalance.ratio < STRONG_IMBALANCE:  # else a warning says so
        most, least, ratio = stats.imbalance.most, stats.imbalance.least, stats.imbalance.ratio
        parts.append(paragraph(f"Worst imbalance: {most} has {ratio:,.1f} times the pixels of {least}."))
    parts.append(notes(stats.warnings) if stats.warnings else paragraph("Nothing stands out."))
    mean, std = (", ".join(f"{value:.2f}" for value in values) for values in (stats.channel_mean, stats.channel_std))
    parts.append(paragraph(f"Channel means {mean}; standard deviations {std}, over every pixel as stored."))
    return parts


def _classes(stats: SplitStats) -> list[Html]:
    columns = [
        Column("Class"),
        Column("Share of pixels", numeric=True),
        Column("Images", numeric=True),
        Column("Pixels", numeric=True),
        Column("Median frequency", numeric=True),
        Column("ENet", numeric=True),
    ]
    largest = max(one.share for one in stats.classes)
    order = sorted(enumerate(stats.classes), key=lambda pair: -pair[1].pixels)
    rows = [
        (
            Swatch(one.name, one.colour, str(train_id)),
            Bar(format_share(one.share), one.share / largest if largest else 0),
            Bar(f"{one.images:,}", one.images / stats.num_images),
            f"{one.pixels:,}",
            format_weight(one.median_frequency),
            format_weight(one.enet),
        )
        for train_id, one in order
    ]
    return [
        paragraph(
            "The most frequent class first; the number before a name is its train id. Bars of pixels are relative "
            "to the most frequent class, bars of images to all images."
        ),
        table("Pixels, images and weights of every class", columns, rows),
    ]


def _sizes(stats: SplitStats) -> list[Html]:
    columns = [Column("Height x width"), Column("Images", numeric=True)]
    rows = [
        (f"{one.height} x {one.width}", Bar(f"{one.images:,}", one.images / stats.num_images))
        for one in stats.common_sizes
    ]
    if stats.num_sizes == 1:
        (only,) = stats.common_sizes
        return [paragraph(f"All images are {only.height} pixels high and {only.width} wide.")]
    shown = (
        "All sizes" if len(rows) == stats.num_sizes else f"The {len(rows)} most frequent of {stats.num_sizes:,} sizes"
    )
    tables = [
        _side_table("Heights", stats.heights, stats.num_images),
        _side_table("Widths", stats.widths, stats.num_images),
        table(shown, columns, rows),
    ]
    return [grid(tables)]


def _side_table(name: str, sides: SideStats, num_images: int) -> Html:
    rows = [
        (
            str(one.low) if one.low == one.high else f"{one.low} to {one.high}",
            Bar(f"{one.images:,}", one.images / num_images),
        )
        for one in sides.histogram
    ]
    caption = f"{name}: smallest {sides.minimum}, median {sides.median:g}, largest {sides.maximum} pixels"
    return table(caption, [Column("Pixels"), Column("Images", numeric=True)], rows)


def _weights(stats: SplitStats) -> list[Html]:
    if not stats.labelled_pixels:
        return [paragraph("Nothing is labelled, so there are no weights.")]
    numbers = ", ".join(format_weight(one.median_frequency) for one in stats.classes)
    return [
        paragraph(
            "Two ways against imbalance, both fields of a recipe. Try without first: weights raise the recall of rare "
            "classes and cost precision. Weights by name are computed from the split that is trained on and written "
            "as numbers into RUN/recipe.yaml."
        ),
        code(
            "# class weights in the loss: median_frequency, enet, or one number a class\n"
            "loss:\n"
            "  class_weights: median_frequency\n"
            "\n"
            "# or: images with rare classes more often\n"
            "data:\n"
            "  rare_class_sampling: {temperature: 0.01, min_pixels: 3000, tries: 10}\n",
            label="Fields of a recipe",
        ),
        paragraph("The same weights as numbers, in train-id order:"),
        code(f"--set 'loss.class_weights=[{numbers}]'", label="Median frequency weights as numbers"),
    ]


def _pictures(stats: SplitStats, dataset: SegmentationDataset, counts: SplitCounts) -> list[Html]:
    taxonomy = dataset.taxonomy
    parts = [
        paragraph(
            "Images that show the rarest classes best: as they are, and with the labels on top. The class that an "
            "image was chosen for is drawn strongly, ignored pixels are striped."
        )
    ]
    examples = find_rare_examples(counts)
    if not examples:
        return [paragraph("No image has a labelled pixel.")]
    for train_id in dict.fromkeys(example.train_id for example in examples):
        one = stats.classes[train_id]
        count = f"{one.images:,} image{'' if one.images == 1 else 's'}"
        parts.append(subheading(f"{one.name}: {format_share(one.share)} of the pixels, in {count}"))
        parts.append(
            grid(
                _picture(dataset, taxonomy, example.sample_index, train_id, example.pixels)
                for example in examples
                if example.train_id == train_id
            )
        )
    return parts


def _picture(dataset: SegmentationDataset, taxonomy: Taxonomy, index: int, train_id: int, pixels: int) -> Html:
    sample = dataset.read(index)
    share = format_share(pixels / sample.target.size)
    small = shrink_sample(sample, _LONGEST)
    both = put_side_by_side(small.image, draw_overlay(small, taxonomy, highlight=train_id))
    name = dataset.name(index)
    class_name = taxonomy.classes[train_id]
    return figure(both, caption=f"{name}: {share} of it", alt=f"{name} beside its labels, {class_name} drawn strongly")


def format_share(share: float) -> str:
    """Word a share of a whole with three digits that matter.

    Example:
        >>> format_share(0.25), format_share(0.00012345), format_share(0)
        ('25.0 %', '0.0123 %', '0 %')
    """
    if not share:
        return "0 %"
    percent = 100 * share
    decimals = 1 if percent >= 10 else 2 if percent >= 1 else 3 if percent >= 0.1 else 4
    return f"{percent:.{decimals}f} %" if percent >= 0.0001 else "< 0.0001 %"


def format_count(count: int) -> str:
    """Word a large number.

    Example:
        >>> format_count(999), format_count(58_000_000), format_count(7_100_000_000)
        ('999', '58.0 million', '7.1 billion')
    """
    if count >= 10**9:
        return f"{count / 10**9:.1f} billion"
    return f"{count / 10**6:.1f} million" if count >= 10**6 else f"{count:,}"


def format_weight(weight: float | None) -> str:
    """Word a class weight; a dash for none.

    Example:
        >>> format_weight(0.149106), format_weight(None)
        ('0.149106', '-')
    """
    return "-" if weight is None else f"{weight:.6g}"
