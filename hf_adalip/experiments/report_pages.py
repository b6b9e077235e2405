"""How a report is written: a list of blocks as HTML that needs nothing else, and as Markdown."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from .tables import Table


@dataclass
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclass
class Paragraph:
    """Text; what is between backticks is code."""

    text: str


@dataclass
class Bullets:
    """A list of short texts."""

    items: Sequence[str]


@dataclass
class CaptionedTable:
    """A table, and what every table says: data and scale."""

    table: Table
    caption: str


@dataclass
class Image:
    """A PNG, its file, its words for those who do not see it, and its caption."""

    file: str
    png: bytes
    alt: str
    caption: str


@dataclass
class Details:
    """Lines of code, folded away."""

    summary: str
    lines: Sequence[str]


Block = Heading | Paragraph | Bullets | CaptionedTable | Image | Details

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; }
main { padding: 0 1rem 4rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2em; }
h1 { margin-top: 1em; }
figure { margin: 1.5rem 0; }
figcaption { margin-bottom: .5rem; }
.notes { font-size: .875rem; max-width: 50rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; }
th, td { text-align: right; white-space: nowrap; }
th[colspan] { text-align: center; }
tbody th, thead th:first-child { text-align: left; font-weight: normal; }
tbody tr:nth-child(even) > * { background-image: linear-gradient(var(--soft) 0 0); }
tbody th { background-color: Canvas; left: 0; position: sticky; }
img { background: #fff; height: auto; min-width: min(100%, 20rem); max-width: 100%; }
@media (max-width: 45rem) {
  .wide img { max-width: none; width: 44rem; }
  tbody th { min-width: 6rem; white-space: normal; }
  thead th:first-child { white-space: normal; }
  th, td { padding: .3rem .4rem; }
}
code, pre { font: .875rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .7rem; white-space: pre-wrap; }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
"""
)


def as_html(blocks: Sequence[Block]) -> str:
    """One page with its pictures inside, which loads nothing."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    body = "\n".join(_html(block) for block in blocks)
    return _PAGE.substitute(title=escape(title), body=body)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{anchor(text)}">{escape(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case CaptionedTable(table, caption):
            return _html_table(table, caption)
        case Image(_, png, alt, caption):
            data = base64.b64encode(png).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
            return (
                f'<figure>\n<div class="wide">{image}</div>\n'
                f"<figcaption>{_inline(caption)}</figcaption>\n</figure>"
            )
        case Details(summary, lines):
            code = escape("\n".join(lines))
            return f"<details>\n<summary>{escape(summary)}</summary>\n<pre>{code}</pre>\n</details>"


def _html_table(table: Table, caption: str) -> str:
    heads = []
    if any(group for group, _ in table.head):
        cells = []
        for group, columns in itertools.groupby(table.head, key=lambda column: column[0]):
            cells.append(
                f'<th scope="colgroup" colspan="{len(list(columns))}">{escape(group)}</th>'
            )
        heads.append(f"<tr>{''.join(cells)}</tr>")
    names = "".join(f'<th scope="col">{escape(name)}</th>' for _, name in table.head)
    heads.append(f"<tr>{names}</tr>")
    rows = []
    for first, *others in table.rows:
        cells = [
            f'<th scope="row">{escape(first)}</th>',
            *(f"<td>{escape(o)}</td>" for o in others),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "\n".join(f"<p>{_inline(note)}</p>" for note in table.notes)
    label = escape(table.title)
    return (
        f"<figure>\n<figcaption><strong>{label}.</strong> {_inline(caption)}</figcaption>\n"
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0">\n<table>\n'
        f"<thead>\n{chr(10).join(heads)}\n</thead>\n"
        f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>\n</div>\n"
        f'<div class="notes">\n{notes}\n</div>\n</figure>'
    )


def anchor(text: str) -> str:
    """What a heading is linked by."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def as_markdown(blocks: Sequence[Block]) -> str:
    """The same, with the pictures as files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case CaptionedTable(table, caption):
            head = [", ".join(part for part in column if part) for column in table.head]
            lines = [head, ["---", *["---:"] * (len(head) - 1)], *table.rows]
            rows = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
            return "\n\n".join([f"**{table.title}.** {caption}", rows, *table.notes])
        case Image(file, _, alt, caption):
            return f"![{_cell(alt).replace('[', '(').replace(']', ')')}]({file})\n\n{caption}"
        case Details():  # which Markdown has no form of its own for
            return _html(block)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
