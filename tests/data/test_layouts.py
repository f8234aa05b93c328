"""Layouts: the turns that inference asks with, made of rows in any shape."""

from dataclasses import replace

import pytest

from engine.data.conversation import Message, Text
from engine.data.layouts import Layout, LayoutError, strip_instruction
from tests.data.layout_rows import (
    ANSWER,
    COLON,
    PLAIN,
    REFERENCE,
    REQUEST,
    ROOM,
    ROW,
    SECOND,
    TAGGED,
    TARGET,
    TWO_VOICES,
    answer,
    dialogue,
    seed_row,
    turns,
    user,
)

CLONING = Layout("voice_cloning", normalize_text=False)
SYSTEM = f"Generate audio following instruction.\n\n<|scene_desc_start|>\n{ROOM}\n<|scene_desc_end|>"


def test_a_single_tag_is_no_reason_to_describe_its_speaker():
    row = dialogue(("[SPEAKER0] a", TARGET))
    assert turns(row, "multi_speaker") == turns(row, "single_speaker")


def system_text(sample, name="auto", **settings) -> str:
    (text,) = turns(sample, name, **settings)[0].texts
    return text


# ---- voice_cloning


def test_turns_of_voice_cloning_are_those_of_inference():
    assert turns(ROW, "voice_cloning", normalize_text=False) == [
        Message("system", (Text(SYSTEM),)), user("Hello there."), answer(REFERENCE), user(COLON), answer(TARGET),
    ]  # fmt: skip


@pytest.mark.parametrize("scene", [None, ""])
def test_without_a_scene_the_system_turn_is_its_prompt(scene):
    assert system_text(ROW, "voice_cloning", system_prompt="Speak.", scene=scene) == "Speak."


@pytest.mark.parametrize("misc, texts, expected", [
    ({}, ("ref", "target"), ["ref", "target"]),
    ({"ref_transcript": "r", "target_transcript": "t"}, ("ref", "target"), ["r", "t"]),
    ({"ref_transcript": "r", "target_transcript": "t"}, ("target",), ["r", "t"]),
    ({"ref_transcript": "r"}, (REQUEST + COLON,), ["r", COLON]),
    ({"ref_transcript": None, "target_transcript": "t"}, ("ref", "x"), ["ref", "t"]),
    ({"target_transcript": COLON}, ("ref", "x"), ["ref", COLON]),
    ({}, ("ref", "between", REQUEST + "target"), ["ref", "target"]),
    ({"target_transcript": "t"}, ("said in the clip",), ["said in the clip", "t"]),
    ({"ref_transcript": "r"}, ("to say",), ["r", "to say"]),
])  # fmt: skip
def test_texts_come_from_misc_or_else_from_the_message(misc, texts, expected):
    made = CLONING.apply(seed_row(*texts, misc=misc)).messages
    assert [text for message in made if message.role == "user" for text in message.texts] == expected


@pytest.mark.parametrize("misc, texts, missing", [
    ({}, ("said in the clip",), "the target"),
    ({}, (REQUEST + "target",), "the reference"),
    ({"target_transcript": "t"}, (REQUEST + "target",), "the reference"),
    ({"ref_transcript": "r", "target_transcript": " "}, ("x", "y"), "the target"),
    ({"ref_transcript": 5}, ("x", "y"), "the reference"),
    ({}, ("ref", REQUEST), "the target"),
])  # fmt: skip
def test_a_text_that_is_nowhere_is_asked_for(misc, texts, missing):
    with pytest.raises(LayoutError, match=f"no text of {missing} → give it as misc"):
        CLONING.apply(seed_row(*texts, misc=misc))


@pytest.mark.parametrize("text, kept", [
    (REQUEST + COLON, COLON),
    ("  " + REQUEST + "  hi ", "hi"),
    (COLON, COLON),
    ("Say this: " + COLON, "Say this: " + COLON),
    (COLON + " " + REQUEST, COLON + " " + REQUEST),
])  # fmt: skip
def test_only_the_known_instruction_is_stripped(text, kept):
    assert strip_instruction(text) == kept


# ---- the other layouts


def test_references_in_the_system_turn_have_no_text_of_theirs():
    one, two = turns(ROW, "reference_in_system"), turns(TWO_VOICES, "reference_in_system")
    start = f"Generate audio following instruction.\n\n<|scene_desc_start|>\n{ROOM}\n\nSPEAKER0: "
    assert one == [
        Message("system", (Text(start), REFERENCE, Text("\n<|scene_desc_end|>"))), user(COLON + "."), answer(TARGET)
    ]  # fmt: skip
    voices = (Text(start), REFERENCE, Text("\nSPEAKER1: "), SECOND, Text("\n<|scene_desc_end|>"))
    assert two == [Message("system", voices), user("[SPEAKER0] Hi. [SPEAKER1] Hello."), answer(TARGET)]


def test_a_reference_in_the_system_turn_without_a_scene():
    (first, *_) = turns(ROW, "reference_in_system", scene=None, system_prompt="Speak.")[0].content
    assert first == Text("Speak.\n\n<|scene_desc_start|>\nSPEAKER0: ")


def test_a_reference_in_the_system_turn_needs_no_transcript():
    untold = dialogue(("Hi.", TARGET), references=((None, REFERENCE),))
    assert turns(untold, "reference_in_system")[0].audios == [REFERENCE]
    with pytest.raises(LayoutError, match="no text of the reference .* prompt_layout: reference_in_system"):
        turns(untold, "voice_cloning")


@pytest.mark.parametrize("row, text", [(PLAIN, "Good day."), (ROW, COLON + ".")])
def test_a_single_speaker_has_a_scene_and_a_text(row, text):
    assert turns(row, "single_speaker") == [Message("system", (Text(SYSTEM),)), user(text), answer(TARGET)]


def test_several_references_are_tagged_turns():
    assert turns(TWO_VOICES, "multi_speaker") == [
        Message("system", (Text(SYSTEM),)),
        user("[SPEAKER0] I am one."), answer(REFERENCE), user("[SPEAKER1] I am two."), answer(SECOND),
        user("[SPEAKER0] Hi. [SPEAKER1] Hello."), answer(TARGET),
    ]  # fmt: skip


def test_one_reference_of_multi_speaker_has_no_tag():
    assert turns(ROW, "multi_speaker") == turns(ROW, "voice_cloning")


DESCRIBED = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following "
    "text, using the specified voice.\n"
    "If no speaker tag is present, select a suitable voice on your own.\n\n<|scene_desc_start|>\n"
    f"{ROOM}\n\nSPEAKER0: feminine\nSPEAKER1: masculine\n<|scene_desc_end|>"
)


def test_speakers_without_reference_are_described():
    assert system_text(TAGGED, "multi_speaker") == DESCRIBED
    assert system_text(TAGGED, "multi_speaker", scene=None) == DESCRIBED.replace(f"{ROOM}\n\n", "")
    assert turns(TAGGED, "multi_speaker")[1:] == [user("[SPEAKER0] Hi.\n[SPEAKER1] Hello."), answer(TARGET)]


@pytest.mark.parametrize("speakers, expected", [
    ({"SPEAKER0": "old and hoarse", "SPEAKER1": "a child"}, "SPEAKER0: old and hoarse\nSPEAKER1: a child"),
    ({"SPEAKER1": "a child"}, "SPEAKER0: feminine\nSPEAKER1: a child"),
    ({"SPEAKER0": None, "SPEAKER7": "nobody"}, "SPEAKER0: feminine\nSPEAKER1: masculine"),
    (["no names"], "SPEAKER0: feminine\nSPEAKER1: masculine"),
])  # fmt: skip
def test_a_row_may_describe_its_speakers(speakers, expected):
    row = replace(TAGGED, misc={"speakers": speakers})
    assert f"\n\n{expected}\n<|scene_desc_end|>" in system_text(row, "multi_speaker")


def test_tags_of_all_rounds_are_described_once_each():
    row = dialogue(("[SPEAKER1] a", TARGET), ("[SPEAKER0] b [SPEAKER1] c", ANSWER))
    assert system_text(row, "multi_speaker", scene=None).endswith("SPEAKER0: feminine\nSPEAKER1: masculine\n"
                                                                  "<|scene_desc_end|>")  # fmt: skip


# ---- texts


@pytest.mark.parametrize("name", ["voice_cloning", "reference_in_system", "single_speaker", "multi_speaker"])
def test_texts_to_speak_are_normalised_and_transcripts_only_stripped(name):
    row = seed_row(" said（softly） ", REQUEST + "你好，Alice")
    texts = [message.texts[-1] for message in turns(row, name) if message.role == "user"]
    transcripts = [] if name in ("reference_in_system", "single_speaker") else ["said（softly）"]
    assert texts == [*transcripts, "你好, Alice."]


def test_texts_stay_as_they_are_if_asked():
    made = turns(seed_row(" said ", "a（b） "), "voice_cloning", normalize_text=False)
    assert [m.texts[0] for m in made if m.role == "user"] == [" said ", "a（b） "]
    as_written = seed_row("said", "a（b）")
    assert Layout("as_written").apply(as_written) is as_written


# ---- settings and rows


@pytest.mark.parametrize("given, scene", [("A loud street.", "A loud street."), ("", None), (None, ROOM), (5, ROOM)])
def test_the_scene_of_a_row_beats_the_setting(given, scene):
    row = seed_row("ref", "target", misc={"scene": given})
    for name in ("voice_cloning", "single_speaker", "reference_in_system"):
        assert turns(row, name) == turns(seed_row("ref", "target"), name, scene=scene)


@pytest.mark.parametrize("row, name", [(ROW, "voice_cloning"), (PLAIN, "single_speaker"), (TAGGED, "multi_speaker")])
def test_the_system_prompt_is_replaced_and_the_scene_stays(row, name):
    text = system_text(row, name, system_prompt="Speak.")
    assert text.startswith(f"Speak.\n\n<|scene_desc_start|>\n{ROOM}\n")


# ---- without references


def test_speech_without_its_references():
    single = turns(ROW, "single_speaker")
    for name in ("voice_cloning", "reference_in_system", "single_speaker", "multi_speaker", "auto"):
        assert list(Layout(name).apply(ROW, with_references=False).messages) == single
    assert list(Layout("multi_speaker").apply(TWO_VOICES, with_references=False).messages) == [
        Message("system", (Text(DESCRIBED),)), user("[SPEAKER0] Hi. [SPEAKER1] Hello."), answer(TARGET)
    ]  # fmt: skip
    assert Layout("as_written").apply(ROW, with_references=False) is ROW
    alone = Layout("voice_cloning", train_reference=True).apply(ROW, with_references=False)
    assert alone.start_index == 2, "only the answer is left to train"


def test_a_row_that_needs_no_references_is_the_same_without():
    for row, name in ((PLAIN, "single_speaker"), (TAGGED, "multi_speaker")):
        assert Layout(name).apply(row, with_references=False) == Layout(name).apply(row)
