"""Lines that survive: a kill in the middle of one, wherever it was cut, and what a resume forgets."""

import json

from hypothesis import given
from hypothesis import strategies as st

from engine.observe import journal

LINES = [{"step": n, "scores": {"wer": n / 10}, "text": "Über {alles} 今天"} for n in (1, 2, 2, 3)]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert journal.read(tmp_path / "none.jsonl") == []


@given(cut=st.integers(1, 80))
def test_a_line_cut_anywhere_is_left_out_and_the_others_stay(tmp_path_factory, cut):
    """Also right behind an inner brace, where it looks whole, and in the middle of a letter of several bytes."""
    file = tmp_path_factory.mktemp("journal") / "lines.jsonl"
    journal.add(file, LINES)
    last = len(json.dumps(LINES[-1], ensure_ascii=False).encode()) + 1
    file.write_bytes(file.read_bytes()[: -min(cut + 1, last)])
    assert journal.read(file) == LINES[:-1]
    journal.add(file, LINES[-1:])
    assert journal.read(file) == LINES, "after a disk that was full"
    journal.forget_after(file, 2)
    assert journal.read(file) == LINES[:3]
    journal.add(file, LINES[3:])
    assert journal.read(file) == LINES


def test_a_new_run_begins_with_an_empty_file(tmp_path):
    file = tmp_path / "lines.jsonl"
    journal.add(file, LINES)
    journal.forget_after(file, 0)
    assert file.read_text() == ""
