"""The data report: numbers as a plain count gives them, hostile text harmless, memory bounded, whole or absent."""

import json
import math
import random
import tracemalloc
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.distribution import describe, histogram, round_step
from engine.data.report import DataReport, RowReport
from engine.data.report_kinds import EXAMPLES, MAX_KINDS, OTHER, Kinds, kind_of
from engine.data.report_page import MAX_REJECTED, page
from engine.errors import DataError

quick = settings(max_examples=60, deadline=None, derandomize=True)
HOSTILE = "</td><script>alert(1)</script>\"'&"


def random_rows(count: int = 400) -> list[RowReport]:
    chance = random.Random(5)
    return [
        RowReport(
            row=number,
            problems=(f"clips/{number}.wav: no such file → check the path",) if chance.random() < 0.1 else (),
            warnings=(f"clips/{number}.wav: clipped, {number} samples",) if chance.random() < 0.2 else (),
            speaker=chance.choice(["ann", "bob", "cem", None]),
            text="x" * chance.randint(0, 90),
            written_text="10°C" if chance.random() < 0.1 else None,
            seconds=chance.choice([None, chance.uniform(0.5, 12)]),
            reference_seconds=chance.choice([None, 2.5]),
            tokens=chance.choice([None, chance.randint(40, 900)]),
        )
        for number in range(count)
    ]


def reported(rows, folder=None, **kwargs) -> DataReport:
    with DataReport("train.json", folder, **kwargs) as report:
        for row in rows:
            report.add(row)
    return report


def quantile(values: list, share: float) -> float:
    """Linear between the two neighbours."""
    values, at = sorted(values), share * (len(values) - 1)
    low = values[math.floor(at)]
    return low + (at - math.floor(at)) * (values[math.ceil(at)] - low)


def test_numbers_equal_a_plain_count(tmp_path):
    rows = random_rows()
    reported(rows, tmp_path, settings={"min_seconds": 0.5, "folder": tmp_path})
    found = json.loads((tmp_path / "report.json").read_text())
    good, bad = [r for r in rows if not r.problems], [r for r in rows if r.problems]
    assert (found["rows"], found["accepted"], found["rejected"]) == (len(rows), len(good), len(bad))
    assert found["bad_fraction"] == len(bad) / len(rows)
    assert found["hours"] == pytest.approx(sum(r.seconds or 0 for r in good) / 3600)
    assert found["reference_hours"] == pytest.approx(sum(r.reference_seconds or 0 for r in good) / 3600)
    assert found["tokens"] == sum(r.tokens or 0 for r in good)
    assert [r["row"] for r in found["rejected_rows"]] == [r.row for r in bad]
    assert found["settings"] == {"min_seconds": 0.5, "folder": str(tmp_path)}

    clips = Counter(r.speaker for r in good if r.speaker)
    assert {s["speaker"]: s["clips"] for s in found["speakers"]["most_clips"]} == clips
    assert found["speakers"]["rows_without"] == sum(r.speaker is None for r in good)
    assert found["reasons"] == [
        {"kind": "no such file", "rows": len(bad), "examples": [f"row {r.row}: {r.problems[0]}" for r in bad[:3]]}
    ]
    warned = [r.row for r in good if r.warnings]
    assert found["rows_with_warnings"]["total"] == found["warnings"][0]["rows"] == len(warned)
    assert [r["row"] for r in found["rows_with_warnings"]["listed"]] == warned
    changed = [{"row": r.row, "written": "10°C", "trained": r.text} for r in good if r.written_text]
    assert found["changed_texts"] == {"total": len(changed), "listed": changed}

    for name, values in {
        "seconds": [r.seconds for r in good if r.seconds is not None],
        "characters_per_second": [len(r.text) / r.seconds for r in good if r.seconds and r.text],
        "tokens": [r.tokens for r in good if r.tokens is not None],
        "clips_per_speaker": list(clips.values()),
    }.items():
        told = found["quantities"][name]
        assert told["count"] == len(values)
        assert (told["min"], told["max"]) == (min(values), max(values))
        for key, share in (("p5", 0.05), ("median", 0.5), ("p95", 0.95)):
            assert told[key] == pytest.approx(quantile(values, share)), (name, key)
        assert told["mean"] == pytest.approx(sum(values) / len(values))


def test_every_row_is_in_rows_jsonl_as_it_was_added(tmp_path):
    rows = [*random_rows(20), RowReport(20, text="lone \ud800 and 语", seconds=np.float32(0.5), tokens=np.int64(7))]
    reported(rows, tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    names = RowReport.__dataclass_fields__
    assert [RowReport(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in read] == rows
    assert all(list(row) == list(names) for row in read)


@quick
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=80) | st.lists(st.integers(1, 10**6), min_size=1))
def test_a_histogram_counts_every_value_once_and_in_its_bin(values):
    found = histogram(np.array(values))
    start, width, counts = found["start"], found["width"], found["counts"]
    assert sum(counts) + found["above"] == len(values)
    assert len(counts) <= 42
    slack = width * 1e-6
    for i, count in enumerate(counts):
        low, high = start + i * width, start + (i + 1) * width
        surely = sum(low + slack <= v < high - slack for v in values)
        perhaps = sum(low - slack <= v < high + slack for v in values)
        assert surely <= count <= perhaps


def test_a_long_tail_does_not_flatten_the_histogram():
    values = np.array([*np.linspace(2, 6, 999), 600.0])
    found = histogram(values)
    assert found["above"] == sum(values >= found["start"] + len(found["counts"]) * found["width"]) >= 1
    assert sum(count > 0 for count in found["counts"]) > 20


def test_whole_numbers_have_bins_of_whole_width():
    assert histogram(np.array([1, 2, 2, 4])) == {"start": 1.0, "width": 1.0, "counts": [1, 2, 0, 1], "above": 0}


def test_a_quantity_without_values_is_counted_as_none():
    assert describe(np.array([])) == {"count": 0}


@pytest.mark.parametrize("least, step", [(0.013, 0.02), (0.02, 0.02), (0.3, 0.5), (1, 1), (6, 10), (2300, 5000)])
def test_steps_are_round(least, step):
    assert round_step(least) == pytest.approx(step)


@pytest.mark.parametrize(
    "line, kind",
    [
        ("row 3: a.wav: no such file", "no such file"),
        ("row 9: /some where/b c.wav: no such file → check the path", "no such file"),
        ("..\\clips\\b.wav from 3 s: silent, its peak of 1.0e-05 is below 1e-04", "silent, its peak of N is below N"),
        ("x.mp3: the segment to 9 s is outside the recording of 5.000 s",
         "the segment to N s is outside the recording of N s"),
        ("message 2, item 0: type 'vidéo' → must be text or audio", "message N, item N: type '…'"),
        ("'/a/b: c.wav': not a file name", "'…': not a file name"),
        ("1,234 tokens are over max_tokens_per_micro_batch = 800", "N tokens are over max_tokens_per_micro_batch = N"),
        ("text is empty", "text is empty"),
    ],
)  # fmt: skip
def test_problems_that_differ_by_names_and_numbers_are_one_kind(line, kind):
    assert kind_of(line) == kind


def test_wordings_that_defy_grouping_do_not_pile_up():
    kinds = Kinds()
    for i in range(MAX_KINDS + 500):
        kinds.add(["".join("abcdefghij"[int(d)] for d in str(i))])
    listed = kinds.listed()
    assert len(listed) == MAX_KINDS + 1
    assert listed[0]["kind"] == OTHER and listed[0]["rows"] == 500 and len(listed[0]["examples"]) == EXAMPLES


def test_a_row_counts_once_for_a_kind():
    kinds = Kinds()
    kinds.add(["a.wav: no such file", "b.wav: no such file"])
    assert kinds.listed() == [{"kind": "no such file", "rows": 1, "examples": ["a.wav: no such file"]}]


@pytest.mark.parametrize("bad, rows, allowed, passed", [
    (0, 5, 0.0, True), (1, 5, 0.0, False), (29, 100, 0.29, True), (30, 100, 0.29, False), (0, 0, 0.5, False),
])  # fmt: skip
def test_max_bad_fraction_decides(bad, rows, allowed, passed):
    report = reported((RowReport(i, ("bad",) if i < bad else ()) for i in range(rows)), max_bad_fraction=allowed)
    assert report.passed is passed
    assert (report.rows, report.rejected, report.accepted) == (rows, bad, rows - bad)
    assert ("→" in report.verdict()) is not passed


def test_rejected_lines_carry_the_row_once():
    report = reported([RowReport(3, ("a.wav: no such file", "row 3: no text")), RowReport(4)])
    assert report.rejected_lines() == ["row 3: a.wav: no such file", "row 3: no text"]


def test_the_terminal_summary_tells_what_counts():
    text = "\n".join(reported(random_rows()).lines())
    for needed in ("of 400 rows rejected", "no such file", "clipped, N samples", "speakers  3", "h of targets", "p95"):
        assert needed in text, needed


class Balance(HTMLParser):
    """Fails on a tag that closes another than the last opened; collects scripts and texts."""

    VOID = {"meta", "br", "input"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.seen, self.text, self.links = [], Counter(), [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen[tag] += 1
        self.links += [value for name, value in attributes if name in ("src", "href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen[tag] += 1

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_text_stays_text(tmp_path):
    rows = [
        RowReport(0, (HOSTILE,), (), HOSTILE, HOSTILE),
        RowReport(1, (), (HOSTILE,), HOSTILE, HOSTILE + "!", HOSTILE, 2.0, None, 90),
    ]
    with DataReport(HOSTILE, tmp_path, settings={HOSTILE: HOSTILE}) as report:
        for row in rows:
            report.add(row)
    html = (tmp_path / "report.html").read_text()
    parsed = Balance(html)
    assert parsed.seen["script"] == 1 and html.count("<script>") == 1
    assert not parsed.links, "the page must fetch nothing"
    assert "".join(parsed.text).count(HOSTILE) >= 9


def test_the_page_draws_every_histogram_and_its_numbers(tmp_path):
    reported(random_rows(), tmp_path)
    summary = json.loads((tmp_path / "report.json").read_text())
    html = (tmp_path / "report.html").read_text()
    parsed = Balance(html)
    assert parsed.seen["svg"] == 4
    assert parsed.seen["rect"] == sum(
        len(q["histogram"]["counts"]) + bool(q["histogram"]["above"]) for q in summary["quantities"].values()
    )
    for found in summary["quantities"].values():
        for count in found["histogram"]["counts"]:
            assert f": {count:,} " in html
    heights = [float(part.split('"')[0]) for part in html.split('height="')[1:] if part[0].isdigit()]
    assert heights and min(heights) >= 0


def test_the_page_of_rows_without_audio_and_of_no_rows_at_all():
    for rows in ([RowReport(0, text="hello")], []):
        parsed = Balance(page(reported(rows).summary()))
        assert parsed.seen["svg"] == 0


def test_the_page_says_how_many_rejected_rows_it_leaves_to_the_file():
    rows = [RowReport(i, ("bad",)) for i in range(MAX_REJECTED + 7)]
    html = page(reported(rows).summary())
    assert "The first 2,000; 7 more are in rows.jsonl" in html
    assert html.count('<td dir="auto">bad</td>') == MAX_REJECTED + 1  # and once among the kinds


def test_memory_does_not_grow_with_accepted_rows(tmp_path):
    count = 50_000
    rows = (RowReport(i, (), ("w" * 99,), f"s{i % 9}", "t" * 99, "w" * 99, 3.0, 2.0, 99) for i in range(count))
    tracemalloc.start()
    try:
        report = DataReport("train.json", tmp_path)
        for row in (next(rows) for _ in range(2000)):
            report.add(row)
        before = tracemalloc.get_traced_memory()[0]
        for row in rows:
            report.add(row)
        del row
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert report.rows == count
    assert grown / (count - 2000) < 64, f"{grown / (count - 2000):.0f} bytes a row"


def test_a_check_that_fails_on_its_way_leaves_the_earlier_report(tmp_path):
    reported([RowReport(0)], tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), DataReport("train.json", tmp_path) as report:
        report.add(RowReport(0, ("bad",)))
        raise KeyboardInterrupt
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert set(before) == {"rows.jsonl", "report.json", "report.html"}


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reported(random_rows(10)).rows == 10
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/report: the data report cannot be written.*→ choose another folder"):
        DataReport("train.json", tmp_path / "file" / "report")
