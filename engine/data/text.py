"""Text normalisation of the original's inference (boson-ai/higgs-audio, examples/generation.py).

Whoever asks the original to say "（笑）10°C" has it read another text; a model that was trained on the text as written
would meet texts at inference that training never showed. So training changes its texts in the same way.
"""

PUNCTUATION = {
    "，": ", ",
    "。": ".",
    "：": ":",
    "；": ";",
    "？": "?",
    "！": "!",
    "（": "(",
    "）": ")",
    "【": "[",
    "】": "]",
    "《": "<",
    "》": ">",
    "\u201c": '"',  # curly quotes, by number: a formatter that straightened them would change what is replaced
    "\u201d": '"',
    "\u2018": "'",
    "\u2019": "'",
    "、": ",",
    "—": "-",
    "…": "...",
    "·": ".",
    "「": '"',
    "」": '"',
    "『": '"',
    "』": '"',
}
SYMBOLS = {"(": " ", ")": " ", "°F": " degrees Fahrenheit", "°C": " degrees Celsius"}
SOUND_EVENTS = {
    "[laugh]": "<SE>[Laughter]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>",
    "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>",
    "[music end]": "<SE_e>[Music]</SE_e>",
    "[music]": "<SE>[Music]</SE>",
    "[sing start]": "<SE_s>[Singing]</SE_s>",
    "[sing end]": "<SE_e>[Singing]</SE_e>",
    "[applause]": "<SE>[Applause]</SE>",
    "[cheering]": "<SE>[Cheering]</SE>",
    "[cough]": "<SE>[Cough]</SE>",
}
ENDINGS = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")
"""Whole endings: a text that ends in the letter S or E has none of them."""

VERSION = 1
"""Part of a prepared store's identity: raise it with any change of what `normalize` returns."""


def normalize(text: str) -> str:
    """The text that the original's inference would send to the model in place of `text`.

    Its very steps in its order, so a second time changes nothing but a sound tag that had other whitespace within.
    """
    for table in (PUNCTUATION, SYMBOLS, SOUND_EVENTS):
        for old, new in table.items():
            text = text.replace(old, new)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    return text if text.endswith(ENDINGS) else text + "."
