"""Many kinds of bad and suspicious rows in one data file: `validate` and `prepare` name each in the same words."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.data.store import Store
from engine.errors import EngineError
from tests.commands import command
from tests.data.bad_recordings import BAD_RECORDINGS, SUSPICIOUS
from tests.data.bad_rows import BAD_ROWS
from tests.data.row_kinds import MAX_SECONDS, MIN_SECONDS, SOUND, Recordings

BAD = BAD_RECORDINGS | BAD_ROWS


@dataclass
class Data:
    """A data file with a row of each kind, sound rows first.

    Attributes:
        number: kind -> number of its row.
    """

    folder: Path
    settings: dict
    number: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, demo, *tables: dict) -> "Data":
        recordings = Recordings(folder)
        rows = {name: make(recordings) for table in tables for name, (make, _) in table.items()}
        (folder / "data.json").write_text(json.dumps(list(rows.values())))
        settings = dict(
            train_data_file=folder / "data.json", model_path=demo.model_path, codes_cache_dir=folder / "codes",
            audio_tokenizer_path=demo.audio_tokenizer_path, min_seconds=MIN_SECONDS, max_seconds=MAX_SECONDS,
        )  # fmt: skip
        return cls(folder, settings, {name: number for number, name in enumerate(rows)})

    def validate(self, report: str, **settings) -> tuple[int, str, Path]:
        """Exit code, what is said, and the folder of the report."""
        code, said, _ = command("validate", report=self.folder / report, **self.settings, **settings)
        return code, said, self.folder / report

    def prepare(self, out: str, **settings) -> tuple[int, str, str]:
        """Exit code, what is said, and what is said of mistakes."""
        return command("prepare", out=self.folder / out, **self.settings, **settings)


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return rows


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def problem_lines(rows: list[dict]) -> list[str]:
    return [f"row {row['row']}: {problem}" for row in rows for problem in row["problems"]]


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory) -> Data:
    return Data.of(tmp_path_factory.mktemp("rows"), demo, SOUND, BAD, SUSPICIOUS)


@pytest.fixture(scope="module")
def validated(data):
    return data.validate("report")


def test_there_are_many_kinds():
    assert len(BAD) >= 40 and len(SUSPICIOUS) >= 10


@pytest.mark.parametrize("kind", [*SOUND, *BAD, *SUSPICIOUS])
def test_each_row_is_judged_for_what_it_is(kind, data, validated):
    row = rows_of(validated[2])[data.number[kind]]
    _, words = (SOUND | BAD | SUSPICIOUS)[kind]
    if kind in BAD:
        assert row["problems"] and not row["warnings"], row
        assert all(any(word in line for line in row["problems"]) for word in words), row["problems"]
        assert all(any(word in line for word in words) for line in row["problems"]), "something else is told too"
    else:
        assert not row["problems"] and row["tokens"] > 20, row
        assert len(row["warnings"]) == (kind in SUSPICIOUS), row
        assert all(word in line for word in words for line in row["warnings"]), row["warnings"]


def test_the_report_counts_them(data, validated):
    code, said, folder = validated
    summary = summary_of(folder)
    assert code == 2 and not summary["passed"]
    total, bad = len(data.number), len(BAD)
    assert (summary["rows"], summary["rejected"], summary["accepted"]) == (total, bad, total - bad)
    assert [row["row"] for row in summary["rejected_rows"]] == [data.number[kind] for kind in BAD]
    assert summary["rows_with_warnings"]["total"] == len(SUSPICIOUS)
    assert sum(reason["rows"] for reason in summary["reasons"]) >= bad
    verdict = f"{bad} of {total} rows rejected ({bad / total:.2%}), more than max_bad_fraction = 0 → mend them, or"
    assert f"data.json: {verdict}" in said and f"rejected: {bad} rows" in said
    assert f"warnings: {len(SUSPICIOUS)} accepted rows" in said and str(folder / "report.html") in said
    lines = problem_lines(rows_of(folder))
    for reason in summary["reasons"][:10]:
        assert f"{reason['rows']}  {reason['kind']}\n" in said and reason["examples"][0] in lines
        assert reason["examples"][0] in said
    assert f"… and {len(summary['reasons']) - 10} more kinds" in said


def test_prepare_refuses_them_in_the_same_words(data, validated):
    code, _, errors = data.prepare("refused")
    assert code == 2 and not (data.folder / "refused").exists()
    report = data.folder / "refused-report"
    assert rows_of(report) == rows_of(validated[2])
    lines = problem_lines(rows_of(report))
    told = [line.removeprefix("  - ") for line in errors.splitlines() if line.startswith("  - row ")]
    assert told == lines[: EngineError.shown] and f"  … and {len(lines) - EngineError.shown} more" in errors
    assert f"{len(BAD)} of {len(data.number)} row(s) cannot be used → mend them, or raise max_bad_fraction" in errors
    assert f"all about them in {report}:" in errors
    assert summary_of(report)["reasons"] == summary_of(validated[2])["reasons"]


def test_prepare_goes_on_without_them_when_told_to(data, validated):
    share = len(BAD) / len(data.number)
    code, _, errors = data.prepare("store", max_bad_fraction=share - 0.01)
    assert code == 2 and f"cannot be used (max_bad_fraction is {share - 0.01:g})" in errors
    code, said, errors = data.prepare("store", max_bad_fraction=share)
    assert code == 0, errors
    store = Store(data.folder / "store")
    rows = rows_of(store.folder)
    kept = [number for kind, number in data.number.items() if kind not in BAD]
    assert store.records["row"].tolist() == kept and store.header["rejected"] == len(BAD)
    assert store.records["length"].tolist() == [rows[number]["tokens"] for number in kept]
    assert rows == rows_of(validated[2]), "what validate foretold"
    assert f"within max_bad_fraction = {share:g}: they are left out" in said


def test_suspicious_rows_are_rejected_on_request(demo, tmp_path):
    data = Data.of(tmp_path, demo, SOUND, SUSPICIOUS)
    code, said, folder = data.validate("report", max_bad_fraction=0.1)
    assert code == 0 and "all " in said.splitlines()[0]
    accepted = rows_of(folder)
    code, said, folder = data.validate("strict", max_bad_fraction=0.1, reject_suspicious="true")
    assert code == 2
    for row, before in zip(rows_of(folder), accepted, strict=True):
        assert row["problems"] == [f"{line} (rejected by reject_suspicious)" for line in before["warnings"]]
    assert summary_of(folder)["rejected"] == len(SUSPICIOUS)
