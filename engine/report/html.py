"""Pieces of HTML. Whatever comes from a run goes through `text`, so that a name or a sentence is never markup."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from engine.report.script import SCRIPT
from engine.report.style import STYLE


def text(value: Any) -> str:
    """Escaped, for content and for attributes in double quotes; None is empty."""
    return "" if value is None else escape(str(value).replace("\0", "\ufffd").encode(errors="replace").decode())


def joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)


def contents(sections: Iterable[str]) -> str:
    """Links to those parts of the page that it has."""
    found = (re.match(r'<section id="(\w+)"><h2>(.*?)</h2>', part) for part in sections)
    links = " ".join(f'<a href="#{match[1]}">{match[2]}</a>' for match in found if match)
    return f'<nav>{links}<button class="theme" type="button" hidden>light or dark</button></nav>'


def document(title: str, body: Iterable[str]) -> str:
    """The whole file."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{joined(body)}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(name: str, title: str, body: str, about: str = "") -> str:
    """A part of the page under its heading, which the table of contents names; "" without a body."""
    if not body:
        return ""
    about = f'<p class="about">{about}</p>' if about else ""
    return f'<section id="{name}"><h2>{title}</h2>{about}\n{body}\n</section>'


def folded(title: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>\n{body}\n</details>" if body else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str, marked: Iterable[int] = ()) -> str:
    """
    Args:
        columns: headings, HTML; one that begins with # is of a column of numbers.
        rows: cells, HTML.
        caption: for who hears the page.
        marked: numbers of rows to stress.
    """
    rows, marked = list(rows), set(marked)
    if not rows:
        return ""
    kinds = [' class="n"' if column.startswith("#") else "" for column in columns]
    head = "".join(f"<th{kind}>{c.removeprefix('#')}</th>" for kind, c in zip(kinds, columns, strict=True))
    body = "\n".join(
        f"<tr{' class=marked' if n in marked else ''}>"
        + "".join(f'<td{kind} dir="auto">{cell}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for n, row in enumerate(rows)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def key_numbers(numbers: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, small print) of each, the name and the rest HTML already."""
    cells = (
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{small}</small>' if small else ''}</dd></div>"
        for name, value, small in numbers
    )
    return f'<dl class="numbers">{joined(cells)}</dl>'
