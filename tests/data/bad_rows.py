"""Rows that cannot be used, rows that look suspicious, and rows that are sound: one function a kind.

Each breaks a row, or its recording, in one way and is registered with the words that a user must read about it.
"""

import base64
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from engine.data.demo_speech import SENTENCES, synthesize

RATE = 24_000
MIN_SECONDS, MAX_SECONDS = 0.35, 9.0
"""The settings with which the rows are read."""

Kinds = dict[str, tuple[Callable[["Recordings"], object], tuple[str, ...]]]
SOUND: Kinds = {}
BAD: Kinds = {}
SUSPICIOUS: Kinds = {}


def kind_of(kinds: Kinds, *words: str):
    """Registers a kind of row with the words that its problems, or its warnings, must have."""

    def register(make: Callable[["Recordings"], object]):
        kinds[make.__name__] = make, words
        return make

    return register


@dataclass
class Recordings:
    """A folder of recordings for the rows of a data file in it."""

    folder: Path

    def wav(self, name: str, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> str:
        soundfile.write(self.folder / name, wave, rate, subtype=subtype)
        return name

    def file(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return name

    def speech(self, number: int = 0) -> str:
        """A sound recording of a sentence."""
        name = f"sentence-{number}.wav"
        return name if (self.folder / name).exists() else self.wav(name, spoken(number))


def spoken(number: int = 0) -> np.ndarray:
    return synthesize("alto", SENTENCES[number])


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def audio(name: str, **keys) -> dict:
    return {"type": "audio", "audio_url": name} | keys


def say(item: dict | str, text: str = SENTENCES[0], **keys) -> dict:
    """A row: asked for `text`, the assistant answers with the audio item."""
    answer = {"role": "assistant", "content": audio(item) if isinstance(item, str) else item}
    return {"messages": [{"role": "user", "content": text}, answer], **keys}


def clone(reference: str, target: str, *, before: str | None, after: str | None) -> dict:
    """A row with the reference in the user message, between its transcript and the text to speak."""
    row = say(target, misc={"task_type": "voice_cloning"})
    row["messages"][0]["content"] = [text for text in (before, audio(reference), after) if text is not None]
    return row


def codes(shape: tuple[int, int] = (8, 20)) -> list[list[int]]:
    return np.random.default_rng(shape[1]).integers(0, 1024, shape).tolist()


# ---------------------------------------------------------------- sound


@kind_of(SOUND)
def a_sentence(data):
    return say(data.speech(0))


@kind_of(SOUND)
def a_sentence_in_the_voice_of_another(data):
    return clone(data.speech(0), data.speech(1), before=SENTENCES[0], after=SENTENCES[1])


@kind_of(SOUND)
def codes_of_the_codec(data):
    return say({"type": "audio", "audio_codes": codes()})


@kind_of(SOUND)
def exactly_the_shortest_that_is_allowed(data):
    """0.35 is no number of fp32, in which the cache keeps lengths."""
    return say(data.wav("shortest.wav", np.concatenate([silence(0.05), spoken(4)[1200:7200], silence(0.05)])), "Sh")


@kind_of(SOUND)
def a_segment_of_a_long_recording(data):
    long = np.concatenate([spoken(number) for number in (2, 3, 5, 6, 7)])
    start, seconds = len(spoken(2)) / RATE, len(spoken(3)) / RATE
    return say(audio(data.wav("long.wav", long), offset=start, duration=seconds), SENTENCES[3])


# ---------------------------------------------------------------- bad recordings


@kind_of(BAD, "gone.wav: no such file → correct the path")
def recording_that_is_not_there(data):
    return say("gone.wav")


@kind_of(BAD, "text.wav: not audio, or damaged: Format not recognised → convert it to wav or flac")
def text_named_wav(data):
    return say(data.file("text.wav", b"This is no recording."))


@kind_of(BAD, "nothing.wav: not audio, or damaged: ")
def file_of_no_bytes(data):
    return say(data.file("nothing.wav", b""))


@kind_of(BAD, "empty.wav: empty, holds no samples → record it again, or take its row out")
def recording_of_no_samples(data):
    return say(data.wav("empty.wav", silence(0)))


@kind_of(BAD, "silent.wav: silent, its peak of 0.0e+00 is below 1e-04 → take its row out")
def silent_recording(data):
    return say(data.wav("silent.wav", silence(1)))


@kind_of(BAD, "nan.wav: not finite, holds NaN or infinite samples → export it again")
def recording_with_nan(data):
    wave = spoken()
    wave[1000] = np.nan
    return say(data.wav("nan.wav", wave, subtype="FLOAT"))


@kind_of(BAD, "half.wav: cut off, ", "bytes of sound where its header promises ", "→ copy or export it again")
def wav_that_was_half_copied(data):
    whole = (data.folder / data.speech()).read_bytes()
    return say(data.file("half.wav", whole[: len(whole) // 2]))


@kind_of(BAD, "half.flac: ", "→ ")
def flac_that_was_half_copied(data):
    data.wav("whole.flac", spoken())
    whole = (data.folder / "whole.flac").read_bytes()
    return say(data.file("half.flac", whole[: len(whole) // 2]))


@kind_of(BAD, "folder.wav: cannot be read: Is a directory")
def folder_named_wav(data):
    (data.folder / "folder.wav").mkdir()
    return say("folder.wav")


@kind_of(BAD, "not a file name → correct the path")
def name_that_no_file_can_have(data):
    return say("a\0b.wav")


@kind_of(BAD, "odd.wav: cannot be resampled from 23999 Hz → convert the file to 24000 Hz")
def rate_that_has_nothing_in_common_with_the_codecs(data):
    return say(data.wav("odd.wav", spoken(), rate=23_999))


@kind_of(BAD, "the segment to 90 s is outside the recording of ", "→ correct offset and duration")
def segment_outside_its_recording(data):
    return say(audio(data.speech(), offset=80, duration=10))


@kind_of(BAD, "blip.wav: 0.20 s are less than min_seconds = 0.35")
def too_short_a_recording(data):
    return say(data.wav("blip.wav", np.concatenate([silence(0.03), spoken()[1200:4800], silence(0.02)])), "A")


@kind_of(BAD, "speech.wav: 15.24 s are more than max_seconds = 9")
def too_long_a_recording(data):
    return say(data.wav("speech.wav", np.concatenate([spoken(number) for number in range(7)])), " ".join(SENTENCES[:7]))


@kind_of(BAD, "https://example.org/a.wav, not a file → download it and give its path")
def web_address(data):
    return say("https://example.org/a.wav")


@kind_of(BAD, "message 1, item 0: raw_audio is not base64 (")
def damaged_base64(data):
    return say({"type": "audio", "raw_audio": "%%%"})


@kind_of(BAD, "embedded audio of 21 bytes: not audio, or damaged: ")
def embedded_text(data):
    return say({"type": "audio", "raw_audio": base64.b64encode(b"This is no recording.").decode()})


@kind_of(BAD, "sentence-0.wav: the reference is the target itself, which would teach to copy it → give another")
def reference_that_is_the_target(data):
    return clone(data.speech(0), data.speech(0), before=SENTENCES[0], after=SENTENCES[0])


# ---------------------------------------------------------------- bad codes


@kind_of(BAD, "audio_codes holds 1024 → give the codec's own codes, 0 to 1023, without BOS, EOS and delay")
def codes_with_bos(data):
    return say({"type": "audio", "audio_codes": [[1024, *book] for book in codes()]})


@kind_of(BAD, "audio_codes: codebook 7 has 19 codes, codebook 0 has 20 → give one code a frame in each")
def codes_of_unequal_length(data):
    books = codes()
    books[7].pop()
    return say({"type": "audio", "audio_codes": books})


@kind_of(BAD, "audio_codes is no list of codebooks → give [codebooks][frames], a list of integers a codebook")
def codes_in_one_row(data):
    return say({"type": "audio", "audio_codes": codes()[0]})


@kind_of(BAD, "codes of 20 frames: shape [4, 20] → the codec's are [8, 1 frame or more]")
def codes_of_another_codec(data):
    return say({"type": "audio", "audio_codes": codes((4, 20))})


@kind_of(BAD, "gives audio_codes beside audio_url or raw_audio → keep one")
def codes_beside_a_recording(data):
    return say(audio(data.speech(), audio_codes=codes()))


# ---------------------------------------------------------------- bad rows


def changed(*path: str | int, **change: object) -> Callable[["Recordings"], dict]:
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
BAD |= {
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


@kind_of(BAD, "no text of the target → give it as misc.target_transcript or as a text of the user message")
def nothing_to_speak(data):
    return say(data.speech(), text=" ", misc={"task_type": "single_speaker"})


@kind_of(BAD, "no text of the reference → give it as misc.ref_transcript or as a text before the clip")
def reference_without_its_text(data):
    return clone(data.speech(0), data.speech(1), before=None, after=SENTENCES[1])


# ---------------------------------------------------------------- suspicious


@kind_of(SUSPICIOUS, "clipped.wav: clipped: ", " of its samples stand at full scale")
def clipped(data):
    return say(data.wav("clipped.wav", np.clip(4 * spoken(), -1, 32_767 / 32_768)))


@kind_of(SUSPICIOUS, "offset.wav: DC offset of 0.12")
def off_centre(data):
    return say(data.wav("offset.wav", 0.5 * spoken() + 0.12))


@kind_of(SUSPICIOUS, "end.wav: may be cut off: it ends at ", "dB of its level, without a pause")
def cut_at_its_end(data):
    return say(data.wav("end.wav", spoken()[: RATE * 3 // 4]), "The river")


@kind_of(SUSPICIOUS, "begin.wav: may be cut off: it begins at ", "dB of its level, without a pause")
def cut_at_its_begin(data):
    return say(data.wav("begin.wav", spoken()[RATE // 4 :]))


@kind_of(SUSPICIOUS, "late.wav: 3.1 s of silence at its end")
def silence_at_its_end(data):
    return say(data.wav("late.wav", np.concatenate([spoken(), silence(3)])))


@kind_of(SUSPICIOUS, "early.wav: 3.0 s of silence at its begin")
def silence_at_its_begin(data):
    return say(data.wav("early.wav", np.concatenate([silence(3), spoken()])))


@kind_of(SUSPICIOUS, "pauses.wav: mostly silent: 8")
def mostly_silent(data):
    pause, word = silence(1.5), spoken()[: RATE // 2]
    return say(data.wav("pauses.wav", np.concatenate([pause, word, pause, word, pause])))


@kind_of(SUSPICIOUS, "narrow.wav: narrow band: sampled at 8000 Hz")
def telephone(data):
    return say(data.wav("narrow.wav", spoken()[::3], rate=8_000))


@kind_of(SUSPICIOUS, "hasty.wav: too much text for ", "is it cut off, or another's text?")
def more_text_than_can_be_said(data):
    return say(data.wav("hasty.wav", spoken(2)), " ".join(SENTENCES[:8]))


@kind_of(SUSPICIOUS, "slow.wav: too little text for ", "is something not written?")
def less_text_than_is_said(data):
    return say(data.wav("slow.wav", np.concatenate([spoken(number) for number in (5, 6, 8)])), "Hm.")


@kind_of(SUSPICIOUS, "copy.wav: the same recording as the target of row 0")
def target_of_another_row(data):
    return say(data.file("copy.wav", (data.folder / data.speech(0)).read_bytes()))
