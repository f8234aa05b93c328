"""The codec and its cache: codes depend on the audio alone, are made once, and survive what befalls files."""

import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file, save_file

from engine.data.audio import Recording, content_key, read_mono
from engine.data.codec import Codec, CodeCache, codec_identity, encode_missing
from engine.data.demo_speech import SENTENCES, VOICES, synthesize
from engine.errors import ModelError


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
    return CodeCache(tmp_path / "cache", "c0dec" * 10)


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


def test_the_cache_returns_what_was_put_and_leaves_nothing_else(cache):
    assert cache.get("ab12") is None
    cache.put("ab12", codes(8, 5))
    cache.put("ab12", codes(8, 4))
    assert np.array_equal(cache.get("ab12"), codes(8, 4))
    assert cache.path("ab12") == cache.folder / "ab" / "ab12.npy"
    assert [file.name for file in cache.folder.rglob("*.*")] == ["ab12.npy"]


@pytest.mark.parametrize("wrong", [codes(8, 0), codes(8), codes(8, 5).astype(np.int64)])
def test_the_cache_takes_codes_only(cache, wrong):
    with pytest.raises(ValueError, match="int16 codes"):
        cache.put("ab12", wrong)
    assert not cache.folder.exists()


def test_an_interrupted_write_leaves_the_cache_as_it_was(cache, monkeypatch):
    def full_disk(stream, array, **options):
        stream.write(b"\x93NUMPY")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        cache.put("ab12", codes(8, 5))
    assert cache.get("ab12") is None and not list(cache.folder.rglob("*.*"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"\x93NUMPY\x01\x00",
        np.zeros((8, 4), np.int64),
        np.zeros(8, np.int16),
        np.zeros((8, 0), np.int16),
    ],
)
def test_damaged_codes_count_as_absent_and_are_removed(cache, caplog, content):
    cache.put("ab12", codes(8, 5))
    if isinstance(content, bytes):
        cache.path("ab12").write_bytes(content)
    else:
        np.save(cache.path("ab12"), content)
    with caplog.at_level(logging.WARNING):
        assert cache.get("ab12") is None
    assert "damaged" in caplog.text and not cache.path("ab12").exists()


def test_a_truncated_file_counts_as_absent(cache):
    cache.put("ab12", codes(8, 5))
    cache.path("ab12").write_bytes(cache.path("ab12").read_bytes()[:-1])
    assert cache.get("ab12") is None


def test_everything_is_encoded_once(codec, cache, recordings):
    loads = []

    def load():
        loads.append(codec)
        return codec

    assert encode_missing(recordings, load, cache, batch_seconds=1) == []
    for key, recording in recordings.items():
        assert np.array_equal(cache.get(key), codec.encode([read_mono(recording, 24_000)])[0])
    assert encode_missing(recordings, load, cache) == []
    assert len(loads) == 1

    key = next(iter(recordings))
    cache.path(key).write_bytes(b"")
    assert encode_missing(recordings, load, cache) == []
    assert len(loads) == 2 and cache.get(key) is not None


def test_ranks_share_the_work_whatever_the_others_have_done(codec, cache, recordings):
    done = []
    for rank in range(3):
        before = {key for key in recordings if cache.get(key) is not None}
        assert encode_missing(recordings, lambda: codec, cache, rank=rank, world_size=3) == []
        done.append(len(recordings) - len(before) - sum(cache.get(key) is None for key in recordings))
    assert sorted(done) == [1, 1, 2] and all(cache.get(key) is not None for key in recordings)


def test_bad_recordings_are_reported_and_the_rest_is_encoded(codec, cache, recordings, tmp_path, capsys):
    soundfile.write(tmp_path / "silent.wav", np.zeros(9_600), 24_000)
    bad = {
        "silent": Recording(str(tmp_path / "silent.wav")),
        "absent": Recording(str(tmp_path / "absent.wav")),
        "outside": Recording(next(iter(recordings.values())).path, offset=60.0),
    }
    problems = encode_missing(bad | recordings, lambda: codec, cache, progress=True)
    assert [key for key, _ in problems] == ["absent", "outside", "silent"]
    assert all(word in message for word, (_, message) in zip(("no such", "segment", "silent"), problems, strict=True))
    assert all(cache.get(key) is not None for key in recordings)
    assert "s of audio" in capsys.readouterr().err
