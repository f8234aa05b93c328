"""Overfit and reproduce: what was trained is what unmodified transformers says, to the last code, and it stops.

Greedy generation from the inference prompt of the same layout must return the target's stream, EOS triangle
included: prompts, labels, delay pattern, loss, backends, checkpoint, consolidation and merge all have to be right.
"""

import json

import pytest
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.cli import main
from engine.data.audio import content_key
from engine.data.code_cache import CodeCache
from engine.data.codec import codec_identity
from engine.data.formats import read_conversations
from engine.data.labels import StreamIds, delayed_stream, merge
from engine.data.layouts import Layout
from engine.data.prompts import PromptTokenizer
from engine.model.weights import load_tokenizer
from tests.processes import run

pytestmark = pytest.mark.slow

CLIPS = 3


@pytest.fixture(scope="module")
def few_clips(demo):
    file = demo.data_file.with_name("few_clips.json")
    file.write_text(json.dumps(json.loads(demo.data_file.read_text())[:CLIPS]))
    return file


def overfit(demo, data_file, out, *extra):
    arguments = {
        "model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path, "train_data_file": data_file,
        "output_dir": out, "codes_cache_dir": demo.data_file.parent / "codes", "num_train_epochs": 1000,
        "warmup_steps": 5, "logging_steps": 20, "dataloader_num_workers": 0, "per_device_train_batch_size": 2,
    }  # fmt: skip
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    run(["-m", "engine", "train", *flags, *extra], world_size=2)


def assert_reproduces(model_folder, demo, data_file):
    model, loading = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        model_folder, use_text_head=True, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenize = PromptTokenizer(load_tokenizer(model_folder))
    cache = CodeCache(demo.data_file.parent / "codes", codec_identity(demo.audio_tokenizer_path))
    for row in read_conversations(data_file):
        conversation = Layout().apply(row)
        *references, target = (cache.get(content_key(audio.recording)) for audio in conversation.audios)
        prompt = merge(tokenize.inference(conversation), references, tokenize.special, StreamIds())
        generated = model.generate(
            input_ids=torch.from_numpy(prompt.input_ids).long()[None],
            audio_input_ids=torch.from_numpy(prompt.audio_ids).long()[None],
            audio_input_ids_mask=torch.ones(1, len(prompt.audio_ids), dtype=torch.bool),
            max_new_tokens=target.shape[1] + 40, do_sample=False, ras_win_len=None,
        )  # fmt: skip
        stream = generated[0, len(prompt.audio_ids) :].numpy()
        assert stream.tolist() == delayed_stream(target, StreamIds()).tolist()


def test_full_parameters_through_zero3(demo, few_clips, tmp_path):
    overfit(demo, few_clips, tmp_path / "run", "--ds_config", "zero3", "--max_steps", "70", "--learning_rate", "3e-3")
    assert_reproduces(tmp_path / "run" / "model", demo, few_clips)


def test_lora_through_fsdp_after_merge(demo, few_clips, tmp_path):
    overfit(
        demo, few_clips, tmp_path / "run", "--backend", "fsdp", "--max_steps", "90", "--learning_rate", "4e-3",
        "--use_lora", "--lora_rank", "32", "--lora_alpha", "64", "--lora_dropout", "0",
        "--lora_modules_to_save", "audio_lm_head",
    )  # fmt: skip
    merged = tmp_path / "merged"
    assert not main(
        ["merge", "--base_model_path", str(demo.model_path), "--lora_adapter_path",
         str(tmp_path / "run" / "lora_adapters"), "--output_path", str(merged)]
    )  # fmt: skip
    assert json.loads((merged / "merge_info.json").read_text())["base_model"] == str(demo.model_path)
    assert_reproduces(merged, demo, few_clips)
