"""What moves in the page of an evaluation: the class filter, the confusion matrix, tables that sort.

The page is whole without it. The script asks nothing of a network, and runs under the page's policy by its hash.
"""

from __future__ import annotations

STYLE = """
html { scroll-padding-top: 3.5rem; }
:root { --heat: #08306b; --on-heat: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --heat: #9ecbff; --on-heat: #0d1216; } }
.filter { position: sticky; top: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: 0.25rem 0.75rem;
  align-items: center; padding: 0.5rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.filter output { color: var(--soft); font-size: 0.875rem; }
.filter input { flex: 0 1 14rem; min-width: 6rem; width: 6rem; }
.filter + main > section:first-child h2 { margin-top: 0; border-top: 0; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
td a { display: inline-block; padding: 0 0.35rem; }
.facts-table td { overflow-wrap: anywhere; }
input, button { padding: 0.3rem 0.6rem; color: inherit; background: var(--panel); border: 1px solid var(--soft);
  border-radius: 0.375rem; font: inherit; }
button { cursor: pointer; }
thead th button { padding: 0; background: none; border: 0; font-weight: inherit; text-align: inherit; }
thead th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
thead th.n { min-width: 5rem; white-space: normal; }
.next { padding-left: 1.75rem; max-width: 80ch; }
.next li + li { margin-top: 0.5rem; }
.matrix { width: fit-content; max-width: 100%; }
.matrix table { width: auto; font-size: 0.8125rem; }
.matrix td { min-width: 2.2rem; padding: 0.3rem; text-align: center; vertical-align: middle;
  font-variant-numeric: tabular-nums; border-left: 1px solid var(--line);
  background: color-mix(in srgb, var(--heat) calc(var(--heat-share, 0) * 1%), var(--paper)); }
.matrix td[data-strong] { color: var(--on-heat); }
.matrix td[data-pair] { cursor: pointer; }
.matrix td[aria-selected=true] { box-shadow: inset 0 0 0 3px var(--warn), inset 0 0 0 5px var(--paper); }
.matrix td:focus-visible { outline-offset: -3px; }
.matrix thead th { max-width: 2.2rem; padding: 0.4rem 0.2rem; vertical-align: bottom; }
.matrix thead th:first-child { max-width: none; vertical-align: bottom; }
.matrix thead span { max-height: 9rem; margin: 0 auto; overflow: hidden; writing-mode: vertical-rl;
  transform: rotate(180deg); text-overflow: ellipsis; white-space: nowrap; }
.matrix tbody th { min-width: 0; max-width: 11rem; padding: 0.3rem 0.6rem; vertical-align: middle; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; font-size: 0.8125rem; }
tr[aria-current] > * { background: var(--warn-paper); }
#said { max-width: none; min-height: 1.5em; font-weight: 500; }
.case { margin: 1.25rem 0; }
.case figcaption { margin: 0 0 0.375rem; color: var(--ink); font-size: 0.9375rem; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.375rem; }
.panels small { display: block; }
.case:target { outline: 3px solid var(--bar); outline-offset: 6px; border-radius: 0.25rem; }
.reliability { display: block; width: 100%; max-width: 26rem; font: 11px system-ui, sans-serif; fill: var(--soft); }
pre { max-height: 36rem; overflow: auto; }
@media (max-width: 40rem) {
  .panels { grid-template-columns: 1fr 1fr; }
  .matrix tbody th { max-width: 6.5rem; }
}
@media print { .filter { display: none; } .matrix { overflow: visible; } }
"""

SCRIPT = """
"use strict";
(() => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const words = (text) => (text || "").split(" ");
  const bar = document.querySelector(".filter");
  const input = bar.querySelector("input");
  const count = bar.querySelector("output");
  const said = document.querySelector("#said");
  const names = all("#class-names option").map((option) => option.value);
  const tagged = all("[data-classes]");
  const pictures = all(".case");
  let pair = "";

  // a class by its name, or all whose names hold the text
  const wantedClasses = (text) => {
    const plain = names.map((name) => name.toLowerCase());
    const exact = plain.indexOf(text);
    return exact >= 0 ? [exact] : [...plain.keys()].filter((place) => plain[place].includes(text));
  };

  const show = () => {
    const text = input.value.trim().toLowerCase();
    const wanted = new Set(wantedClasses(text).map(String));
    for (const element of tagged) {
      const { classes, pairs, truth } = element.dataset;
      const fits = !text || words(classes).some((one) => wanted.has(one));
      const holds = !pair || pairs === undefined || words(pairs).includes(pair);
      const shares = !pair || truth === undefined || truth === pair.split("-")[0];
      element.hidden = !(fits && holds && shares);
      if (truth !== undefined) {
        if (pair && element.dataset.pair === pair) element.setAttribute("aria-current", "true");
        else element.removeAttribute("aria-current");
      }
    }
    for (const cell of all(".matrix [aria-selected]")) cell.setAttribute("aria-selected", "false");
    const seen = pictures.filter((picture) => !picture.hidden).length;
    const found = text ? `${wanted.size} of ${names.length} classes, ` : "";
    count.textContent = text || pair ? `${found}${seen} of ${pictures.length} pictures` : "";
    if (said) said.textContent = "";
  };

  const choose = (cell) => {
    const [truth, called] = cell.dataset.pair.split("-");
    pair = truth === called ? "" : cell.dataset.pair;
    input.value = truth === called ? names[truth] : "";
    show();
    cell.setAttribute("aria-selected", "true");
    said.textContent = cell.title + ". ";
    if (!pair) return;
    const seen = pictures.filter((picture) => !picture.hidden);
    said.append(seen.length ? "Seen in " : "None of the pictures of this page holds it.");
    for (const picture of seen) {
      const link = document.createElement("a");
      link.href = "#" + picture.id;
      link.textContent = picture.id.replace("-", " ");
      said.append(link, " ");
    }
  };

  const reset = () => { pair = ""; input.value = ""; show(); };
  input.addEventListener("input", () => { pair = ""; show(); });
  bar.addEventListener("keydown", (event) => { if (event.key === "Escape") reset(); });
  bar.querySelector("button").addEventListener("click", reset);

  const grid = document.querySelector(".matrix table");
  if (grid) {
    grid.setAttribute("role", "grid");
    const rows = all("tbody tr", grid).map((row) => all("td", row));
    for (const cell of rows.flat()) {
      cell.tabIndex = -1;
      if (cell.dataset.pair) cell.setAttribute("aria-selected", "false");
    }
    rows[0][0].tabIndex = 0;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -Infinity], End: [0, Infinity] };
    const inside = (place, length) => Math.max(0, Math.min(length - 1, place));
    const focus = (cell) => {
      for (const other of all("td[tabindex='0']", grid)) other.tabIndex = -1;
      cell.tabIndex = 0;
      cell.focus();
    };
    grid.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      const row = rows.findIndex((cells) => cells.includes(cell));
      if (moves[event.key]) {
        const [down, right] = moves[event.key];
        const next = rows[inside(row + down, rows.length)];
        focus(next[inside(rows[row].indexOf(cell) + right, next.length)]);
      } else if (event.key === "Escape") {
        reset();
      } else if (event.key !== "Enter" && event.key !== " ") {
        return;
      } else if (cell.dataset.pair) {
        choose(cell);
      }
      event.preventDefault();
    });
    grid.addEventListener("click", (event) => {
      const cell = event.target.closest("td");
      if (!cell) return;
      focus(cell);
      if (cell.dataset.pair) choose(cell);
    });
  }

  for (const table of all("table[data-sortable]")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].textContent.replaceAll(",", "");
        const order = (first, second) => {
          const [a, b] = [parseFloat(key(first)), parseFloat(key(second))];
          // what has no number comes last both ways
          if (Number.isNaN(a) || Number.isNaN(b)) {
            return Number.isNaN(a) - Number.isNaN(b) || key(first).localeCompare(key(second));
          }
          return (up ? a - b : b - a) || key(first).localeCompare(key(second));
        };
        table.tBodies[0].append(...[...table.rows].slice(1).sort(order));
      });
    });
  }

  bar.hidden = false;
  for (const hint of all("[data-hint]")) hint.hidden = false;
  show();
})();
"""
