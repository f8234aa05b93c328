"""Rows that cannot be used whatever their recordings are: their codes, their form, or what they ask for is wrong."""

import copy
from collections.abc import Callable

from engine.data.demo_speech import SENTENCES
from tests.data.row_kinds import Kinds, Recordings, audio, clone, codes, kind_of, say

BAD_ROWS: Kinds = {}


@kind_of(BAD_ROWS, "audio_codes holds 1024 → give the codec's own codes, 0 to 1023, without BOS, EOS and delay")
def codes_with_bos(data):
    return say({"type": "audio", "audio_codes": [[1024, *book] for book in codes()]})


@kind_of(BAD_ROWS, "audio_codes: codebook 7 has 19 codes, codebook 0 has 20 → give one code a frame in each")
def codes_of_unequal_length(data):
    books = codes()
    books[7].pop()
    return say({"type": "audio", "audio_codes": books})


@kind_of(BAD_ROWS, "audio_codes is no list of codebooks → give [codebooks][frames], a list of integers a codebook")
def codes_in_one_row(data):
    return say({"type": "audio", "audio_codes": codes()[0]})


@kind_of(BAD_ROWS, "codes of 20 frames: shape [4, 20] → the codec's are [8, 1 frame or more]")
def codes_of_another_codec(data):
    return say({"type": "audio", "audio_codes": codes((4, 20))})


@kind_of(BAD_ROWS, "gives audio_codes beside audio_url or raw_audio → keep one")
def codes_beside_a_recording(data):
    return say(audio(data.speech(), audio_codes=codes()))


# ---------------------------------------------------------------- rows that are broken


def changed(*path: str | int, **change: object) -> Callable[[Recordings], dict]:
    """Makes a sound row with `change` at a place in it; a value of None takes the key away."""

    def make(data: Recordings) -> dict:
        row = copy.deepcopy(say([audio(data.speech(9))], SENTENCES[9], speaker="ann"))
        place = row
        for key in path:
            place = place[key]
        place.update(change)
        for key in [key for key, value in change.items() if value is None]:
            del place[key]
        return row

    return make


ITEM = ("messages", 1, "content", 0)
VIDEO = {"type": "video"}
BAD_ROWS |= {
    "a_number": (lambda data: 5, ("no list of messages → a sample is an object with a non-empty list 'messages'",)),
    "no_messages": (lambda data: {"messages": []}, ("no list of messages → ",)),
    "message_that_is_text": (lambda data: {"messages": ["hi"]}, ("message 0 is a string → must be an object",)),
    "unknown_role": (changed("messages", 0, role="narrator"),
                     ("message 0: role 'narrator' → must be system, user or assistant",)),
    "misspelt_key": (changed(*ITEM, audio_url=None, audio_ulr="a.wav"),
                     ("unknown key 'audio_ulr' → did you mean 'audio_url'?", "neither audio_url nor raw_audio")),
    "unknown_type": (changed(*ITEM, type="video"), ("message 1, item 0: type 'video' → must be text or audio",)),
    "no_recording": (changed(*ITEM, audio_url=None), ("neither audio_url nor raw_audio → name the recording",)),
    "offset_in_words": (changed(*ITEM, offset="1 s"), ("offset is a string → must be a number of seconds or null",)),
    "text_that_is_a_number": (changed("messages", 0, content={"type": "text", "text": 5}),
                              ("message 0, item 0: a text item needs a string 'text'",)),
    "speaker_by_number": (changed(speaker=7), ("speaker is a number → must be a string or null",)),
    "misc_that_is_text": (changed(misc="none"), ("misc is a string → must be an object or null",)),
    "start_index_in_words": (changed(start_index="1"), ("start_index is a string → must be an integer or null",)),
    "start_index_at_the_end": (changed(start_index=2),
                               ("start_index 2 leaves nothing to train → the last assistant message is number 1",)),
    "no_answer": (changed("messages", 1, role="user"),
                  ("no assistant message, so there is nothing to train → add the answer",)),
    "answer_in_words": (changed("messages", 1, content="Hi."),
                        ("no assistant message has audio → give the target recording as an audio item",)),
    "audios_beside": (changed(audios=["a.wav"]),
                      ("has 'audios' beside its messages, as ms-swift's data has → read it with --format ms_swift",)),
    "placeholder_in_a_text": (changed("messages", 0, content="Say <|AUDIO|>."),
                              ("a text contains <|AUDIO|> or <|AUDIO_OUT|> → give clips as audio items instead",)),
    "cloning_without_reference": (changed(misc={"task_type": "zero_shot_voice_cloning"}),
                                  ("voice_cloning needs one reference, the row has 0 → ",)),
    "dialogue_without_tags": (changed(misc={"task_type": "multi_speaker_smart_voice"}),
                              ("multi_speaker needs references, or texts with tags such as [SPEAKER0] → tag",)),
    "several_at_once": (changed("messages", 1, role="robot", name="r2", content=[VIDEO, audio("a.wav", offset=True)]),
                        ("message 1 has an unknown key 'name'", "role 'robot' → ", "item 0: type 'video' → ",
                         "item 1: offset is a boolean → ")),
}  # fmt: skip


@kind_of(BAD_ROWS, "no text of the target → give it as misc.target_transcript or as a text of the user message")
def nothing_to_speak(data):
    return say(data.speech(), text=" ", misc={"task_type": "single_speaker"})


@kind_of(BAD_ROWS, "no text of the reference → give it as misc.ref_transcript or as a text before the clip")
def reference_without_its_text(data):
    return clone(data.speech(0), data.speech(1), before=None, after=SENTENCES[1])
