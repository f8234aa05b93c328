"""Normalisation of texts to speak: the original inference's, step by step, and none of the slips of its copies."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.data.text import ENDINGS, normalize

quick = settings(max_examples=300, deadline=None, derandomize=True)


def stated(text: str) -> str:
    """The original's steps once more, written out; characters by number, so that no editor straightens them."""
    for number, mark in {
        0xFF0C: ", ", 0x3002: ".", 0xFF1A: ":", 0xFF1B: ";", 0xFF1F: "?", 0xFF01: "!", 0xFF08: "(", 0xFF09: ")",
        0x3010: "[", 0x3011: "]", 0x300A: "<", 0x300B: ">", 0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'",
        0x3001: ",", 0x2014: "-", 0x2026: "...", 0x00B7: ".", 0x300C: '"', 0x300D: '"', 0x300E: '"', 0x300F: '"',
    }.items():  # fmt: skip
        text = text.replace(chr(number), mark)
    text = text.replace("(", " ").replace(")", " ")
    text = text.replace("\u00b0F", " degrees Fahrenheit").replace("\u00b0C", " degrees Celsius")
    for tag, event in EVENTS.items():
        text = text.replace(tag, event)
    text = "\n".join([" ".join(line.split()) for line in text.split("\n") if line.strip()]).strip()
    if not any(text.endswith(end) for end in [".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>"]):
        text += "."
    return text


EVENTS = {
    "[laugh]": "<SE>[Laughter]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>", "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>", "[music end]": "<SE_e>[Music]</SE_e>", "[music]": "<SE>[Music]</SE>",
    "[sing start]": "<SE_s>[Singing]</SE_s>", "[sing end]": "<SE_e>[Singing]</SE_e>",
    "[applause]": "<SE>[Applause]</SE>", "[cheering]": "<SE>[Cheering]</SE>", "[cough]": "<SE>[Cough]</SE>",
}  # fmt: skip

MARKS = "，。：；？！（）【】《》\u201c\u201d\u2018\u2019、—…·「」『』"
PIECES = [*MARKS, *EVENTS, *EVENTS.values(), *ENDINGS, *"()°[]<>/_ \t\n\u3000", "°C", "°F", "  ", "\r\n", "Alice",
          "SE", "e", "°", "你好", "[SPEAKER0]", "--", "humming", "start"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("written, spoken", [
    ("a，b", "a, b."), ("a。", "a."), ("a：b", "a:b."), ("a；", "a;"), ("a？", "a?"), ("a！", "a!"),
    ("（a）b", "a b."), ("【a】", "[a]."), ("《a》", "<a>."), ("a、b", "a,b."), ("a—b", "a-b."), ("a——b", "a--b."),
    ("a…", "a..."), ("a·b", "a.b."), ("「a」", '"a"'), ("『a』", '"a"'),
    ("\u201ca\u201d", '"a"'), ("\u2018a\u2019", "'a'"), ("it\u2019s", "it's."),
])  # fmt: skip
def test_each_mark_has_its_plain_one(written, spoken):
    assert normalize(written) == spoken


@pytest.mark.parametrize("plain", ["\"a\" 'b'", "a-b -- c.", "a & b @ 5% *~^|\\`#$+={}.", "[SPEAKER0] a.", "<b>a</b>!"])
def test_plain_marks_stay(plain):
    assert normalize(plain) == plain


@pytest.mark.parametrize("written, spoken", [
    ("10°C", "10 degrees Celsius."), ("50°F", "50 degrees Fahrenheit."), ("10 °C now", "10 degrees Celsius now."),
    ("a 90° turn", "a 90° turn."), ("f(x) is", "f x is."), ("()", "."), ("10（°C）", "10 degrees Celsius."),
])  # fmt: skip
def test_brackets_are_not_read_and_degrees_are(written, spoken):
    assert normalize(written) == spoken


@pytest.mark.parametrize("tag", EVENTS)
def test_each_sound_tag_has_its_token(tag):
    assert normalize(f"a {tag} b") == f"a {EVENTS[tag]} b."
    assert normalize(tag.replace("[", "【").replace("]", "】") + "!") == EVENTS[tag] + "!"


def test_unknown_tags_stay():
    assert normalize("[laughs] [Laugh] [humming]") == "[laughs] [Laugh] [humming]."


@pytest.mark.parametrize("ended", ["a.", "a!", "a?", "a,", "a;", 'a"', "a'", "a [laugh]", "a [music end]"])
def test_an_ended_text_gets_no_period(ended):
    assert not normalize(ended).endswith("..") and normalize(ended)[-1] == (">" if "[" in ended else ended[-1])


@pytest.mark.parametrize("open_end", [
    "Alice", "YES", "SE", "be", "_", "a/", "a <b", "b>", "a:", "a-", "[b]", "7", "</S", "a [music start]", "</SE_s>",
])  # fmt: skip
def test_any_other_text_gets_its_period(open_end):
    # a copy takes each letter of "</SE_e>" for an ending of its own
    assert normalize(open_end) == stated(open_end) and normalize(open_end)[-1] == "."


@pytest.mark.parametrize("written, spoken", [
    ("  a \t b  ", "a b."), ("a\n\n \n b  c\n", "a\nb c."), ("a\r\nb", "a\nb."), ("a\u3000b\u00a0c", "a b c."),
    ("\n\n", "."), ("", "."),
])  # fmt: skip
def test_whitespace_is_collapsed_line_by_line(written, spoken):
    assert normalize(written) == spoken


def test_a_chinese_text():
    assert normalize("他说：\u201c你好，世界！\u201d（笑）【laugh】\n\n今天—10°C…《三体》") == (
        '他说:"你好, 世界!" 笑 <SE>[Laughter]</SE>\n今天-10 degrees Celsius...<三体>.'
    )


@quick
@given(texts)
def test_equals_the_originals_steps(text):
    assert normalize(text) == stated(text)


@quick
@given(texts)
def test_a_second_time_changes_nothing(text):
    once = normalize(text)
    assume(not any(tag in once for tag in EVENTS))  # "[humming  start]" becomes a tag by its whitespace only
    assert normalize(once) == once
