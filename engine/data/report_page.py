"""The data report as one HTML file: the summary of report.json, drawn.

Nothing is fetched: style, histograms (inline SVG) and the few lines of script are in the file, so it can be sent by
mail and opened years later. Everything that comes from the data is escaped; without script all of it is still shown,
only sorting and filtering of the tables need it.
"""

from collections.abc import Iterable
from html import escape
from typing import Any

from engine.data.report_histogram import histogram_svg, rounded

MAX_REJECTED, MAX_WARNED, MAX_SPEAKERS = 2000, 500, 100
HISTOGRAMS = (
    # quantity, title, unit of the x axis, what the y axis counts
    ("seconds", "Length of the target audio", "seconds", "rows"),
    ("characters_per_second", "Speaking rate", "characters a second", "rows"),
    ("tokens", "Length of the packed sample", "tokens", "rows"),
    ("clips_per_speaker", "Clips of a speaker", "rows of one speaker", "speakers"),
)


def page(summary: dict[str, Any]) -> str:
    """The HTML of a report's summary, as `DataReport.summary` makes it."""
    passed = summary["passed"]
    verdict = summary["verdict"]
    body = [
        f"<h1>Data report <small>{_text(summary['source'])}</small></h1>",
        f'<p class="verdict {"good" if passed else "bad"}"><b>{"✓ Usable" if passed else "✗ Refused"}</b> '
        f"{_text(verdict[0].upper() + verdict[1:])}.</p>",
        _key_numbers(summary),
        _histograms(summary["quantities"]),
        _kinds("Why rows are rejected", summary["reasons"]),
        _rejected(summary["rejected_rows"]),
        _kinds("Warnings on accepted rows", summary["warnings"]),
        _warned(summary["rows_with_warnings"]),
        _changed_texts(summary["changed_texts"]),
        _speakers(summary["speakers"]),
        _settings(summary["settings"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data report: {_text(summary['source'])}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{_joined(body)}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _key_numbers(summary: dict[str, Any]) -> str:
    speakers = summary["speakers"]
    numbers = [
        ("rows", f"{summary['rows']:,}"),
        ("accepted", f"{summary['accepted']:,}"),
        ("rejected", f"{summary['rejected']:,} ({summary['bad_fraction']:.2%})"),
        ("target audio", f"{summary['hours']:,.2f} h"),
        ("reference audio", f"{summary['reference_hours']:,.2f} h"),
        ("speakers", f"{speakers['total']:,}"),
        ("rows without speaker", f"{speakers['rows_without']:,}"),
        ("tokens", f"{summary['tokens']:,}" if summary["quantities"]["tokens"]["count"] else "not counted"),
        ("texts changed", f"{summary['changed_texts']['total']:,}"),
        ("rows with warnings", f"{summary['rows_with_warnings']['total']:,}"),
    ]
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers)
    return f'<dl class="numbers">{_joined(cells)}</dl>'


def _histograms(quantities: dict[str, dict]) -> str:
    figures = []
    for name, title, unit, counted in HISTOGRAMS:
        found = quantities[name]
        if found["count"]:
            told = " · ".join(f"{n} <b>{rounded(found[n])}</b>" for n in ("min", "median", "p95", "max"))
            drawn = histogram_svg(found, title, unit, counted)
            caption = f"{told} {unit}, {found['count']:,} {counted}"
        else:
            drawn, caption = "", f"no accepted row has a value in {unit}"
        figures.append(f"<figure><h3>{title}</h3>{drawn}<figcaption>{caption}</figcaption></figure>")
    return f"<h2>What the accepted rows amount to</h2><div class='figures'>{_joined(figures)}</div>"


def _kinds(title: str, kinds: list[dict]) -> str:
    rows = ((f"{k['rows']:,}", _text(k["kind"]), "<br>".join(map(_text, k["examples"]))) for k in kinds)
    return _table(title, ("rows", "kind", "first of them"), rows, len(kinds))


def _rejected(rows: list[dict]) -> str:
    cells = (
        (row["row"], _lines(row["problems"]), _text(row["speaker"]), _text(row["text"])) for row in rows[:MAX_REJECTED]
    )
    return _table("Rejected rows", ("row", "problems", "speaker", "text"), cells, len(rows), MAX_REJECTED, True)


def _warned(rows: dict) -> str:
    cells = (
        (row["row"], _lines(row["warnings"]), _seconds(row), _text(row["speaker"]), _text(row["text"]))
        for row in rows["listed"][:MAX_WARNED]
    )
    columns = ("row", "warnings", "seconds", "speaker", "text")
    return _table("Accepted rows with warnings", columns, cells, rows["total"], MAX_WARNED, True)


def _changed_texts(texts: dict) -> str:
    cells = ((text["row"], _text(text["written"]), _text(text["trained"])) for text in texts["listed"])
    listed = len(texts["listed"])
    return _table("Texts changed by normalisation", ("row", "written", "→ trained"), cells, texts["total"], listed)


def _speakers(speakers: dict) -> str:
    most = speakers["most_clips"][:MAX_SPEAKERS]
    cells = ((_text(speaker["speaker"]), f"{speaker['clips']:,}") for speaker in most)
    return _table("Speakers", ("speaker", "rows"), cells, speakers["total"], MAX_SPEAKERS, True, folded=True)


def _settings(settings: dict[str, Any]) -> str:
    cells = ((_text(name), _text(value)) for name, value in settings.items())
    return _table("Settings", ("setting", "value"), cells, len(settings), folded=True)


def _table(
    title: str,
    columns: tuple[str, ...],
    rows: Iterable[tuple],
    total: int,
    limit: int | None = None,
    filtered: bool = False,
    folded: bool = False,
) -> str:
    """A section with a table whose cells are HTML already; nothing if it has no rows."""
    if not total:
        return ""
    body = _joined("<tr>" + "".join(f'<td dir="auto">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    head = "".join(f'<th><button type="button">{column}</button></th>' for column in columns)
    more = ""
    if limit is not None and total > limit:
        more = f"<p>The first {limit:,}; {total - limit:,} more are in rows.jsonl.</p>"
    field = f'<input type="search" placeholder="filter" aria-label="Filter: {title}">' if filtered else ""
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    heading = f"<h2>{title} <small>{total:,}</small></h2>"
    return f"<details{'' if folded else ' open'}><summary>{heading}</summary>{field}{more}{table}</details>"


def _text(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _lines(lines: Iterable[str]) -> str:
    return "<br>".join(map(_text, lines))


def _seconds(row: dict[str, Any]) -> str:
    return "" if row["seconds"] is None else f"{row['seconds']:.2f}"


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d20; --soft: #5c6068; --line: #d9dce1; --ground: #fff; --panel: #f5f6f8;
  --bar: #2f6fb5; --above: #9aa3ad; --mark: #b3541e; --good: #1c7a3f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e8ea; --soft: #a2a7b0; --line: #3a3e45; --ground: #17181b;
  --panel: #212327; --bar: #6aa5e3; --above: #7d858f; --mark: #f0a06a; --good: #6fcf8f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.5rem; margin: 0 0 12px; } h2 { font-size: 1.1rem; margin: 32px 0 10px; } h3 { margin: 0 0 4px; }
h3 { font-size: .95rem; } small { color: var(--soft); font-weight: 400; overflow-wrap: anywhere; }
summary h2 { display: inline-block; } summary { cursor: pointer; }
.verdict { border-left: 5px solid; background: var(--panel); padding: 10px 14px; margin: 0 0 18px; }
.verdict b { margin-right: .6em; } .good { border-color: var(--good); } .bad { border-color: var(--bad); }
.good b { color: var(--good); } .bad b { color: var(--bad); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 8px; margin: 0; }
.numbers div { background: var(--panel); padding: 8px 12px; border-radius: 6px; }
.numbers dt { color: var(--soft); font-size: .85rem; } .numbers dd { margin: 0; font-size: 1.15rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--panel); border-radius: 6px; padding: 12px; }
figcaption { color: var(--soft); font-size: .9rem; } figcaption b { color: var(--ink); }
svg { width: 100%; height: auto; display: block; font-size: 11px; } svg text { fill: var(--soft); }
svg .name { fill: var(--ink); } .bar { fill: var(--bar); } .bar.above { fill: var(--above); }
.grid { stroke: var(--line); stroke-width: .7; } .axis { stroke: var(--soft); }
.mark { stroke: var(--mark); stroke-dasharray: 4 3; stroke-width: 1.2; }
.scroll { overflow: auto; max-height: 70vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--panel); text-align: left; }
th button { all: unset; padding: 6px 10px; cursor: pointer; width: 100%; box-sizing: border-box; }
th button:focus-visible { outline: 2px solid var(--bar); outline-offset: -2px; }
td { padding: 5px 10px; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
input { font: inherit; padding: 4px 8px; margin: 0 0 8px; width: min(320px, 100%); }
"""

_SCRIPT = """
for (const section of document.querySelectorAll("details")) {
  const body = section.querySelector("tbody");
  section.querySelector("input")?.addEventListener("input", event => {
    const words = event.target.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(words);
  });
  section.querySelectorAll("th button").forEach((button, column) => {
    let direction = 1;
    button.addEventListener("click", () => {
      const key = row => row.cells[column].textContent.replaceAll(",", "");
      const compare = (a, b) => direction * key(a).localeCompare(key(b), undefined, {numeric: true});
      body.append(...[...body.rows].sort(compare));
      direction = -direction;
    });
  });
}
"""
