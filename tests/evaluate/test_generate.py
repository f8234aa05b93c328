"""Speaking: transformers' own generate on the prompts of training, and the command that writes what comes of it."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.data.audio import Decoded, resample
from engine.data.codec import Codec
from engine.data.formats import read_conversations
from engine.data.labels import StreamIds, codes_of_stream, merge
from engine.data.layouts import Layout
from engine.data.prompts import PromptTokenizer
from engine.evaluate.generate import generation_config, speak, undisturbed
from engine.evaluate.model_files import find
from engine.evaluate.prompt_sources import Coder, of_text
from engine.evaluate.prompts import SpeechPrompt, of_row, of_sample, with_answer
from engine.evaluate.samples import in_short
from engine.evaluate.signal import spectral_distance
from engine.model.weights import load_tokenizer
from tests.commands import command, done
from tests.tiny import random_sample, tiny_model

CPU = torch.device("cpu")


def tiny_prompt(audio: int = 15) -> SpeechPrompt:
    sample = random_sample(np.random.default_rng(0), 10, audio)
    return SpeechPrompt("", "", np.append(sample.input_ids, 112).astype(np.int32), sample.audio_ids)


@pytest.mark.parametrize("audio", [15, 0])
def test_the_most_likely_codes_are_those_of_a_direct_call(tmp_path, audio):
    model, prompt = tiny_model().eval(), tiny_prompt(audio)
    inputs = {"input_ids": torch.from_numpy(prompt.input_ids).long()[None]}
    if audio:
        inputs["audio_input_ids"] = torch.from_numpy(prompt.audio_ids).long()[None]
        inputs["audio_input_ids_mask"] = torch.ones(1, audio, dtype=torch.bool)
    direct = model.generate(**inputs, do_sample=False, max_new_tokens=30 + 9)[0, audio:].numpy()
    spoken = speak(model, prompt, generation_config(tmp_path, model.config, temperature=0), max_frames=30, seed=1)
    stream = StreamIds(8, 32, 33)
    np.testing.assert_array_equal(spoken.codes, codes_of_stream(direct, stream)[:, :30])
    assert spoken.stopped == bool((direct[-1] == 33).all()) and not spoken.late
    assert spoken.frames <= 30 and spoken.seconds > 0


def test_what_stops_by_itself_and_what_is_cut(tmp_path):
    """A head that always says EOS says nothing; one that never does is cut at max_frames; no time is no speech."""
    model, prompt = tiny_model().eval(), tiny_prompt()
    how = generation_config(tmp_path, model.config, temperature=0)

    def likes(code: int):
        def head(states):
            logits = torch.zeros(*states.shape[:-1], 8, 34)
            logits[..., code] = 1
            return logits.flatten(-2)

        return head

    model.audio_lm_head.forward = likes(33)
    spoken = speak(model, prompt, how, max_frames=12, seed=0)
    assert spoken.stopped and spoken.frames == 0
    model.audio_lm_head.forward = likes(5)
    spoken = speak(model, prompt, how, max_frames=12, seed=0)
    assert not spoken.stopped and not spoken.late and (spoken.codes == 5).all() and spoken.codes.shape == (8, 12)
    assert speak(model, prompt, how, max_frames=12, seed=0, max_time=1e-9).late


def test_draws_follow_from_the_seed_alone(tmp_path):
    model, prompt = tiny_model().eval(), tiny_prompt()
    how = generation_config(tmp_path, model.config)
    assert (how.do_sample, how.top_k, how.top_p, how.ras_win_len) == (True, 50, 0.95, 7)
    first = speak(model, prompt, how, 12, seed=7)
    torch.rand(3)
    again, other = speak(model, prompt, how, 12, seed=7), speak(model, prompt, how, 12, seed=8)
    np.testing.assert_array_equal(first.codes, again.codes)
    assert first.codes.shape != other.codes.shape or (first.codes != other.codes).any()


def test_the_model_in_training_is_left_as_it_was(tmp_path):
    model = tiny_model()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    own = model.generation_config, type(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with undisturbed(model, CPU):
        assert not any(module.training for module in model.modules())
        speak(model, tiny_prompt(), generation_config(tmp_path, model.config), 5, seed=0)
        random.random(), np.random.rand()
    assert modes == [module.training for module in model.modules()]
    assert (model.generation_config, type(model)) == own
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- prompts


def test_a_row_a_sample_and_inference_ask_in_the_same_tokens(demo):
    """Cut out of a row, out of a prepared sample, and made by PromptTokenizer.inference (equal to transformers')."""
    tokenize = PromptTokenizer(load_tokenizer(demo.model_path))
    row = read_conversations(demo.data_file)[3]
    conversation = Layout().apply(row)
    rng = np.random.default_rng(0)
    codes = {audio.recording: rng.integers(0, 1024, (8, 5), np.int16) for audio in conversation.audios}
    of_the_row = of_row(row, "row 3", Layout(), tokenize, StreamIds(), codes.__getitem__)
    clips = [codes[audio.recording] for audio in conversation.audios]
    wanted = merge(tokenize.inference(conversation), clips[:-1], tokenize.special, StreamIds())
    sample = merge(tokenize(conversation), clips, tokenize.special, StreamIds())
    of_the_sample = of_sample(sample, "row 3", tokenize, StreamIds())
    for prompt in (of_the_row, of_the_sample):
        np.testing.assert_array_equal(prompt.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(prompt.audio_ids, wanted.audio_ids)
        assert prompt.text == conversation.messages[3].texts[0]
    reference, target = (audio.recording for audio in conversation.audios)
    assert (of_the_row.reference, of_the_row.target) == (reference, target)
    np.testing.assert_array_equal(of_the_sample.reference, codes[reference])
    np.testing.assert_array_equal(of_the_sample.target, codes[target])


def test_golden_samples_end_where_their_last_clip_begins(golden_samples):
    from tests.conftest import GOLDEN

    tokenize = PromptTokenizer(load_tokenizer(GOLDEN / "tokenizer"))
    begins = tokenize.tokenizer.convert_tokens_to_ids("<|audio_out_bos|>")
    for name, sample in golden_samples.items():
        if not (sample.audio_labels >= 0).any():
            with pytest.raises(ValueError, match="no clip of it is trained"):
                of_sample(sample, name, tokenize, StreamIds())
            continue
        prompt = of_sample(sample, name, tokenize, StreamIds())
        assert prompt.input_ids[-1] == begins and (prompt.input_ids == tokenize.special.audio_out).sum() == len(
            prompt.audio_ids
        )
        np.testing.assert_array_equal(prompt.input_ids, sample.input_ids[: len(prompt.input_ids)])
        assert prompt.text and "<|" not in prompt.text


def test_a_row_without_its_answer_and_a_text_of_the_command_line(demo):
    tokenize = PromptTokenizer(load_tokenizer(demo.model_path))
    row = read_conversations(demo.data_file)[3]
    codes = lambda recording: np.zeros((8, 4), np.int16)  # noqa: E731
    whole = of_row(row, "", Layout(), tokenize, StreamIds(), codes)
    asked = replace(row, messages=row.messages[:-1])
    assert with_answer(row) is row
    without = of_row(asked, "", Layout(), tokenize, StreamIds(), codes)
    np.testing.assert_array_equal(without.input_ids, whole.input_ids)
    assert without.target is None and without.reference == whole.reference
    text = of_row(of_text("Hello.", []), "", Layout(), tokenize, StreamIds(), codes)
    assert (text.text, text.reference, text.target, len(text.audio_ids)) == ("Hello.", None, None, 0)
    voice = Path(row.audios[0].recording.path)
    named = of_row(of_text("Hello.", [("Some words.", voice)]), "", Layout(), tokenize, StreamIds(), codes)
    unnamed = of_row(of_text("Hello.", [(None, voice)]), "", Layout(), tokenize, StreamIds(), codes)
    assert "Some words." in tokenize.tokenizer.decode(named.input_ids)
    assert "SPEAKER0: " in tokenize.tokenizer.decode(unnamed.input_ids)


# ---------------------------------------------------------------- the command


def test_a_text_becomes_a_wav_in_the_voice_of_a_recording(demo, tmp_path):
    voice = Path(read_conversations(demo.data_file)[0].audios[0].recording.path)
    options = {
        "model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path, "text": "Hello there.",
        "reference": voice, "reference_text": "Some words.", "max_seconds": 0.8, "seed": 3, "device": "cpu",
    }  # fmt: skip
    said = done("generate", **options, temperature=0, out=tmp_path / "a.wav")
    wave, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 24000 and 0 < len(wave) <= 0.8 * rate and len(wave) % 960 == 0
    assert f"{tmp_path / 'a.wav'}: " in said and "RTF" in said
    # the same, put together by hand from transformers and the codec
    codec, tokenize = Codec.load(demo.audio_tokenizer_path), PromptTokenizer(load_tokenizer(demo.model_path))
    row = of_text("Hello there.", [("Some words.", voice)])
    prompt = of_row(row, "", Layout(), tokenize, StreamIds(), Coder(lambda: codec))
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(demo.model_path, use_text_head=True)
    spoken = speak(model.eval(), prompt, generation_config(demo.model_path, model.config, 0), 20, seed=3)
    np.testing.assert_allclose(wave, codec.decode(spoken.codes).clip(-1, 1), atol=1e-4)


def test_every_row_of_a_file_becomes_a_wav_and_a_line(demo, tmp_path):
    rows = json.loads(Path(demo.data_file).read_text())[:2]
    (Path(demo.data_file).parent / "two.json").write_text(json.dumps(rows))
    said = done(
        "generate", model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path, max_seconds=0.4,
        input=Path(demo.data_file).parent / "two.json", out=tmp_path / "out",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["00.wav", "01.wav"]
    for line, row in zip(lines, read_conversations(Path(demo.data_file).parent / "two.json"), strict=True):
        speech, reference, target = (clip_of(tmp_path / "out" / line[name]) for name in ("file", "reference", "target"))
        for heard, audio in zip((reference, target), row.audios, strict=True):
            recording = clip_of(Path(audio.recording.path))
            np.testing.assert_allclose(heard.wave, resample(recording, 24000), atol=1e-4)
        assert line["scores"]["spectral_distance_db"] == pytest.approx(spectral_distance(speech, target))
        assert len(speech.wave) / 24000 == pytest.approx(line["seconds"]) and line["text"][:40] in said
        assert len(target.wave) / 24000 == pytest.approx(line["target_seconds"], abs=1e-3) and line["error"] is None
    assert "of 2 stopped" in said


def test_a_round_in_short_by_hand():
    scores = [{"word_errors": 1, "words": 2, "speaker_similarity": 0.8}, {"word_errors": 3, "words": 8}]
    one = {"file": "a", "stopped": True, "seconds": 1.0, "target_seconds": 2.0, "generation_seconds": 2.0}
    other = {"file": "b", "stopped": False, "seconds": 2.0, "target_seconds": None, "generation_seconds": 7.0}
    lines = [one | {"scores": scores[0]}, other | {"scores": scores[1]}, {"file": None, "scores": {}}]
    assert in_short(lines) == (
        "1 of 3 stopped, 1.0 s against 2.0 s, RTF 3, WER 40 %, similarity 0.80, 1 without speech"
    )


def clip_of(file: Path) -> Decoded:
    return Decoded(file.name, *soundfile.read(file, dtype="float32", always_2d=True))


def test_mistakes_come_together(demo, tmp_path):
    said = command("generate", model_path=demo.model_path, out=tmp_path / "a", text=" ", max_seconds=0, temperature=-1)
    assert said.code == 2
    for line in ("text: there is nothing", "a .wav file", "max_seconds: 0", "temperature: -1", "audio_tokenizer_path:"):
        assert line in said.errors
    nowhere = command("generate", model_path=tmp_path / "m", lora_adapter_path=tmp_path / "l", out="a.wav", text="A")
    assert nowhere.code == 2
    for line in (f"model_path: {tmp_path}/m is", f"lora_adapter_path: {tmp_path}/l is", "audio_tokenizer_path: mis"):
        assert line in nowhere.errors
    options = {"audio_tokenizer_path": demo.audio_tokenizer_path, "text": "A", "out": tmp_path / "a.wav"}
    odd = command("generate", **options, model_path=demo.model_path, max_seconds="inf", temperature="nan", device="no")
    for line in ("max_seconds: inf is", "temperature: nan is", "device: there is no no on this machine → cpu"):
        assert odd.code == 2 and line in odd.errors
    both = command("generate", model_path=demo.model_path, out=tmp_path / "a.wav", text="A", input=tmp_path)
    assert "exactly one of them" in both.errors
    options = {"model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path}
    lost = command("generate", **options, text="A", reference=tmp_path / "no.wav", out=tmp_path / "a.wav")
    assert lost.code == 2 and "no such file" in lost.errors
    (tmp_path / "full").write_text("a file where a folder has to be")
    unwritable = command("generate", **options, text="A", out=tmp_path / "full/a.wav")
    assert unwritable.code == 2 and f"{tmp_path}/full: File exists → look whether" in unwritable.errors


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.yaml").write_text("use_lora: true\n")
    with pytest.raises(Exception, match="has not handed over a model"):
        find(tmp_path)
