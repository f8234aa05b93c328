"""What normalisation changed in a text, change by change.

Words are compared, and in scripts without spaces between words single characters, so that a changed comma does not
show a whole sentence.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

_TOKEN = re.compile(r"[^\W\u2e80-\u9fff]+|\s+|.", re.DOTALL)
SHARED_WORDS = 0.5
"""Share of the words of the shorter text that make another text its origin."""


def changes(written: str, trained: str) -> list[tuple[str, str]]:
    """(written, trained) of every stretch that differs; where one is empty, what precedes both goes with them."""
    old, new = _TOKEN.findall(written), _TOKEN.findall(trained)
    found = []
    for tag, i, end, j, stop in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag in ("insert", "delete") and i and j:
            i, j = i - 1, j - 1
        if tag != "equal":
            found.append(("".join(old[i:end]), "".join(new[j:stop])))
    return found


def origin(trained: str, written: Iterable[str]) -> str | None:
    """The written text that became `trained`; None if one has it as it stands, or none is near.

    A layout may take a text out of a longer one, where an instruction and a colon precede it.
    """
    written = list(written)
    if any(trained in text for text in written):
        return None
    candidates = [*written, *(text.partition(": ")[2] for text in written)]
    best = max(candidates, key=lambda text: _likeness(text, trained), default="")
    return best if _likeness(best, trained) >= SHARED_WORDS else None


def _likeness(written: str, trained: str) -> float:
    """Words in common over those of the shorter text; between equals, the one with less beside counts a little more."""
    old, new = ([token for token in _TOKEN.findall(text) if token[0].isalnum()] for text in (written, trained))
    if not old or not new:
        return 0.0
    shared = sum(block.size for block in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
    return shared / min(len(old), len(new)) + 1e-6 * shared / max(len(old), len(new))
