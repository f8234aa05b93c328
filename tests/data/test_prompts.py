"""Layouts and turns: what of a conversation is asked and trained, and that inference sees what training saw."""

from dataclasses import replace

import pytest

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message, Text
from engine.data.prompts import IGNORED, Layout, LayoutError, PromptTokenizer, has_seed_shape, strip_instruction
from engine.model.weights import load_tokenizer
from tests.conftest import GOLDEN

REQUEST = "Please generate speech for given text in reference audio's voice: "
REFERENCE, TARGET = Audio(Recording("reference.wav")), Audio(Recording("target.wav"))
COLON = "Meet me at 10:30 today: bring water"
CLONING = Layout("voice_cloning")


@pytest.fixture(scope="module")
def tokenize():
    return PromptTokenizer(load_tokenizer(GOLDEN / "tokenizer"))


def seed_row(*texts, misc=None, start_index=None, system="Generate speech in the provided voice."):
    """A conversation of the seed's shape: the texts around the reference, then target text and target audio."""
    content = [Text(text) for text in texts]
    content.insert(1, REFERENCE)
    messages = (
        Message("system", (Text(system),)),
        Message("user", tuple(content)),
        Message("assistant", (Text("what is said"), TARGET)),
    )
    return Conversation(messages[not system :], start_index=start_index, misc=misc or {})


ROW = seed_row("Hello there.", REQUEST + COLON)


def user_texts(sample, layout=CLONING):
    return [text for message in layout.apply(sample).messages if message.role == "user" for text in message.texts]


# ---- the voice_cloning layout


def test_turns_of_voice_cloning_are_those_of_inference():
    system, *turns = CLONING.apply(ROW).messages
    assert system.texts == [
        "Generate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|>"
    ]
    assert turns == [
        Message("user", (Text("Hello there."),)),
        Message("assistant", (REFERENCE,)),
        Message("user", (Text(COLON),)),
        Message("assistant", (TARGET,)),
    ]


@pytest.mark.parametrize("scene", [None, ""])
def test_without_a_scene_the_system_turn_is_its_prompt(scene):
    layout = Layout("voice_cloning", system_prompt="Speak.", scene=scene)
    assert layout.apply(ROW).messages[0] == Message("system", (Text("Speak."),))


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
    assert user_texts(seed_row(*texts, misc=misc)) == expected


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


OTHER_SHAPES = {
    "no reference": (Message("user", (Text("a"),)), Message("assistant", (TARGET,))),
    "two references": (Message("user", (Text("a"), REFERENCE, REFERENCE)), Message("assistant", (TARGET,))),
    "no text": (Message("user", (REFERENCE,)), Message("assistant", (TARGET,))),
    "no target": (Message("user", (Text("a"), REFERENCE)), Message("assistant", (Text("b"),))),
    "two targets": (Message("user", (Text("a"), REFERENCE)), Message("assistant", (TARGET, TARGET))),
    "two rounds": (Message("user", (Text("a"), REFERENCE)), Message("assistant", (TARGET,))) * 2,
    "no answer": (Message("user", (Text("a"), REFERENCE)),),
}


def test_auto_rebuilds_the_seeds_shape():
    assert has_seed_shape(ROW) and Layout().apply(ROW) == CLONING.apply(ROW)
    bare = seed_row("a", "b", system="")
    assert len(bare.messages) == 2 and Layout().apply(bare) == CLONING.apply(bare)
    assert Layout("as_written").apply(ROW) is ROW


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_auto_keeps_any_other_shape_as_written(shape):
    sample = Conversation(OTHER_SHAPES[shape])
    assert Layout().apply(sample) is sample
    with pytest.raises(LayoutError, match="set prompt_layout: as_written"):
        CLONING.apply(sample)


@pytest.mark.parametrize("start_index, train_reference, expected", [
    (None, False, (False, True)), (0, False, (False, True)), (2, False, (False, True)), (3, False, (False, False)),
    (None, True, (True, True)), (2, True, (True, True)), (3, True, (False, False)),
])  # fmt: skip
def test_the_reference_is_trained_on_request_only(start_index, train_reference, expected, tokenize):
    # start_index counts the messages of the row as written: number 2 is the answer
    layout = replace(CLONING, train_reference=train_reference)
    prompt = tokenize(layout.apply(seed_row("ref", "target", start_index=start_index)))
    assert prompt.audios == (REFERENCE, TARGET) and prompt.trained == expected
    assert (prompt.labels != IGNORED).any() == any(expected)


# ---- tokens and labels


def trained_text(tokenize, sample) -> str:
    labels = tokenize(sample).labels
    return tokenize.tokenizer.decode(labels[labels != IGNORED])


def conversation(start_index=None):
    messages = (
        Message("system", (Text("System."),)),
        Message("user", (Text("One?"),)),
        Message("assistant", (Text("First."),)),
        Message("user", (Text("Two?"),)),
        Message("assistant", (Text("Second."), TARGET)),
    )
    return Conversation(messages, start_index)


FIRST, SECOND = "First.<|eot_id|>", "Second.<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"


@pytest.mark.parametrize("start_index, trained, clip", [
    (None, FIRST + SECOND, True), (0, FIRST + SECOND, True), (2, FIRST + SECOND, True),
    (3, SECOND, True), (4, SECOND, True), (5, "", False), (99, "", False),
])  # fmt: skip
def test_assistant_turns_from_start_index_are_trained(start_index, trained, clip, tokenize):
    sample = conversation(start_index)
    assert trained_text(tokenize, sample) == trained
    assert tokenize(sample).trained == (clip,)


def test_a_conversation_reads_as_the_original_writes_it(tokenize):
    assert tokenize.tokenizer.decode(tokenize(CLONING.apply(ROW)).input_ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello there.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMeet me at 10:30 today: bring water<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    )


@pytest.mark.parametrize("layout", ["voice_cloning", "as_written"])
def test_inference_asks_with_the_very_tokens_of_training(layout, tokenize):
    sample = Layout(layout).apply(ROW)
    if layout == "as_written":  # the target's text would stand before its audio
        sample = replace(sample, messages=(*sample.messages[:-1], Message("assistant", (TARGET,))))
    trained, asked = tokenize(sample), tokenize.inference(sample)
    ids = trained.input_ids.tolist()
    cue = tokenize.tokenizer.convert_tokens_to_ids("<|audio_out_bos|>")
    last = len(ids) - 1 - ids[::-1].index(cue)
    assert asked.input_ids.tolist() == ids[: last + 1] and ids[last + 1] == tokenize.special.audio_out
    assert asked.audios == (REFERENCE,) and asked.trained == (False,)
    assert (asked.labels == IGNORED).all()


@pytest.mark.parametrize("token", ["<|AUDIO|>", "<|AUDIO_OUT|>"])
def test_a_placeholder_within_a_text_is_refused(token, tokenize):
    with pytest.raises(LayoutError, match="give clips as audio items instead"):
        tokenize(CLONING.apply(seed_row("ref", f"play {token} now")))
