"""The demo: valid, the same every time, and of the released formats in every part."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from engine.data.demo import REQUEST, SYSTEM_PROMPT, make_demo, write_demo_data
from engine.data.demo_speech import SENTENCES, VOICES, synthesize
from engine.errors import DataError


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "voices"
    folder.mkdir()
    for name, text in [("anna", "Hello."), ("bo", "你好。"), ("cy", "Hi!")]:
        soundfile.write(folder / f"{name}.wav", synthesize("alto", SENTENCES[0])[:9_600], 24_000)
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def test_speech_is_distinct_by_voice_and_text_and_independent_of_random_state():
    np.random.seed(1)
    waves = [synthesize(voice, text) for voice in VOICES for text in SENTENCES[:2]]
    np.random.seed(2)
    assert np.array_equal(waves[0], synthesize(next(iter(VOICES)), SENTENCES[0]))
    for wave in waves:
        assert wave.dtype == np.float32 and np.isclose(np.abs(wave).max(), 0.5) and np.isfinite(wave).all()
    assert len({wave.tobytes() for wave in waves}) == len(waves)
    assert not synthesize("alto", " … ").any()


def test_every_sample_is_as_the_seed_format_has_it(demo):
    samples = json.loads(demo.data_file.read_text(encoding="utf-8"))
    assert len(samples) == 20 and {sample["speaker"] for sample in samples} == set(VOICES)
    for sample in samples:
        system, user, assistant = sample["messages"]
        assert [m["role"] for m in sample["messages"]] == ["system", "user", "assistant"]
        assert system["content"] == SYSTEM_PROMPT and sample["start_index"] == 0
        ref_text, ref_audio, request = user["content"]
        text, audio = assistant["content"]
        assert request["text"] == REQUEST + text["text"]
        misc = sample["misc"]
        assert (misc["ref_transcript"], misc["target_transcript"]) == (ref_text["text"], text["text"])
        assert ref_audio["audio_url"] != audio["audio_url"]
        for item in (ref_audio, audio):
            assert item["audio_url"].startswith(f"audio/{sample['speaker']}_")
            info = soundfile.info(demo.data_file.parent / item["audio_url"])
            assert (info.samplerate, info.channels) == (24_000, 1) and 1 < info.duration < 3.5
            assert info.duration == pytest.approx(item["duration"], abs=1e-3)
        assert audio["duration"] == misc["duration"]


def test_chatml_reads_the_demo(demo):
    from engine.data.formats import read_conversations

    samples = read_conversations(demo.data_file)
    assert len(samples) == 20
    assert all(Path(audio.recording.path).is_file() for sample in samples for audio in sample.audios)


def test_two_makes_give_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        write_demo_data(tmp_path / folder, clips_per_voice=2)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_second_make_keeps_what_is_there_and_makes_what_is_gone(demo, tmp_path):
    folder = shutil.copytree(demo.data_file.parent.parent, tmp_path / "demo")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    gone = folder / "data" / "audio" / "alto_00.wav"
    content = gone.read_bytes()
    gone.unlink()
    made = make_demo(folder)
    assert made.model_path == (folder / "model").resolve() and gone.read_bytes() == content
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before[path]} == {gone}


def test_recordings_are_paired_with_the_next_one(recordings, tmp_path):
    samples = json.loads(write_demo_data(tmp_path / "out", recordings).read_text(encoding="utf-8"))
    assert [(s["speaker"], s["misc"]["ref_speaker"]) for s in samples] == [
        ("anna", "bo"),
        ("bo", "cy"),
        ("cy", "anna"),
    ]
    assert samples[1]["messages"][2]["content"][0]["text"] == "你好。"
    assert all(Path(item["audio_url"]).is_absolute() for s in samples for item in s["messages"][1]["content"][1:2])


def test_all_unusable_recordings_are_named(recordings, tmp_path):
    (recordings / "anna.txt").unlink()
    (recordings / "bo.wav").unlink()
    (recordings / "cy.txt").write_text(" \n")
    shutil.copy(recordings / "cy.wav", recordings / "dee.wav")
    (recordings / "dee.txt").write_bytes("née".encode("latin-1"))
    (recordings / "ed.txt").write_text("Hello.")
    (recordings / "ed.wav").write_text("no audio")
    with pytest.raises(DataError) as caught:
        write_demo_data(tmp_path / "out", recordings)
    for word in (
        "anna.wav has no transcript",
        "bo.txt has no recording",
        "cy.txt is empty",
        "dee.txt is not UTF-8",
        "ed.wav is not audio",
    ):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pairs", [0, 1])
def test_fewer_than_two_recordings_are_refused(recordings, tmp_path, pairs):
    for file in sorted(recordings.iterdir())[2 * pairs :]:
        file.unlink()
    with pytest.raises(DataError, match="at least two"):
        write_demo_data(tmp_path / "out", recordings)


def test_one_clip_a_voice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 or more"):
        write_demo_data(tmp_path, clips_per_voice=1)


def test_the_tokenizer_writes_any_text_and_has_the_released_special_tokens(tmp_path):
    from engine.data.demo_model import SPECIAL_TOKENS, make_tokenizer

    tokenizer = make_tokenizer(SENTENCES, tmp_path)
    assert tokenizer.pad_token is None and len(tokenizer.get_vocab()) == len(tokenizer)
    for text in ("Hello world's 12345.", "你好，世界。", "مرحبا", " spaced \n\n out .", "🙂"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *ids]
    first = len(tokenizer) - 32
    assert [tokenizer.encode(token, add_special_tokens=False) for token in SPECIAL_TOKENS] == [
        [first + index] for index in range(32)
    ]
    again = make_tokenizer(SENTENCES, tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
    golden = json.loads((Path(__file__).parents[1] / "fixtures/golden/tokenizer/tokenizer.json").read_text())
    assert [token["content"] for token in golden["added_tokens"]] == list(SPECIAL_TOKENS)
    assert golden["pre_tokenizer"] == json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]


def test_the_model_loads_without_a_missing_or_unexpected_tensor(demo):
    from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration

    model, report = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        demo.model_path, use_text_head=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config, ids = model.config, AutoTokenizer.from_pretrained(demo.model_path).convert_tokens_to_ids
    assert (config.codebook_size, config.num_codebooks) == (1026, 8)
    assert config.audio_token_id == ids("<|AUDIO_OUT|>") and config.eos_token_id == ids("<|eot_id|>")
    assert config.audio_delay_token_id == ids("<|reserved_special_token_6|>")
    generation = model.generation_config
    assert (generation.pad_token_id, generation.ras_win_len) == (ids("<|end_of_text|>"), 7)


def test_the_processor_loads_and_prepares_speech(demo):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(demo.model_path)
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": [{"type": "text", "text": " Generate audio. "}]},
            {"role": "scene", "content": [{"type": "text", "text": "A quiet room."}]},
            {"role": "user", "content": [{"type": "text", "text": "Hello. "}]},
            {"role": "assistant", "content": [{"type": "audio"}]},
            {"role": "user", "content": "Bye."},
        ],
        add_generation_prompt=True,
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio."
        "\n\n<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    )
    inputs = processor(text=text, audio=[synthesize("alto", SENTENCES[0])[:24_000]], return_tensors="pt")
    assert inputs["audio_input_ids"].shape == (1, 25 + 2 + 7, 8)


def test_another_seed_gives_other_weights(tmp_path, demo):
    import torch

    from engine.data.demo_model import make_model, make_tokenizer

    tokenizer, state = make_tokenizer(SENTENCES, tmp_path), torch.random.get_rng_state()
    embeddings = [
        make_model(
            tmp_path / "model", tokenizer, demo.audio_tokenizer_path, seed, hidden_size=64, num_layers=1
        ).model.embed_tokens.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])
    assert torch.equal(torch.random.get_rng_state(), state), "global random state must not change"
    with pytest.raises(ValueError, match="multiple of 32"):
        make_model(tmp_path, tokenizer, demo.audio_tokenizer_path, hidden_size=100)
