"""Recordings: what is read is exact, and each kind of bad audio says what it is."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from engine.data.audio import AudioError, Recording, content_key, count_samples, decode, read_mono


def tone(seconds: float, rate: int, hertz: float = 220.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def save(tmp_path):
    def write(samples, rate=24_000, name="a.wav", **options) -> Recording:
        soundfile.write(tmp_path / name, samples, rate, **{"subtype": "FLOAT"} | options)
        return Recording(str(tmp_path / name))

    return write


def test_mono_at_the_wanted_rate_is_returned_bit_for_bit(save):
    wave = tone(0.3, 24_000)
    read = read_mono(save(wave), 24_000)
    assert read.dtype == np.float32 and np.array_equal(read, wave)


def test_channels_are_averaged(save):
    left, right = tone(0.1, 24_000), tone(0.1, 24_000, 330)
    assert np.allclose(read_mono(save(np.stack([left, right], axis=1)), 24_000), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_tone_and_the_predicted_length(save, rate):
    recording = save(tone(0.5, rate), rate)
    read = read_mono(recording, 24_000)
    assert len(read) == count_samples(recording, 24_000) == 12_000
    middle = slice(1_000, -1_000)  # the filter's edges ring
    assert np.abs(read - tone(0.5, 24_000))[middle].max() < 2e-3


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.flac", {"subtype": "PCM_16"}),
        ("a.ogg", {"subtype": "VORBIS"}),
        ("a.mp3", {"subtype": "MPEG_LAYER_III"}),
    ],
)
def test_compressed_formats_are_read(save, name, options):
    read = read_mono(save(tone(1.0, 24_000), name=name, **options), 24_000)
    assert abs(len(read) - 24_000) < 3_000 and 0.4 < np.abs(read).max() < 0.6


def test_embedded_bytes_read_like_the_file(save):
    recording = save(tone(0.2, 16_000), 16_000)
    embedded = Recording(data=open(recording.path, "rb").read())
    assert np.array_equal(read_mono(embedded, 24_000), read_mono(recording, 24_000))
    assert content_key(embedded) == content_key(recording)
    assert "embedded audio of" in str(embedded)


def test_a_segment_is_cut_before_resampling(save):
    wave = np.arange(1, 24_001, dtype=np.float32) / 24_000
    path = save(wave).path
    assert np.array_equal(read_mono(Recording(path, offset=0.25, duration=0.5), 24_000), wave[6_000:18_000])
    assert np.array_equal(read_mono(Recording(path, offset=0.25), 24_000), wave[6_000:])
    assert np.array_equal(read_mono(Recording(path, duration=0.5), 24_000), wave), "a mere description"
    assert np.array_equal(read_mono(Recording(path, offset=0.5, duration=0.55), 24_000), wave[12_000:]), "rounded up"
    assert count_samples(Recording(path, offset=0.25, duration=0.5), 48_000) == 24_000


@pytest.mark.parametrize(
    "segment",
    [
        {"offset": 1.0},
        {"offset": -0.1},
        {"offset": 0.5, "duration": 0.0},
        {"offset": 0.5, "duration": 0.7},
        {"offset": float("nan")},
    ],
)
def test_a_segment_outside_the_recording_is_refused(save, segment):
    recording = Recording(save(tone(1.0, 24_000)).path, **segment)
    with pytest.raises(AudioError, match="segment .* is outside the recording of 1.000 s"):
        read_mono(recording, 24_000)
    with pytest.raises(AudioError, match="outside the recording"):
        count_samples(recording, 24_000)


WAVE = np.random.default_rng(0).uniform(-0.9, 0.9, 3_000).astype(np.float32)
ENCODED = io.BytesIO()
soundfile.write(ENCODED, WAVE, 8_000, subtype="FLOAT", format="WAV")


@given(offset=st.floats(0, 0.374), duration=st.none() | st.floats(0.001, 0.5))
def test_any_segment_is_a_slice(offset, duration):
    recording = Recording(data=ENCODED.getvalue(), offset=offset, duration=duration)
    end = 0.375 if duration is None else offset + duration
    if end > 0.375 + 0.1:
        with pytest.raises(AudioError, match="outside the recording"):
            decode(recording)
        return
    first = min(round(offset * 8_000), 2_999)
    expected = WAVE[first : max(first + 1, min(round(end * 8_000), 3_000))]
    assert np.array_equal(decode(recording).wave, expected)
    assert len(read_mono(recording, 24_000)) == count_samples(recording, 24_000) == 3 * len(expected)


def test_decoding_leaves_rate_channels_and_loudness_as_they_are(save):
    stereo = np.stack([tone(0.1, 44_100), 0.01 * tone(0.1, 44_100, 330)], axis=1)
    decoded = decode(save(stereo, 44_100))
    assert np.array_equal(decoded.samples, stereo) and (decoded.sampling_rate, decoded.channels) == (44_100, 2)
    assert np.array_equal(decoded.wave, stereo.mean(axis=1))


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.au", "a.mp3"])
def test_a_recording_that_was_cut_off_is_no_shorter_recording(save, name):
    recording = save(tone(2.0, 24_000), name=name, subtype="MPEG_LAYER_III" if name == "a.mp3" else "PCM_16")
    whole = open(recording.path, "rb").read()
    with open(recording.path, "wb") as stream:
        stream.write(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match="cut off.*header promises .* → copy"):
        decode(recording)


def test_a_wav_from_a_pipe_does_not_know_its_length(save):
    recording = save(tone(0.2, 24_000), subtype="PCM_16")
    content = bytearray(open(recording.path, "rb").read())
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):
        struct.pack_into("<I", content, content.find(b"data") + 4, size)
        assert len(decode(Recording(data=bytes(content))).wave) == 4_800


def without_length(wave: np.ndarray, mode: str) -> bytes:
    """An mp3 of 24 kHz without the frame that tells its length."""
    stream = io.BytesIO()
    soundfile.write(stream, wave, 24_000, "MPEG_LAYER_III", format="MP3", bitrate_mode=mode, compression_level=0.5)
    content = stream.getvalue()
    rates = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    return content[3 * rates[content[2] >> 4] + (content[2] >> 1 & 1) :]  # 72 bytes a kbit, over 24 kHz


def test_an_mp3_without_its_length_is_read_whole_or_refused():
    constant = b"ID3\x03" + bytes(5) + b"\x0a" + bytes(10) + without_length(tone(2.0, 24_000), "CONSTANT")
    recording = Recording(data=constant)
    assert len(decode(recording).wave) == count_samples(recording, 24_000) > 48_000
    loud, quiet = WAVE[np.arange(240_000) % 2_999], np.full(240_000, 1e-4, np.float32)
    for parts in ([quiet, loud], [loud, quiet]):
        recording = Recording(data=without_length(np.concatenate(parts), "VARIABLE"))
        with pytest.raises(AudioError, match="ffmpeg -i IN OUT.flac"):
            decode(recording)


def test_every_kind_of_bad_audio_says_what_it_is(save, tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("not a recording")
    truncated = tmp_path / "short.flac"
    truncated.write_bytes(open(save(tone(1, 24_000), name="b.flac", subtype="PCM_16").path, "rb").read()[:4_000])
    (tmp_path / "zero.wav").touch()
    nan = tone(0.1, 24_000)
    nan[5] = np.nan
    for recording, message in [
        (Recording(str(tmp_path / "gone.wav")), "no such file"),
        (Recording(str(tmp_path)), "cannot be read"),
        (Recording(str(text)), "not audio, or damaged"),
        (Recording(str(truncated)), "not audio, or damaged"),
        (Recording(str(tmp_path / "zero.wav")), "not audio, or damaged"),
        (Recording(data=b"\x00\x01"), "not audio, or damaged"),
        (Recording(data=b"\0\0\0\x20ftypM4A " + bytes(100)), "convert it to wav or flac, e.g. ffmpeg -i IN OUT.flac"),
        (save(np.zeros(0, np.float32), name="empty.wav"), "empty"),
        (save(np.full(2_400, 5e-5, np.float32), name="silent.wav"), "silent"),
        (save(np.stack([tone(0.1, 24_000), -tone(0.1, 24_000)], 1), name="inverted.wav"), "silent"),
        (save(nan, name="nan.wav"), "not finite"),
        (save(tone(0.1, 24_001), 24_001, name="odd.wav"), "convert the file"),
    ]:
        with pytest.raises(AudioError, match=message) as caught:
            read_mono(recording, 24_000)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(recording))


def test_the_key_is_of_the_content_and_the_segment(save, tmp_path):
    one, other = save(tone(0.1, 24_000), name="one.wav"), save(tone(0.1, 24_000, 230), name="other.wav")
    copy = Recording(str(tmp_path / "copy.wav"))
    (tmp_path / "copy.wav").write_bytes(open(one.path, "rb").read())
    assert content_key(one) == content_key(copy) == content_key(Recording(one.path, duration=0.1))
    segments = [dict(), dict(offset=0.0), dict(offset=0.01), dict(offset=0.01, duration=0.05)]
    keys = {content_key(Recording(one.path, **segment)) for segment in segments} | {content_key(other)}
    assert len(keys) == 5 and all(len(key) == 64 for key in keys)
    assert content_key(Recording(one.path, offset=1)) == content_key(Recording(one.path, offset=1.0))
    with pytest.raises(AudioError, match="no such file"):
        content_key(Recording(str(tmp_path / "gone.wav")))


def test_a_recording_is_a_file_or_bytes_or_codes():
    for arguments in ({}, {"path": "a.wav", "data": b""}, {"path": "a.wav", "codes": b"", "codebooks": 8}):
        with pytest.raises(ValueError, match="either a path, data or codes"):
            Recording(**arguments)


def test_codes_are_kept_exactly_and_have_no_waveform():
    codes = np.arange(24, dtype=np.int64).reshape(8, 3)
    recording = Recording.of_codes(codes)
    assert np.array_equal(recording.code_array, codes)
    for use in (decode, lambda r: count_samples(r, 24_000), lambda r: read_mono(r, 24_000)):
        with pytest.raises(AudioError, match="codes of 3 frames: has no waveform"):
            use(recording)
    others = [codes.reshape(4, 6), codes[:, :2], codes + 1]
    keys = {content_key(Recording.of_codes(other)) for other in [codes, *others]}
    assert len(keys) == 4 and content_key(Recording.of_codes(codes.astype(np.int16))) in keys
    for wrong in (codes + 40_000, codes[0], codes / 3):
        with pytest.raises(ValueError, match="fit into int16"):
            Recording.of_codes(wrong)


def test_torchaudio_imports_beside_any_torch():
    script = """
import sys
from engine.runtime import torchaudio_compat
torchaudio_compat.install()
finders = len(sys.meta_path)
torchaudio_compat.install()
assert len(sys.meta_path) == finders, "installed twice"
assert "torchaudio" not in sys.modules, "installing must not import"
import torch, torchaudio
assert torchaudio.functional.resample(torch.ones(441), 44_100, 24_000).shape == (240,)
from transformers import HiggsAudioV2TokenizerModel
if not torchaudio._extension._IS_TORCHAUDIO_EXT_AVAILABLE:
    try:
        torchaudio.functional.forced_align(torch.zeros(1, 2, 3), torch.ones(1, 1))
    except RuntimeError as error:
        assert "compiled extension" in str(error)
    else:
        raise AssertionError("a kernel that is not there was called")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
