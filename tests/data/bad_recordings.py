"""Rows whose recordings cannot be used, and rows whose recordings look suspicious."""

import base64

import numpy as np

from engine.data.demo_speech import SENTENCES
from tests.data.row_kinds import RATE, Kinds, audio, clone, kind_of, say, silence, spoken

BAD_RECORDINGS: Kinds = {}
SUSPICIOUS: Kinds = {}


@kind_of(BAD_RECORDINGS, "gone.wav: no such file → correct the path")
def recording_that_is_not_there(data):
    return say("gone.wav")


@kind_of(BAD_RECORDINGS, "text.wav: not audio, or damaged: Format not recognised → convert it to wav or flac")
def text_named_wav(data):
    return say(data.file("text.wav", b"This is no recording."))


@kind_of(BAD_RECORDINGS, "nothing.wav: not audio, or damaged: ")
def file_of_no_bytes(data):
    return say(data.file("nothing.wav", b""))


@kind_of(BAD_RECORDINGS, "empty.wav: empty, holds no samples → record it again, or take its row out")
def recording_of_no_samples(data):
    return say(data.wav("empty.wav", silence(0)))


@kind_of(BAD_RECORDINGS, "silent.wav: silent, its peak of 0.0e+00 is below 1e-04 → take its row out")
def silent_recording(data):
    return say(data.wav("silent.wav", silence(1)))


@kind_of(BAD_RECORDINGS, "nan.wav: not finite, holds NaN or infinite samples → export it again")
def recording_with_nan(data):
    wave = spoken()
    wave[1000] = np.nan
    return say(data.wav("nan.wav", wave, subtype="FLOAT"))


@kind_of(
    BAD_RECORDINGS, "half.wav: cut off, ", "bytes of sound where its header promises ", "→ copy or export it again"
)
def wav_that_was_half_copied(data):
    whole = (data.folder / data.speech()).read_bytes()
    return say(data.file("half.wav", whole[: len(whole) // 2]))


@kind_of(BAD_RECORDINGS, "half.flac: ", "→ ")
def flac_that_was_half_copied(data):
    data.wav("whole.flac", spoken())
    whole = (data.folder / "whole.flac").read_bytes()
    return say(data.file("half.flac", whole[: len(whole) // 2]))


@kind_of(BAD_RECORDINGS, "folder.wav: cannot be read: Is a directory")
def folder_named_wav(data):
    (data.folder / "folder.wav").mkdir()
    return say("folder.wav")


@kind_of(BAD_RECORDINGS, "not a file name → correct the path")
def name_that_no_file_can_have(data):
    return say("a\0b.wav")


@kind_of(BAD_RECORDINGS, "odd.wav: cannot be resampled from 23999 Hz → convert the file to 24000 Hz")
def rate_that_has_nothing_in_common_with_the_codecs(data):
    return say(data.wav("odd.wav", spoken(), rate=23_999))


@kind_of(BAD_RECORDINGS, "the segment to 90 s is outside the recording of ", "→ correct offset and duration")
def segment_outside_its_recording(data):
    return say(audio(data.speech(), offset=80, duration=10))


@kind_of(BAD_RECORDINGS, "blip.wav: 0.20 s are less than min_seconds = 0.35")
def too_short_a_recording(data):
    return say(data.wav("blip.wav", np.concatenate([silence(0.03), spoken()[1200:4800], silence(0.02)])), "A")


@kind_of(BAD_RECORDINGS, "speech.wav: 15.24 s are more than max_seconds = 9")
def too_long_a_recording(data):
    return say(data.wav("speech.wav", np.concatenate([spoken(number) for number in range(7)])), " ".join(SENTENCES[:7]))


@kind_of(BAD_RECORDINGS, "https://example.org/a.wav, not a file → download it and give its path")
def web_address(data):
    return say("https://example.org/a.wav")


@kind_of(BAD_RECORDINGS, "message 1, item 0: raw_audio is not base64 (")
def damaged_base64(data):
    return say({"type": "audio", "raw_audio": "%%%"})


@kind_of(BAD_RECORDINGS, "embedded audio of 21 bytes: not audio, or damaged: ")
def embedded_text(data):
    return say({"type": "audio", "raw_audio": base64.b64encode(b"This is no recording.").decode()})


@kind_of(
    BAD_RECORDINGS, "sentence-0.wav: the reference is the target itself, which would teach to copy it → give another"
)
def reference_that_is_the_target(data):
    return clone(data.speech(0), data.speech(0), before=SENTENCES[0], after=SENTENCES[0])


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
