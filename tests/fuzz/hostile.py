"""Hostile input: values that nobody expects, valid trees with some of them in it, and bytes with damage."""

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "\u202e", "\x1b[2J", "a\nb", "..", "../..", "../../x", "/etc/passwd", "/dev/zero",
    "~/x", "~nobody/x", "file:///etc/passwd", "https://localhost/x", "a" * 5000, "é" * 300, "%s%n", "{0.__class__}",
    "null", "NaN", "true", "1e999", "-0", "<script>", "$(id)", "a/b", "a.wav", "gone.wav", "<audio>", "\ufeff",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 1024, 1025, 32768, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308,
    math.inf, -math.inf, math.nan,
)  # fmt: skip
DEEP = "nested 100,000 times"
"""In a tree, what `as_json` writes as such a list."""
ODD = (None, True, False, *NUMBERS, *TEXTS, DEEP, [], {}, [[]], [{}], [None], {"": None}, {"a": {"a": {}}}, [0] * 300)
values = (st.sampled_from(ODD) | st.text(max_size=8) | st.lists(st.sampled_from(NUMBERS), max_size=3)).map(
    copy.deepcopy
)
BYTES = (
    b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n",
    b"\r", b"\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"'", b"&a ", b"*a",
    b"!!python/name:os.system", b"<<: ", b"\0" * 64, b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"-1",
    b"1e999", b"NaN", b"../", b"\x80\x04cos\nsystem\n",
)  # fmt: skip


@st.composite
def changed(draw, valid: Any) -> Any:
    """A tree of lists and objects with one to four places replaced, taken away, doubled, wrapped or added to."""
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(tree))
        if not places:
            return draw(values)
        inside, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "wrap", "add", "double")))
        if action == "replace":
            inside[key] = draw(values)
        elif action == "remove":
            del inside[key]
        elif action == "wrap":
            inside[key] = draw(st.sampled_from(([inside[key]], {"a": inside[key]}, str(inside[key]))))
        elif isinstance(inside, list):
            inside.insert(key, copy.deepcopy(inside[key]) if action == "double" else draw(values))
        else:
            inside[draw(st.sampled_from(TEXTS))] = inside[key] if action == "double" else draw(values)
    return tree


def _places(tree: Any):
    """(list or object, index or key) of everything in a tree, to a depth that recursion bears."""
    waiting = [(tree, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, (list, dict)) and depth < 12:
            for key in range(len(part)) if isinstance(part, list) else part:
                yield part, key
                waiting.append((part[key], depth + 1))


@st.composite
def damaged(draw, valid: bytes, first: int = 0, end: int | None = None) -> bytes:
    """Bytes with one to four places overwritten, taken out, put in, repeated or cut off, between `first` and `end`."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        top = min(len(content), len(content) if end is None else end)
        at = draw(st.integers(min(first, top), top))
        length = draw(st.integers(0, 40))
        action = draw(st.sampled_from(("flip", "flip", "overwrite", "insert", "remove", "repeat", "cut")))
        if action == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "overwrite":
            new = draw(st.sampled_from(BYTES) | st.binary(max_size=8))[:64]
            content[at : at + len(new)] = new
        elif action == "insert":
            content[at:at] = draw(st.sampled_from(BYTES))
        elif action == "remove":
            del content[at : at + length]
        elif action == "repeat":
            content[at:at] = content[at : at + length] * draw(st.sampled_from((1, 2, 50)))
        elif action == "cut":
            del content[at:]
    return bytes(content)


def as_json(tree: Any, ascii: bool = True) -> bytes:
    """JSON as Python writes it, with NaN and halves of surrogate pairs as escapes."""
    text = json.dumps(tree, ensure_ascii=ascii).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode("utf-8", "surrogatepass")
