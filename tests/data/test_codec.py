"""The codec and its use: codes depend on the audio alone, are made once, and survive a kill bit for bit."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from engine.data.audio import Recording, content_key, decode, read_mono
from engine.data.audio_checks import AudioFacts, measure
from engine.data.code_cache import CodeCache
from engine.data.codec import Codec, codec_identity, encode_missing
from engine.data.codec_batches import plan_batches, share_of
from engine.data.demo_speech import SENTENCES, VOICES, synthesize
from engine.errors import ConfigError, ModelError

IDENTITY = "c0dec" * 10


@pytest.fixture(scope="session")
def codec_path(demo):
    return demo.audio_tokenizer_path


@pytest.fixture(scope="session")
def codec(codec_path):
    return Codec.load(codec_path)


@pytest.fixture
def copied(codec_path, tmp_path):
    """A copy of the codec to damage."""
    import shutil

    return shutil.copytree(codec_path, tmp_path / "copy")


@pytest.fixture
def cache(tmp_path):
    return CodeCache(tmp_path / "cache", IDENTITY)


@pytest.fixture
def recordings(tmp_path):
    """Content key -> recording, for four files of speech of which two have one length."""
    found = []
    for number, (voice, rate) in enumerate(zip(sorted(VOICES), (24_000, 24_000, 44_100, 16_000), strict=True)):
        path = tmp_path / f"{voice}.wav"
        wave = synthesize(voice, SENTENCES[0])[: rate // 2 + 100 * (number > 1)]
        soundfile.write(path, np.stack([wave, 0.5 * wave], axis=1), rate)
        found.append(Recording(str(path)))
    return {content_key(recording): recording for recording in found}


def codes(*shape) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def test_loading_leaves_the_random_state_alone(codec_path):
    state = torch.random.get_rng_state()
    Codec.load(codec_path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_layout_is_the_released_one(codec):
    assert (codec.sampling_rate, codec.hop_length) == (24_000, 960)
    assert (codec.num_codebooks, codec.codebook_size) == (8, 1024)


@pytest.mark.parametrize("samples", [960, 961, 9_600, 9_600 + 119, 9_600 + 400, 9_600 + 631, 9_600 + 959, 24_000])
def test_frames_are_the_samples_rounded_up_to_the_hop(codec, samples):
    (encoded,) = codec.encode([synthesize("alto", SENTENCES[0])[:samples]])
    assert encoded.dtype == np.int16 and encoded.shape == (8, -(-samples // 960))
    assert encoded.min() >= 0 and encoded.max() < 1024


def test_padding_to_the_hop_is_zeros_at_the_end(codec):
    wave = synthesize("tenor", SENTENCES[1])[:10_000]
    alone, padded = codec.encode([wave]) + codec.encode([np.pad(wave, (0, -len(wave) % 960))])
    assert np.array_equal(alone, padded)


def test_a_batch_gives_what_each_waveform_gives_alone(codec):
    lengths = (24_000, 20_000, 24_000, 19_900, 23_999)  # three padded lengths, 19,900 and 20,000 share one
    waves = [synthesize(voice, SENTENCES[2])[:n] for voice, n in zip(sorted(VOICES) + ["alto"], lengths, strict=True)]
    together = codec.encode(waves)
    for wave, encoded in zip(waves, together, strict=True):
        assert np.array_equal(encoded, codec.encode([wave])[0])
    assert codec.encode([]) == []


def test_different_audio_gives_different_and_diverse_codes(codec):
    encoded = codec.encode([synthesize(voice, text) for voice in VOICES for text in SENTENCES[:5]])
    assert len(np.unique(np.concatenate(encoded, axis=1)[0])) > 100
    alto, baritone = codec.encode([synthesize(voice, SENTENCES[0]) for voice in ("alto", "baritone")])
    assert (alto != baritone).mean() > 0.5


def test_decoding_returns_audible_audio_of_the_right_length(codec):
    (encoded,) = codec.encode([synthesize("child", SENTENCES[3])[:24_000]])
    wave = codec.decode(encoded)
    assert wave.dtype == np.float32 and wave.shape == (25 * 960,)
    assert 0.01 < wave.std() < np.abs(wave).max() < 1
    for wrong in (encoded[:7], encoded[:, :0], encoded[None], np.full((8, 2), 1024)):
        with pytest.raises(ValueError, match="expected"):
            codec.decode(wrong)


def test_stereo_at_another_rate_is_encoded_as_its_mono_resampling(codec, recordings):
    recording = next(r for r in recordings.values() if "child" in r.path)
    assert soundfile.info(recording.path).samplerate == 44_100
    (encoded,) = codec.encode([read_mono(recording, codec.sampling_rate)])
    assert encoded.shape == (8, 13)  # 22,150 samples are 12,055 at 24 kHz, and 12 frames hold 11,520


def test_identity_is_of_config_and_weights(codec, codec_path, copied):
    assert codec_identity(codec_path) == codec_identity(copied)
    tensors = load_file(copied / "model.safetensors")
    tensors["fc.bias"] = tensors["fc.bias"] + 1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert codec_identity(copied) != codec_identity(codec_path)


def test_loudness_is_left_alone_unless_asked(codec, codec_path, tmp_path, recordings):
    """A recording at an eighth of its level, brought to one loudness, gives the codes of the recording itself."""
    key, recording = next((k, r) for k, r in recordings.items() if "child" in r.path)
    wave, rate = soundfile.read(recording.path, dtype="float32")
    soundfile.write(tmp_path / "soft.wav", wave / 8, rate, subtype="FLOAT")
    both = {"0" * 64: Recording(str(tmp_path / "soft.wav")), "1" * 64: recording}
    codes = {}
    for loudness in (None, -30.0):
        identity = codec_identity(codec_path, loudness)
        cache = CodeCache(tmp_path, identity)
        assert encode_missing(both, lambda: codec, cache, loudness=loudness) == []
        codes[loudness] = [cache.get(key) for key in both]
        assert cache.facts("0" * 64).rms < 0.2 * cache.facts("1" * 64).rms, "facts are of the recording as it is"
    np.testing.assert_array_equal(codes[None][1], codec.encode([read_mono(recording, codec.sampling_rate)])[0])
    assert (codes[None][0] != codes[None][1]).any() and (codes[-30.0][0] == codes[-30.0][1]).mean() > 0.99


def damage_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["quantizer.quantizers.3.codebook.embed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_missing_tensor, "lack 1 tensors, the first is quantizer.quantizers.3.codebook.embed"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.pth"), "original format"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "not the native release"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
        (damage_config(model_type="llama"), "model_type is 'llama'"),
        (damage_config(sample_rate=48_000), "sampling_rate is 24000"),
    ],
)
def test_an_incomplete_codec_is_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(ModelError, match=message):
        Codec.load(copied)


def test_a_missing_directory_is_named(tmp_path):
    for use in (Codec.load, codec_identity):
        with pytest.raises(ModelError, match="nowhere .*\n.*no such directory"):
            use(tmp_path / "nowhere")


def test_everything_is_encoded_once(codec, cache, recordings):
    loads = []

    def load():
        loads.append(codec)
        return codec

    assert encode_missing(recordings, load, cache, batch_seconds=1) == []
    for key, recording in recordings.items():
        assert np.array_equal(cache.get(key), codec.encode([read_mono(recording, 24_000)])[0])
        assert cache.facts(key) == AudioFacts.from_array(measure(decode(recording)).to_array())
    assert encode_missing(recordings, load, cache) == []
    assert len(loads) == 1

    before = {key: cache.get(key) for key in recordings}
    (shard,) = cache.folder.iterdir()
    shard.unlink()
    again = CodeCache(cache.folder.parent, IDENTITY)
    assert encode_missing(recordings, load, again) == []
    assert len(loads) == 2 and all(np.array_equal(again.get(key), before[key]) for key in recordings)


def test_ranks_share_the_work_whatever_the_others_have_done(codec, cache, recordings):
    done = []
    for rank in range(3):
        before = sum(key in cache for key in recordings)
        assert encode_missing(recordings, lambda: codec, cache, batch_seconds=0.1, rank=rank, world_size=3) == []
        done.append(sum(key in cache for key in recordings) - before)
    assert sorted(done) == [1, 1, 2] and all(key in cache for key in recordings)


def test_bad_recordings_are_reported_each_time_and_the_rest_is_encoded(codec, cache, recordings, tmp_path, capsys):
    soundfile.write(tmp_path / "silent.wav", np.zeros(9_600), 24_000)
    bad = {
        "0" * 64: Recording(str(tmp_path / "absent.wav")),
        "a" * 64: Recording(next(iter(recordings.values())).path, offset=60.0),
        "f" * 64: Recording(str(tmp_path / "silent.wav")),
    }
    for _ in range(2):
        problems = encode_missing(bad | recordings, lambda: codec, cache, progress=True)
        assert [key for key, _ in problems] == list(bad)
        found = zip(("no such", "segment", "silent"), problems, strict=True)
        assert all(word in message for word, (_, message) in found)
        assert all(key in cache for key in recordings)
    assert "s of audio" in capsys.readouterr().err


def test_each_bad_recording_is_reported_by_one_rank(codec, cache, recordings, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(9_600), 24_000)
    bad = {f"{n:064x}": Recording(str(tmp_path / ("silent.wav" if n % 2 else f"{n}.wav"))) for n in range(6)}
    found = [
        encode_missing(bad | recordings, lambda: codec, cache, rank=rank, world_size=2, batch_seconds=0.1)
        for rank in range(2)
    ]
    assert sorted(key for problems in found for key, _ in problems) == sorted(bad)


def test_codes_that_came_with_the_data_are_checked_and_kept(codec, cache, recordings):
    right, zeros = codes(8, 20), np.zeros((8, 3), np.int16)
    wrong = [codes(4, 5), np.full((8, 2), 1024), np.full((8, 2), -1), np.zeros((8, 0))]
    given = {content_key(r): r for r in map(Recording.of_codes, (right, zeros, *wrong))}
    problems = dict(encode_missing(given | recordings, lambda: codec, cache))
    keys = list(given)
    assert np.array_equal(cache.get(keys[0]), right) and np.array_equal(cache.get(keys[1]), zeros)
    assert cache.facts(keys[0]) is None and all(key in cache for key in recordings)
    assert set(problems) == set(keys[2:]) and not any(key in cache for key in keys[2:])
    assert problems[keys[2]] == "codes of 5 frames: shape [4, 5] → the codec's are [8, 1 frame or more]"
    assert "span 1024 to 1024, outside 0 to 1023 → give the codec's own codes, without BOS" in problems[keys[3]]
    assert "span -1 to -1" in problems[keys[4]] and "shape [8, 0]" in problems[keys[5]]


class OutOfMemory:
    """A codec on a device with room for `limit` waveforms."""

    sampling_rate, hop_length, num_codebooks, codebook_size = 24_000, 960, 8, 1024

    def __init__(self, codec, limit):
        self.codec, self.limit = codec, limit

    def encode(self, waveforms):
        if len(waveforms) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.codec.encode(waveforms)


def test_a_full_device_is_told_with_its_remedy(codec, cache, recordings):
    path = next(iter(recordings.values())).path
    long, *short = (
        Recording(path),
        Recording(path, offset=0.0, duration=0.3),
        Recording(path, offset=0.05, duration=0.3),
    )
    recordings = {content_key(recording): recording for recording in (long, *short)}
    with pytest.raises(ConfigError, match="codec_batch_seconds: 2 recordings of 0.3 s do not fit .* → lower it"):
        encode_missing(recordings, lambda: OutOfMemory(codec, 1), cache)
    assert [key for key in recordings if key in cache] == [content_key(long)], "what was encoded before is kept"
    problems = encode_missing(recordings, lambda: OutOfMemory(codec, 0), cache, batch_seconds=0.1)
    assert [key for key, _ in problems] == sorted(map(content_key, short))
    assert all("0.3 s do not fit into the device's memory → cut it" in problem for _, problem in problems)


KILLED = """
import sys, time
from pathlib import Path
import torch
from engine.data.audio import Recording, content_key
from engine.data.code_cache import CodeCache
from engine.data.codec import Codec, encode_missing

torch.set_num_threads(1)
codec_path, folder, root = sys.argv[1:]
recordings = {content_key(r): r for r in (Recording(str(p)) for p in sorted(Path(folder).glob("*.wav")))}
codec = Codec.load(codec_path)
encode, calls = codec.encode, []

def slowly(waveforms):
    calls.append(1)
    if len(calls) > 3:
        print("three batches are done", flush=True)
        time.sleep(600)
    return encode(waveforms)

codec.encode = slowly
encode_missing(recordings, lambda: codec, CodeCache(root, "c0dec" * 10), batch_seconds=1.5, flush_seconds=0.0)
"""


def test_after_a_kill_the_second_run_ends_with_the_codes_of_an_undisturbed_one(codec, codec_path, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(24):  # lengths of 10 to 15 frames; the last batch of most is not full
        wave = synthesize(sorted(VOICES)[number % 4], SENTENCES[number % 7])[: 960 * (10 + number % 6) - number]
        soundfile.write(clips / f"{number:02}.wav", wave, 24_000)
    recordings = {content_key(r): r for r in (Recording(str(path)) for path in clips.iterdir())}

    undisturbed = CodeCache(tmp_path / "undisturbed", IDENTITY)
    batches = compositions(codec, recordings, undisturbed, batch_seconds=1.5)
    script = [sys.executable, "-c", KILLED, str(codec_path), str(clips), str(tmp_path / "killed")]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "three batches are done\n"
        process.kill()
    resumed = CodeCache(tmp_path / "killed", IDENTITY)
    assert 0 < sum(key in resumed for key in recordings) < len(recordings)
    left = compositions(codec, recordings, resumed, batch_seconds=1.5)
    assert left == batches[3:], "the batches that are left are the ones they would have been"
    for key in recordings:
        assert np.array_equal(resumed.get(key), undisturbed.get(key))
        assert resumed.facts(key) == undisturbed.facts(key)


def compositions(codec, recordings, cache, **options) -> list[list[bytes]]:
    """Encodes, and returns the waveforms of each batch."""
    seen = []

    class Watched(OutOfMemory):
        def encode(self, waveforms):
            seen.append([wave.tobytes() for wave in waveforms])
            return super().encode(waveforms)

    assert encode_missing(recordings, lambda: Watched(codec, 1_000), cache, **options) == []
    return seen


LENGTHS = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(1, 100))
def test_the_plan_has_each_recording_once_in_batches_of_one_length_and_within_the_budget(frames, budget):
    batches = plan_batches(frames, budget)
    assert sorted(key for batch in batches for key in batch) == sorted(frames)
    lengths = [frames[batch[0]] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    for batch, length in zip(batches, lengths, strict=True):
        assert {frames[key] for key in batch} == {length}
        assert len(batch) == 1 or len(batch) * length <= budget
    full = [batch for batch in batches if (len(batch) + 1) * frames[batch[0]] > budget]
    assert len(batches) - len(full) <= len(set(lengths)), "at most one batch of a length has room left"
    assert batches == plan_batches(dict(reversed(frames.items())), budget), "whatever the order they are given in"


@given(LENGTHS, st.integers(1, 100), st.integers(1, 9))
def test_the_ranks_shares_are_the_plan_and_balanced(frames, budget, world_size):
    batches = plan_batches(frames, budget)
    shares = [share_of(batches, frames, rank, world_size) for rank in range(world_size)]
    assert sorted(batch for share in shares for batch in share) == sorted(batches)
    for share in shares:
        places = [batches.index(batch) for batch in share]
        assert places == sorted(places)
    loads = [sum(frames[key] for batch in share for key in batch) for share in shares]
    largest = max((sum(frames[key] for key in batch) for batch in batches), default=0)
    assert max(loads) - min(loads) <= largest
