"""The incremental JSON reader: what json.loads of the whole file gives and says, without holding the whole file."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.formats.json_rows import _Scanner, first_row, read_rows, write_rows
from engine.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT.filter(lambda key: key not in ("samples", "data", "items", "messages")), VALUES)
STYLES = st.sampled_from([{}, {"indent": 1}, {"indent": 3, "ensure_ascii": False}, {"separators": (",", ":")}])
SIZES = st.sampled_from([1, 2, 3, 7, 20, 64])
FILE = Path("data.json")


def scan(text: str, size: int) -> list:
    return list(_Scanner(FILE, (text[i : i + size] for i in range(0, len(text), size))).rows())


@given(st.lists(VALUES), STYLES, SIZES, st.sampled_from(["", " ", "\n\t\r\n "]))
def test_a_list_is_read_as_json_reads_it(rows, style, size, blank):
    assert scan(blank + json.dumps(rows, **style) + blank, size) == rows


@given(st.lists(OBJECTS, max_size=4), OBJECTS, STYLES, SIZES, st.sampled_from(["samples", "data", "items"]))
def test_a_wrapped_list_is_read_wherever_it_stands(rows, others, style, size, wrapper):
    for whole in ({wrapper: rows, **others}, {**others, wrapper: rows}):
        assert scan(json.dumps(whole, **style), size) == rows


@given(OBJECTS, STYLES, SIZES)
def test_an_object_is_one_row(row, style, size):
    assert scan(json.dumps(row, **style), size) == [row]


@given(st.lists(OBJECTS, min_size=1, max_size=4), SIZES)
def test_objects_on_lines_of_their_own_are_rows(rows, size):
    assert scan("\n".join(map(json.dumps, rows)), size) == rows


@given(st.lists(OBJECTS, max_size=3), STYLES, SIZES, st.data())
def test_what_json_refuses_is_refused_at_the_same_place(rows, style, size, data):
    text = json.dumps(rows, **style)
    at = data.draw(st.integers(1, len(text)))
    cut = data.draw(st.integers(at, min(len(text), at + 2)))
    text = text[:at] + data.draw(st.sampled_from(["", ",", "]", "}", '"', ":", "x", "1", "\\"])) + text[cut:]
    try:
        wanted = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(DataError) as caught:
            scan(text, size)
        # of a comma before a closing bracket, Python 3.13 names the comma
        if not error.msg.startswith("Illegal trailing comma"):
            assert f"at line {error.lineno}, column {error.colno}: " in str(caught.value)
    else:
        if "\\ud" not in text:  # a pair that was cut is json's to accept and ours to refuse
            assert scan(text, size) == wanted


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    return write


@pytest.mark.parametrize("name, text, message", [
    ("a.json", '{"a": 1} {"b": 2}', "line 1, column 10: Extra data"),
    ("a.json", "[1] 2", "line 1, column 5: Extra data"),
    ("a.json", '[{"a": "\\ud83d"}]', "line 1, column 2: half of a surrogate pair"),
    ("a.json", "[" * 100_000, "nested too deeply"),
    ("a.json", "[" + "1" * 5000 + "]", "line 1, column 2: Exceeds the limit"),
    ("a.json", '{"samples": [], "items": []}', "an object with 'samples' and 'items', which both may be the samples"),
    ("a.json", '{"data": [], "messages": []}', "an object with 'data' and 'messages'"),
    ("a.jsonl", '{"a": 1}\n\n{"b": 2\n{"c": 3}', "line 3, column 8: Expecting ',' delimiter"),
    ("a.jsonl", '{"a": 1}\n{"b": 2} 3\n', "line 2, column 10: Extra data"),
    ("a.jsonl", "{}\n\u00a0\n", "line 2, column 1: Expecting value"),
    ("a.ndjson", "{}\n{}\n{x}\n", "line 3, column 2: Expecting property name"),
])  # fmt: skip
def test_a_damaged_file_is_told_with_line_and_column(name, text, message, file):
    with pytest.raises(DataError) as caught:
        list(read_rows(file(text, name)))
    assert name in str(caught.value) and message in str(caught.value)


def test_characters_outside_the_basic_plane_are_no_halves(file):
    assert list(read_rows(file('["\\ud83d\\ude00", "😀"]'))) == ["😀", "😀"]


def test_a_byte_order_mark_is_no_text(file):
    for name in ("a.json", "a.jsonl"):
        assert list(read_rows(file('\ufeff{"a": "ü"}', name))) == [{"a": "ü"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_that_is_no_text_is_counted_from_the_beginning_of_the_file(name, tmp_path):
    text = b'\xef\xbb\xbf["' + b"x" * 70_000 + b'"]\n'
    (tmp_path / name).write_bytes(text + b"\xff")
    with pytest.raises(DataError, match=f"not UTF-8 text \\(byte {len(text)}\\)"):
        list(read_rows(tmp_path / name))


def test_lines_may_be_blank_and_end_as_on_windows(file):
    assert list(read_rows(file('{"a": 1}\r\n\r\n{"b": 2}\r\n', "a.jsonl"))) == [{"a": 1}, {"b": 2}]


def test_the_first_row_of_another_file_is_none(file, tmp_path):
    assert first_row(file("a|b", "metadata.csv")) is None and first_row(tmp_path) is None


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_come_before_the_rest_is_read(name, tmp_path):
    """The first row of a long file whose end is damaged, and no more memory than some rows take."""
    path, rows = tmp_path / name, 20_000
    write_rows(({"number": number, "text": "x" * 200} for number in range(rows)), path)
    with path.open("ab") as stream:
        stream.write(b"\xff")
    tracemalloc.start()
    reading = read_rows(path)
    assert all(next(reading)["number"] == number for number in range(rows - 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 5
    with pytest.raises(DataError, match="not UTF-8"):
        list(reading)


def test_a_long_row_costs_time_in_proportion_to_its_length(tmp_path):
    """8 MB of text in one row: each retry reads twice as much, so that it is decoded a few times and not a hundred."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"raw_audio": "A" * 8_000_000}]))
    scanner = _Scanner(path, iter(path.read_text()[i : i + 65_536] for i in range(0, 8_000_100, 65_536)))
    fills, fill = [], scanner.fill
    scanner.fill = lambda: fills.append(1) or fill()
    assert len(list(scanner.rows())[0]["raw_audio"]) == 8_000_000
    assert len(fills) < 15
