"""Word and character errors between a text and what a speech recogniser heard.

Both are normalised alike, for a recogniser neither knows how a text was punctuated nor where it shouted:

| step | example |
|---|---|
| tags go: `<SE>[Laughter]</SE>`, `<|audio|>`, `[SPEAKER0]`, `[laugh]` | nobody says them |
| Unicode NFKC, then case folded | `Ｈｉ` and `HI` are `hi`, `ß` is `ss` |
| apostrophes within words go, all other punctuation and symbols become spaces | `It's—50%` is `its 50` |
| scripts that write no spaces: a word for each character | `太乙真人` is 4 words |

Letters, marks and digits stay. Numbers count as they are written: where the text has `10` and the recogniser writes
`ten`, that is an error, and so are traditional characters for simplified ones. Compare a score with the one that the
recording of the same text has, rather than with 0.

jiwer counts: the fewest words to replace, leave out and put in. Spaces are no characters.
"""

import re
import unicodedata

_TAG = re.compile(r"<(SE(?:_[se])?)>.*?</\1>|<\|[^<>|]*\|>|</?SE(?:_[se])?>|\[[A-Za-z0-9 _-]+\]")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019\u02bc](?=\w)")
_UNSPACED = (  # (first, last): scripts whose words are not parted by spaces
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # 々〆〇
    (0x3041, 0x30FF),  # kana
    (0x31F0, 0x31FF),  # small kana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def tokens(text: str) -> list[str]:
    """The normalised words of a text."""
    text = unicodedata.normalize("NFKC", _TAG.sub(" ", text)).casefold()
    text = _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text))  # again, for folding takes characters apart
    spaced, alone = [], False
    for character in text:
        kind = unicodedata.category(character)[0]
        if kind in "LN":
            before, alone = alone, _stands_alone(character)
            character = f" {character}" if alone or before else character
        elif kind != "M":  # marks, vowel signs among them, belong to the letter before them
            character, alone = " ", False
        spaced.append(character)
    return "".join(spaced).split()


def _stands_alone(letter: str) -> bool:
    code = ord(letter)
    return any(first <= code <= last for first, last in _UNSPACED)


def compare(text: str, heard: str) -> dict[str, float | int | None]:
    """Errors of `heard` against `text`: wer, cer, word_errors, words, character_errors, characters.

    The two rates are None for a text without words. More may be put in than the text has: rates exceed 1.
    """
    import jiwer  # here, for it is only needed with a speech recogniser

    wanted, found = tokens(text), tokens(heard)
    by_word = _errors(jiwer.process_words(" ".join(wanted), " ".join(found)))
    by_character = _errors(jiwer.process_characters("".join(wanted), "".join(found)))
    words, characters = len(wanted), sum(map(len, wanted))
    return {
        "wer": by_word / words if words else None,
        "cer": by_character / characters if characters else None,
        "word_errors": by_word,
        "words": words,
        "character_errors": by_character,
        "characters": characters,
    }


def _errors(counted) -> int:
    return counted.substitutions + counted.deletions + counted.insertions
