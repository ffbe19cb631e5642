"""Parts of a report: one HTML file without scripts, styles or pictures from elsewhere.

Every part takes plain text and escapes it; only what a part returned goes into another as it is, which the type `Html`
makes sure of. Colours follow the reader's light or dark setting, wide tables scroll by themselves, and everything is
reached by keyboard. The page forbids itself every request, and every script but the one it was made with.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NewType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nestseg.core.disk import replaced_file
from nestseg.core.taxonomy import Colour
from nestseg.version import __version__

Html = NewType("Html", str)
"""Markup that is safe to put into a page."""

_JPEG_QUALITY = 85


class Column(NamedTuple):
    """A column of a table; numbers stand on the right."""

    title: str
    numeric: bool = False


class Bar(NamedTuple):
    """A cell with a bar under its text."""

    text: str
    share: float
    """Length of the bar, 0 to 1."""


class Swatch(NamedTuple):
    """A cell that names a class and shows its colour."""

    name: str
    colour: Colour
    note: str = ""
    """Something short before the name, such as the train id."""


class Links(NamedTuple):
    """A cell of links to places of the same page."""

    pairs: Sequence[tuple[str, str]]
    """(text, id of the place)."""


Cell = str | Bar | Swatch | Links


class Section(NamedTuple):
    """A part of a page with a heading, reached from the top of the page."""

    title: str
    parts: Sequence[Html]


def escape(text: str) -> Html:
    """Turn text into markup that shows exactly that text; also fit for an attribute in double quotes.

    Example:
        >>> escape('<b> & "c"')
        '&lt;b&gt; &amp; &quot;c&quot;'
    """
    return Html(html.escape(text, quote=True))


def join(parts: Iterable[Html]) -> Html:
    """Put parts after each other."""
    return Html("\n".join(parts))


def paragraph(text: str) -> Html:
    """Set a paragraph."""
    return Html(f"<p>{escape(text)}</p>")


def subheading(text: str) -> Html:
    """Set a heading inside a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Set the headline numbers: (what it is, the number)."""
    tiles = join(Html(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>") for what, value in pairs)
    return Html(f'<dl class="facts">{tiles}</dl>')


def notes(lines: Iterable[str]) -> Html:
    """Set a list of warnings."""
    items = join(Html(f"<li>{escape(line)}</li>") for line in lines)
    return Html(f'<ul class="notes">{items}</ul>')


def code(text: str, *, label: str) -> Html:
    """Set text to be copied, line by line as it is.

    Args:
        text: The lines.
        label: What they are, read out to those who do not see the page.
    """
    return Html(f'<pre tabindex="0" role="region" aria-label="{escape(label)}"><code>{escape(text)}</code></pre>')


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    *,
    row_attributes: Sequence[str] | None = None,
    sortable: bool = False,
) -> Html:
    """Set a table; the first column holds the headings of its rows.

    Args:
        caption: What it shows.
        columns: Their titles.
        rows: As many cells each as there are columns.
        row_attributes: Markup inside the opening tag of each row, for the page's script.
        sortable: Mark it for a script that sorts.
    """
    heads = join(Html(f'<th scope="col"{_numeric(column)}>{escape(column.title)}</th>') for column in columns)
    lines = [
        join(_cell(cell, column, first=column is columns[0]) for cell, column in zip(row, columns, strict=True))
        for row in rows
    ]
    attributes = [f" {one}" for one in row_attributes] if row_attributes is not None else [""] * len(lines)
    body = join(Html(f"<tr{one}>{line}</tr>") for one, line in zip(attributes, lines, strict=True))
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table{' data-sortable' if sortable else ''}>"
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _numeric(column: Column) -> str:
    return ' class="n"' if column.numeric else ""


def _cell(cell: Cell, column: Column, *, first: bool) -> Html:
    match cell:
        case Swatch():
            content = _swatch(cell)
        case Bar(text, share):
            # whatever is not nothing shows
            width = f"max(1px,{100 * min(1.0, share):.2f}%)" if share > 0 else "0"
            content = Html(f'{escape(text)}<span class="bar"><span style="width:{width}"></span></span>')
        case Links(pairs):
            content = Html(" ".join(f'<a href="#{escape(place)}">{escape(text)}</a>' for text, place in pairs))
        case str():
            content = escape(cell)
    return Html(f'<th scope="row">{content}</th>' if first else f"<td{_numeric(column)}>{content}</td>")


def legend(swatches: Iterable[Swatch]) -> Html:
    """Set names with their colours, as many in a row as fit."""
    return Html(f'<ul class="legend">{join(Html(f"<li>{_swatch(swatch)}</li>") for swatch in swatches)}</ul>')


def _swatch(swatch: Swatch) -> Html:
    paint = "#{:02x}{:02x}{:02x}".format(*swatch.colour)
    note = f"<small>{escape(swatch.note)}</small>" if swatch.note else ""
    name = f"<span>{escape(swatch.name)}</span>"
    return Html(f'<span class="swatch"><i style="background:{paint}"></i>{note}{name}</span>')


def figure(image: NDArray[np.uint8], *, caption: str, alt: str) -> Html:
    """Set a picture, which becomes part of the page.

    Args:
        image: The picture.
        caption: The text under it.
        alt: What it shows, read out to those who do not see it.

    Shape:
        - image: (H, W, 3) uint8 RGB
    """
    height, width = image.shape[:2]
    return Html(
        f'<figure><img src="{image_uri(image)}" width="{width}" height="{height}" alt="{escape(alt)}" loading="lazy">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def details(summary: str, parts: Iterable[Html], *, opened: bool = False) -> Html:
    """Set parts that the reader folds away and opens again.

    Args:
        summary: The line that stays.
        parts: What is folded.
        opened: Whether it is open at first.
    """
    state = " open" if opened else ""
    return Html(f"<details{state}><summary>{escape(summary)}</summary>{join(parts)}</details>")


def grid(parts: Iterable[Html]) -> Html:
    """Set figures or tables side by side, as many as fit."""
    return Html(f'<div class="grid">{join(Html(f"<div>{part}</div>") for part in parts)}</div>')


def image_uri(image: NDArray[np.uint8], *, drawn: bool = False) -> str:
    """Encode a picture as the address of itself, a data URI.

    Args:
        image: The picture.
        drawn: Whether it is made of few flat colours, which PNG keeps exactly and smaller than JPEG would.

    Shape:
        - image: (H, W, 3) uint8 RGB
    """
    encoded = io.BytesIO()
    if drawn:
        Image.fromarray(image).save(encoded, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/{'png' if drawn else 'jpeg'};base64," + base64.b64encode(encoded.getbuffer()).decode("ascii")


def page(
    title: str,
    *,
    lead: str,
    sections: Sequence[Section],
    toolbar: Html | None = None,
    style: str = "",
    script: str = "",
) -> str:
    """Put sections together to a whole page.

    Args:
        title: Its heading, and its name in a browser's tab.
        lead: One sentence under the heading.
        sections: In order.
        toolbar: What stays in view above the sections.
        style: CSS of this page beside that of all pages.
        script: JavaScript that runs once the page is there; the page's policy names its hash and allows no other.

    Raises:
        ValueError: If the script or style would end before its end.
    """
    if "</" in script or "</" in style:
        raise ValueError('"</" in a script or style; write "<\\/"')
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy += f"; script-src 'sha256-{digest}'" if script else ""
    links = join(
        Html(f'<li><a href="#part-{place}">{escape(section.title)}</a></li>')
        for place, section in enumerate(sections, start=1)
    )
    body = join(
        Html(
            f'<section id="part-{place}" aria-labelledby="title-{place}"><h2 id="title-{place}">'
            f"{escape(section.title)}</h2>{join(section.parts)}</section>"
        )
        for place, section in enumerate(sections, start=1)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(title)}</h1><p>{escape(lead)}</p><nav aria-label="Sections"><ul>{links}</ul></nav></header>
{toolbar or ""}<main id="content" tabindex="-1">
{body}
</main>
<footer>nestseg {escape(__version__)}</footer>
{f"<script>{script}</script>" if script else ""}</body>
</html>
"""


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


_STYLE = """
:root {
  --ink: #1c2126; --soft: #59636e; --paper: #ffffff; --panel: #f4f6f8; --line: #d8dee4;
  --bar: #3f7fbf; --link: #0b5cad; --warn: #8a5300; --warn-paper: #fff6e5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e8ed; --soft: #9aa6b2; --paper: #14181c; --panel: #1e2429; --line: #343d46;
    --bar: #4f93d6; --link: #7db8f0; --warn: #f0c069; --warn-paper: #2c2413;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 3rem; max-width: 76rem;
  color: var(--ink); background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2rem 0 0.75rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.5rem 0 0.5rem; font-size: 1rem; }
p { margin: 0.5rem 0; max-width: 70ch; }
header p, footer, figcaption, caption, dt, small { color: var(--soft); }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--bar); outline-offset: 2px; }
main:focus { outline: none; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: 0.5rem; padding: 0.25rem 0.75rem; background: var(--paper); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0.75rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.25rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 0.75rem; margin: 1rem 0; }
.facts div { padding: 0.75rem 1rem; background: var(--panel); border-radius: 0.5rem; }
dt { font-size: 0.875rem; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.notes { margin: 1rem 0; padding: 0.75rem 1rem 0.75rem 2.25rem; background: var(--warn-paper); color: var(--warn);
  border-left: 4px solid currentColor; border-radius: 0.25rem; }
.notes li + li { margin-top: 0.5rem; }
.scroll { max-height: min(44rem, 85vh); margin: 0.75rem 0; overflow: auto;
  border: 1px solid var(--line); border-radius: 0.5rem; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: 0.9375rem; overflow-wrap: break-word; }
caption { padding: 0.5rem 0.75rem; text-align: left; font-size: 0.875rem; }
th, td { padding: 0.4rem 0.75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; z-index: 2; background: var(--panel); border-top: 0; font-size: 0.875rem; }
tbody th { position: sticky; left: 0; z-index: 1; min-width: 8rem; background: var(--paper); font-weight: 500; }
thead th:first-child { left: 0; z-index: 3; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.swatch { display: flex; gap: 0.4em; align-items: baseline; max-width: max(12rem, 45vw); }
.swatch span { min-width: 0; }
.swatch i { flex: none; width: 0.85em; height: 0.85em; border: 1px solid var(--soft); border-radius: 0.2em; }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); gap: 0.4rem 1rem;
  margin: 0.75rem 0; padding: 0; list-style: none; }
.bar { display: block; min-width: 5rem; height: 0.3rem; margin-top: 0.2rem; overflow: hidden; text-align: left;
  background: var(--line); border-radius: 1rem; }
.bar span { display: block; height: 100%; background: var(--bar); border-radius: 1rem; }
pre { margin: 0.75rem 0; padding: 0.75rem 1rem; overflow-x: auto; background: var(--panel); border-radius: 0.5rem;
  font-size: 0.875rem; overflow-wrap: normal; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  align-items: start; margin: 0.75rem 0; }
.grid .scroll { margin: 0; }
summary { padding: 0.25rem 0; cursor: pointer; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 0.25rem; background: var(--panel); }
figcaption { margin-top: 0.25rem; font-size: 0.875rem; }
footer { margin-top: 3rem; font-size: 0.875rem; }
@media (max-width: 40rem) {
  body { padding-top: 1rem; }
  h1 { font-size: 1.4rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: 0.5rem; }
  .facts div { padding: 0.5rem 0.75rem; }
  dd { font-size: 1.0625rem; }
  th, td { padding: 0.4rem 0.5rem; }
}
@media print { .scroll { max-height: none; } nav, .skip { display: none; } }
"""
