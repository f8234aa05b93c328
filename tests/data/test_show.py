"""`validate --show`: what is printed of a sample is what its arrays hold, and no more columns wide than asked."""

import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message, Text
from engine.data.labels import StreamIds, delayed_labels, delayed_stream, merge
from engine.data.prompts import IGNORED, PromptTokenizer, SpecialTokens
from engine.data.show import show
from engine.data.text_diff import changes, origin
from engine.model.weights import load_tokenizer
from tests.conftest import GOLDEN, golden_codes

STREAM = StreamIds()
quick = settings(max_examples=100, deadline=None, derandomize=True)


def clip(name: str, **segment) -> Audio:
    return Audio(Recording(path=f"audio/{name}.wav", **segment))


REFERENCE, TARGET = clip("clip_001", offset=1.5, duration=2), clip("clip_002")
WRITTEN = Conversation(
    (
        Message("system", (Text("You help."),)),
        Message(
            "user",
            (
                Text("Hooray!"),
                REFERENCE,
                Text("Please generate speech for given text in reference audio's voice: It is 10°C in the west"),
            ),
        ),
        Message("assistant", (TARGET,)),
    ),
    speaker="ann",
    row=7,
)
TRAINED = replace(
    WRITTEN,
    messages=(
        Message("system", (Text("Generate audio following instruction."),)),
        Message("user", (Text("Hooray!"),)),
        Message("assistant", (REFERENCE,)),
        Message("user", (Text("It is 10 degrees Celsius in the west."),)),
        Message("assistant", (TARGET,)),
    ),
    start_index=4,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer")


def sample_of(conversation: Conversation, tokenizer, repeat: int = 1):
    """Prompt and sample, with the golden codes, of which there may be several in a row."""
    tokenize, codes = PromptTokenizer(tokenizer), golden_codes()
    prompt = tokenize(conversation)
    clips = [np.tile(codes[audio.recording.path.rpartition("/")[2]], repeat) for audio in prompt.audios]
    return prompt, merge(prompt, clips, tokenize.special, STREAM, conversation.row), clips


def shown(written: Conversation, trained: Conversation, tokenizer, repeat: int = 1, width: int = 100) -> str:
    prompt, sample, _ = sample_of(trained, tokenizer, repeat)
    return show(written, trained, prompt, sample, tokenizer, STREAM, width)


def grids(text: str) -> list[dict[int, list[str]]]:
    """For each clip of the printout: column -> the cells of its codebooks."""
    found, columns = [], []
    for line in text[text.index("DELAY GRIDS") :].splitlines():
        if line.startswith("clip "):
            found.append({})
        elif re.fullmatch(r"[ \d]+", line):
            columns = [int(c) for c in line.split()]
            found[-1] |= {c: [] for c in columns}
        elif line.startswith("  cb "):
            for column, cell in zip(columns, line.split()[2:], strict=True):
                found[-1][column].append(cell)
    return found


def test_turns_of_voice_cloning_golden(tokenizer):
    text = shown(WRITTEN, TRAINED, tokenizer)
    assert text.startswith(
        """Row 7, speaker ann

TURNS as written
  0 system    "You help."
  1 user      "Hooray!"
              clip audio/clip_001.wav from 1.5 s for 2 s, 0.48 s
              "Please generate speech for given text in reference audio's voice: It is 10°C in the
              west"
  2 assistant clip audio/clip_002.wav, 0.68 s

TURNS as trained
  0 system    context  "Generate audio following instruction."
  1 user      context  "Hooray!"
  2 assistant context  clip audio/clip_001.wav from 1.5 s for 2 s, 0.48 s
  3 user      context  "It is 10 degrees Celsius in the west."
                         changed: "°C" → " degrees Celsius"
                         changed: "west" → "west."
  4 assistant trained  clip audio/clip_002.wav, 0.68 s

TOKENS
"""
    )


def test_token_lines_are_the_arrays(tokenizer):
    prompt, sample, clips = sample_of(TRAINED, tokenizer)
    text = show(WRITTEN, TRAINED, prompt, sample, tokenizer, STREAM)
    lines = text[text.index("TOKENS") : text.index("DELAY GRIDS")].split("\n")[2:-2]
    tokens, runs = {}, []
    for line in lines:
        place, rest = line.split(maxsplit=1)
        if "…" in place:
            first, last = map(int, place.split("…"))
            runs.append((first, last, rest))
        else:
            number, label, piece = rest.split(maxsplit=2)
            tokens[int(place)] = (int(number), label == "trained", piece)
    audio = SpecialTokens.of(tokenizer).audio_out
    assert list(tokens) == np.flatnonzero(sample.input_ids != audio).tolist()
    for position, (number, trained, _) in tokens.items():
        assert number == sample.input_ids[position]
        assert trained == (sample.labels[position] != IGNORED)
    assert tokens[0][2] == '"<|begin_of_text|>"' and tokens[4][2] == '"\\n\\n"'
    covered = [p for first, last, _ in runs for p in range(first, last + 1)]
    assert covered == np.flatnonzero(sample.input_ids == audio).tolist()
    assert runs[0][2].split(maxsplit=1) == ["-", "audio frames of clip 0 (21 = 12 frames + 9)"]
    assert runs[1][2].split(maxsplit=1) == ["trained", "audio frames of clip 1 (26 = 17 frames + 9)"]


@pytest.mark.parametrize("repeat", [1, 4])
def test_grids_equal_the_delayed_streams(tokenizer, repeat):
    _, _, clips = sample_of(TRAINED, tokenizer, repeat)
    text = shown(WRITTEN, TRAINED, tokenizer, repeat)
    found = grids(text)
    assert len(found) == 2
    for grid, codes, trained in zip(found, clips, (False, True), strict=True):
        stream = delayed_stream(codes, STREAM)
        labels = delayed_labels(codes, STREAM) if trained else np.full_like(stream, IGNORED)
        ends = [*range(12), *range(len(stream) - 12, len(stream))]
        assert sorted(grid) == sorted(set(ends) if len(stream) > 24 else range(len(stream)))
        for column, cells in grid.items():
            names = [{STREAM.bos: "B", STREAM.eos: "E"}.get(int(code), str(code)) for code in stream[column]]
            marked = [n if lab != IGNORED else f"({n})" for n, lab in zip(names, labels[column], strict=True)]
            assert cells == marked, f"column {column}"


def test_one_grid_row_golden(tokenizer):
    """A trained clip of five frames, letter by letter."""
    answer = Conversation((Message("user", (Text("Hi"),)), Message("assistant", (clip("clip_004"),))))
    lines = shown(answer, answer, tokenizer).splitlines()
    codes = golden_codes()["clip_004.wav"]
    row = "".join(f"{code:>6} " for code in codes[2])
    _, sample, _ = sample_of(answer, tokenizer)
    first = int(np.flatnonzero(sample.input_ids == SpecialTokens.of(tokenizer).audio_out)[0])
    assert f"  columns 0…11 at positions {first}…{first + 11}" in lines
    assert f"  columns 12…13 at positions {first + 12}…{first + 13}" in lines
    starts = [line for line in lines if line.startswith("  cb 2 ")]
    assert starts[0] == "  cb 2  " + "    (B)" * 3 + row + "     E " + "    (E)" * 3
    assert starts[1] == "  cb 2  " + "    (E)" * 2


def test_totals_golden(tokenizer):
    prompt, sample, _ = sample_of(TRAINED, tokenizer)
    assert shown(WRITTEN, TRAINED, tokenizer).endswith(
        f"""
TOTALS
  tokens         {len(sample)} ({len(sample) - 47} text, 47 audio)
  text targets   3
  audio targets  144; by codebook 18 18 18 18 18 18 18 18
"""
    )


def test_a_conversation_that_is_trained_as_written_is_shown_once(tokenizer):
    text = shown(TRAINED, TRAINED, tokenizer)
    assert "TURNS, trained as they are written" in text and "TURNS as" not in text and "changed" not in text


def test_a_sample_without_audio_has_no_grid(tokenizer):
    spoken = Conversation((Message("user", (Text("Hi"),)), Message("assistant", (Text("Ho"),), "bob")))
    text = shown(spoken, spoken, tokenizer)
    assert "DELAY GRIDS" not in text and 'to "bob"' in text
    assert "audio targets  0; by codebook 0 0 0 0 0 0 0 0" in text


def test_whisper_positions_are_told_from_codes(tokenizer):
    """They come before the codes of a clip that is heard, and carry the id of <|AUDIO|>."""
    prompt, sample, _ = sample_of(WRITTEN, tokenizer)
    special = SpecialTokens.of(tokenizer)
    at = int(np.flatnonzero(sample.input_ids == special.audio_out)[0])
    heard = replace(
        sample,
        input_ids=np.insert(sample.input_ids, at, [special.audio_in] * 5),
        labels=np.insert(sample.labels, at, [IGNORED] * 5),
    )
    text = show(WRITTEN, WRITTEN, prompt, heard, tokenizer, STREAM)
    assert re.search(rf"{at}…{at + 4} +- +whisper x5, clip 0\n", text)
    assert re.search(rf"{at + 5}…{at + 25} +- +audio frames of clip 0 \(21 = 12 frames \+ 9\)\n", text)
    assert f"tokens         {len(heard)} ({len(sample) - 47} text, 47 audio, 5 whisper)" in text


def test_characters_spread_over_tokens_are_no_garbage(tokenizer):
    spoken = Conversation((Message("user", (Text("喵🙂"),)), Message("assistant", (Text("Ho"),))))
    text = shown(spoken, spoken, tokenizer)
    assert "\ufffd" not in text and "part of a character" in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_wider_than_asked(tokenizer, width):
    long = Conversation(
        (
            Message(
                "user", (Text("今天很冷" * 60), Text("x" * 300), clip("a" * 200 + "/clip_001"), Text("word " * 90))
            ),
            Message("assistant", (TARGET,)),
        )
    )
    for line in shown(long, replace(long, start_index=1), tokenizer, 3, width).splitlines():
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) <= width, line


def test_a_sample_of_another_row_is_refused(tokenizer):
    prompt, _, _ = sample_of(TRAINED, tokenizer)
    other = Conversation((Message("user", (Text("Hi"),)), Message("assistant", (TARGET,))))
    _, sample, _ = sample_of(other, tokenizer)
    with pytest.raises(ValueError, match="2 clips, the sample 1"):
        show(WRITTEN, TRAINED, prompt, sample, tokenizer, STREAM)


@pytest.mark.parametrize(
    "written, trained, wanted",
    [
        ("10°C today", "10 degrees Celsius today", [("°C", " degrees Celsius")]),
        ("in the west", "in the west.", [("west", "west.")]),
        ("今天，很冷", "今天, 很冷", [("，", ", ")]),
        ("the same", "the same", []),
    ],
)
def test_changes_are_small(written, trained, wanted):
    assert changes(written, trained) == wanted


@quick
@given(st.text("ab ,.今", max_size=30), st.text("ab ,.今", max_size=30))
def test_changes_tell_all_of_the_difference(written, trained):
    """Every stretch is in its text, in order, and there is none exactly if the texts are equal."""
    found = changes(written, trained)
    assert bool(found) == (written != trained)
    for side, text in ((0, written), (1, trained)):
        for change in found:
            assert change[side] in text
            text = text[text.index(change[side]) :]


def test_the_origin_of_a_text_is_found_among_the_written_ones():
    instruction = "Please generate speech: It is 10°C"
    assert origin("It is 10 degrees Celsius.", ["Hooray, it was warm!", instruction]) == "It is 10°C"
    assert origin("It is 10°C", [instruction]) is None, "taken over as it stands"
    assert origin("Nothing like them", ["Hooray!", instruction]) is None
    assert origin("Hm", []) is None
