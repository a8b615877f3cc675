"""The report as one HTML page: it needs no other file and no network, and reads in light and dark, narrow and wide.

Pictures lie in it as SVG images, in which no script runs, and all text is escaped: a prompt, an error or a folder's name may hold
anything.
"""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from flash_ladder.names import FINISHED
from flash_ladder.sweep.rows import Sweep
from flash_ladder.sweep.run_files import Row
from flash_ladder.sweep.series import Picture
from flash_ladder.sweep.table import Column, cell, columns, totals

# Nothing from elsewhere is loaded, whatever a text holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #5c5c5c; --paper: #ffffff; --line: #dddddd;
  --mark: #f4f4f4; --bad: #a3262a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #a5a5a5; --paper: #16181b; --line: #363a40; --mark: #202429; --bad: #ff8f8f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 92rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; }
dt, .faint { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--mark); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.number { text-align: right; }
.bad { color: var(--bad); }
a { color: inherit; }
figure { margin: 0; padding: .5rem; background: #ffffff; border: 1px solid var(--line); border-radius: .4rem; overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""
# Sorts by what a cell holds in data-value: numbers by size, and empty cells last.
SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = document.querySelector("tbody"), at = head.cellIndex;
    const key = (row) => row.cells[at].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const numbers = [Number(a), Number(b)];
      const by = numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
      return up ? by : -by;
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}
"""
CAPTIONS = {
    "memory": "Eager attention stores a score for every pair of positions, so one layer's memory of one sequence grows with the "
    "square of its length (exponent 2); flash attention's grows with the length (exponent 1). A cross is a length at which memory "
    "ran out, at what its line, continued, would have needed there.",
    "speed": "Full attention is counted in the MFU, as PaLM and nanoGPT count it.",
    "speedup": "On the left whole runs of the same other settings, on the right one attention layer as each run measured it.",
    "scaling": "Efficiency is the speed of a device over that on the fewest devices, of the same other settings.",
    "loss": "Each line is a run.",
}


def write_page(sweep: Sweep, pictures: list[Picture], files: dict[str, list[Path]], path: Path, title: str) -> None:
    """Writes the page to `path`. `files`: each picture's PNG, SVG and CSV. Raises OSError where it cannot be written."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(totals(sweep.rows))}</p>",
        facts(sweep),
        "<h2>The runs</h2>",
        table(sweep, path.parent),
        *(figure(picture, files[picture.name], path.parent) for picture in pictures),
        errors(sweep),
    ]
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    path.write_text(text, encoding="utf-8", errors="replace")


def facts(sweep: Sweep) -> str:
    """What was run, where, with what and when."""
    told = {
        "command": [f"<code>{escape(command)}</code>" for command in sweep.commands[:8]],
        "on": [escape(", ".join(sweep.machines))] if sweep.machines else [],
        "versions": [escape(line) for line in sweep.versions[:4]],
        "date": [escape(" to ".join(dict.fromkeys([sweep.dates[0], sweep.dates[-1]])))] if sweep.dates else [],
        "speed-up over": [escape(sweep.baseline)] if sweep.baseline else [],
        "as data": [f"{link('sweep.csv')}, {link('sweep.json')}"],
    }
    if len(sweep.commands) > 8:
        told["command"].append(f"and {len(sweep.commands) - 8} others")
    lines = [f"<dt>{name}</dt><dd>{'<br>'.join(values)}</dd>" for name, values in told.items() if values]
    return f"<dl>{''.join(lines)}</dl>"


def link(path: str, text: str | None = None) -> str:
    """A link to a file or folder beside the page."""
    return f'<a href="{quote(f"./{path}")}">{escape(text or path)}</a>'


def table(sweep: Sweep, out: Path) -> str:
    """Every column that has a value; a click on a head sorts by it."""
    shown = columns(sweep)
    classes = {True: ' class="number"', False: ""}
    heads = "".join(f'<th{classes[c.is_number]} title="{escape(c.what)}"><button>{escape(c.head)}</button></th>' for c in shown)
    rows = "".join(f"<tr>{''.join(table_cell(c, row, sweep, out) for c in shown)}</tr>\n" for row in sweep.rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'


def table_cell(column: Column, row: Row, sweep: Sweep, out: Path) -> str:
    """A cell with its value for sorting; what did not finish is marked, and a folder is a link."""
    value, text = column.value(row), escape(cell(column, row))
    classes = ["number"] if column.is_number else []
    if column.head == "status" and row.status != FINISHED:
        classes.append("bad")
    if column.head == "folder" and row.has_run:
        text = link(relative(sweep.folder / row.folder, out), row.folder)
    named = f' class="{" ".join(classes)}"' if classes else ""
    return f'<td{named} data-value="{escape("" if value is None else str(value))}">{text}</td>'


def relative(path: Path, out: Path) -> str:
    """A path as seen from the page's folder, with slashes."""
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()


def figure(picture: Picture, files: list[Path], out: Path) -> str:
    """A picture with its caption and its files."""
    svg = next(file for file in files if file.suffix == ".svg")
    image = base64.b64encode(svg.read_bytes()).decode()
    alt = escape(picture.title.replace("$S^p$", "exponent"))
    beside = ", ".join(link(relative(file, out), file.suffix[1:].upper()) for file in files)
    return (
        f"<h2>{escape(picture.title.partition(';')[0])}</h2>\n"
        f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{image}"></figure>\n'
        f'<p class="faint">{escape(CAPTIONS[picture.name])} {beside}</p>'
    )


def errors(sweep: Sweep) -> str:
    """What went wrong, run by run, and which files could not be read."""
    failed = [
        f"<dt>{escape(row.folder)}</dt><dd>{escape(row.name)}: "
        f'<span class="bad">{escape(row.status.replace("_", " "))}</span>{f": {escape(row.error)}" if row.error else ""}</dd>'
        for row in sweep.rows
        if row.status != FINISHED or row.error
    ]
    parts = [f"<h2>What did not finish</h2>\n<dl>{''.join(failed)}</dl>"] if failed else []
    if sweep.warnings:
        parts.append(f"<h2>What could not be read</h2>\n<ul>{''.join(f'<li>{escape(note)}</li>' for note in sweep.warnings)}</ul>")
    return "\n".join(parts)
