"""Tokens and labels: what of a conversation is asked and trained, and that inference sees what training saw."""

from dataclasses import replace

import pytest

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message, Text
from engine.data.layouts import Layout, LayoutError
from engine.data.prompts import IGNORED, PromptTokenizer
from engine.model.weights import load_tokenizer
from tests.conftest import GOLDEN

REFERENCE, TARGET = Audio(Recording("reference.wav")), Audio(Recording("target.wav"))
CLONING = Layout("voice_cloning", normalize_text=False)


@pytest.fixture(scope="module")
def tokenize():
    return PromptTokenizer(load_tokenizer(GOLDEN / "tokenizer"))


def cloned(reference_text: str, text: str) -> Conversation:
    """A row of a text in the voice of a reference."""
    user = Message("user", (Text(reference_text), REFERENCE, Text(text)))
    return Conversation((user, Message("assistant", (Text("what is said"), TARGET))))


ROW = cloned("Hello there.", "Meet me at 10:30 today: bring water")


def decoded(tokenize, prompt) -> str:
    return tokenize.tokenizer.decode(prompt.input_ids)


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
    assert decoded(tokenize, tokenize(CLONING.apply(ROW))) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello there.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMeet me at 10:30 today: bring water<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    )


def test_a_reference_in_the_system_turn_is_heard_there(tokenize):
    prompt = tokenize(Layout("reference_in_system").apply(ROW))
    assert decoded(tokenize, prompt) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n\n"
        "SPEAKER0: <|audio_bos|><|AUDIO|><|audio_eos|>\n<|scene_desc_end|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMeet me at 10:30 today: bring water.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    )
    assert prompt.audios == (REFERENCE, TARGET) and prompt.trained == (False, True)
    assert (prompt.labels != IGNORED).sum() == 4, "the target's markup alone is trained text"


@pytest.mark.parametrize("train_reference", [False, True])
def test_a_reference_turn_is_trained_on_request(train_reference, tokenize):
    prompt = tokenize(replace(CLONING, train_reference=train_reference).apply(ROW))
    assert prompt.audios == (REFERENCE, TARGET) and prompt.trained == (train_reference, True)
    assert (prompt.labels != IGNORED).sum() == 4 * sum(prompt.trained)


@pytest.mark.parametrize("layout", ["voice_cloning", "reference_in_system", "as_written"])
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
        tokenize(CLONING.apply(cloned("ref", f"play {token} now")))
