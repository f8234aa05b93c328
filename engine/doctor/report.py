"""What the doctor's user sees: sections, one line a check, what to do; plain ASCII where the terminal knows no more."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.doctor.findings import FAILURE, OK, WARNING, Facts, Finding, machines, worst

SECTIONS = ("software", "machine", "network", "files", "speed")
SIGNS = {OK: "✓", WARNING: "!", FAILURE: "✗"}
PLAIN = str.maketrans({"✓": "+", "✗": "x", "→": "->", "×": "x", "…": "...", "–": "-"})


def lines(findings: Sequence[Finding], everyone: Sequence[Facts], table: Sequence[str], seconds: dict) -> Iterator[str]:
    """The whole report.

    Args:
        table: of the bandwidth measured.
        seconds: section -> what its checks took.
    """
    hosts = [facts["host"] for facts in machines(everyone)]
    named = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    yield f"{_count(len(everyone), 'process', 'es')} on {_count(len(hosts), 'machine')}: {named}"
    for section in SECTIONS:
        mine = [finding for finding in findings if finding.section == section]
        if not mine:
            continue
        taken = f" ({seconds[section]:.2f} s)" if section in seconds else ""
        yield f"\n{section}{taken}"
        for finding in mine:
            yield f"  {SIGNS[finding.level]} {finding.text}"
            if finding.remedy:
                yield f"      → {finding.remedy}"
        if section == "speed" and table:
            yield ""
            yield from (f"  {line}" for line in table)
    yield f"\n{verdict(findings)}"


def verdict(findings: Sequence[Finding]) -> str:
    failures, warnings = (sum(f.level == level for f in findings) for level in (FAILURE, WARNING))
    if worst(findings) == OK:
        return f"all is well: {_count(len(findings), 'check')}"
    return f"{_count(failures, 'failure')}, {_count(warnings, 'warning')} in {_count(len(findings), 'check')}"


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{plural if number != 1 else ''}"


def printable(text: str, encoding: str | None) -> str:
    """`text` as a stream of this encoding can show it; None: one that takes any text."""
    try:
        return text if encoding is None else text.encode(encoding).decode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(PLAIN).encode("ascii", "replace").decode()


def write_json(
    file: Path, findings: Sequence[Finding], everyone: Sequence[Facts], rows: Sequence[dict], seconds: dict
) -> None:
    """Findings, facts of every rank, bandwidth and times, for tools."""
    content = {
        "passed": worst(findings) != FAILURE,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ranks": list(everyone),
        "bandwidth": list(rows),
        "seconds": seconds,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))
