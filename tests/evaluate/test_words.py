"""Word and character errors, counted by hand; and what normalisation leaves of a text."""

import pytest

from engine.evaluate.words import compare, tokens


@pytest.mark.parametrize(
    "text, words",
    [
        ("It's HERE — it\u2019s 50% off!", "its here its 50 off"),
        ("well-known e.g. 3.5", "well known e g 3 5"),
        ("'quoted' rock 'n' roll", "quoted rock n roll"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ ﬁne Straße", "full width fine strasse"),
        ("Mu\u0308ller", "müller"),
        ("你好，世界！", "你 好 世 界"),
        ("我爱AI吧。B站", "我 爱 ai 吧 b 站"),
        ("カレーを食べた", "カ レ ー を 食 べ た"),
        ("한국어 문장", "한국어 문장"),  # Korean parts its words
        ("हिन्दी में", "हिन्दी में"),  # vowel signs stay with their letters
        ("ที่นี่", "ที่ นี่"),
        ("ha <SE>[Laughter]</SE> ha [laugh] <|audio|>[SPEAKER0] ha", "ha ha ha"),
        ("<SE_s>[Humming]</SE_s>la<SE_e>[Humming]</SE_e>", "la"),
        ("《三体》和<三体> 【注意】[注意] a < b", "三 体 和 三 体 注 意 注 意 a b"),
        ("—…!", ""),
    ],
)
def test_what_is_left_of_a_text(text, words):
    assert tokens(text) == words.split()


@pytest.mark.parametrize(
    "text, heard, word_errors, words, character_errors, characters",
    [
        ("The cat sat on the mat.", "the cat sat on the mat", 0, 6, 0, 17),
        # "the" is left out, "sat" is "set", and "big" is put in.
        ("The cat sat on the mat.", "The cat set on big mat", 2, 6, 4, 17),
        ("a b", "a x y b", 2, 2, 2, 2),
        ("one two three", "", 3, 3, 11, 11),
        ("go", "no no no", 3, 1, 5, 2),
        ("ice cream", "icecream", 2, 2, 0, 8),  # spaces are no characters
        ("今天天气很好。", "今天天汽很", 2, 6, 2, 6),  # one is replaced, one left out
        ("太乙真人 says hi", "太一真人 said hi", 2, 6, 3, 10),
    ],
)
def test_errors_counted_by_hand(text, heard, word_errors, words, character_errors, characters):
    assert compare(text, heard) == {
        "wer": word_errors / words,
        "cer": character_errors / characters,
        "word_errors": word_errors,
        "words": words,
        "character_errors": character_errors,
        "characters": characters,
    }


def test_a_text_without_words_has_no_rate_but_errors():
    counted = compare("[laugh]", "ha ha")
    assert counted["wer"] is None and counted["cer"] is None
    assert (counted["word_errors"], counted["words"], counted["character_errors"]) == (2, 0, 4)
