"""Logits with a part of the model in memory at a time: bit for bit those of the loaded model, and the golden ones."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

from engine.model.initial import build_on_meta
from engine.model.streamed import ProbeBatch, probe_batch, streamed_logits
from engine.model.trainable import add_adapters
from engine.model.weights import WeightFiles
from tests.conftest import GOLDEN
from tests.tiny import AUDIO, CODEBOOKS, tiny_model

BATCHES = json.loads((GOLDEN / "batches.json").read_text())


def loaded_logits(model, batch: ProbeBatch):
    """As transformers itself computes them, with all weights in memory."""
    with torch.no_grad():
        out = model.eval()(input_ids=batch.input_ids[None], audio_input_ids=batch.audio_ids[None], use_cache=False,
                           audio_input_ids_mask=torch.ones(1, len(batch.audio_ids), dtype=torch.bool),
                           output_hidden_states=True)  # fmt: skip
        text = model.text_lm_head(out.hidden_states[-1])[0]
    is_audio = batch.input_ids == model.config.audio_token_id
    return text[~is_audio], out.logits[0, is_audio].view(len(batch.audio_ids), CODEBOOKS, -1)


def test_they_are_those_of_the_loaded_model(demo):
    loaded = HiggsAudioV2ForConditionalGeneration.from_pretrained(demo.model_path, use_text_head=True)
    tensors = load_file(demo.model_path / "model.safetensors")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo.model_path)
    for text in (None, "The sun rises in the east."):
        batch = probe_batch(loaded.config, text, tokenizer)
        got = streamed_logits(build_on_meta(loaded.config), tensors.__getitem__, batch)
        for mine, wanted in zip(got, loaded_logits(loaded, batch), strict=True):
            assert mine.numel() and torch.equal(mine, wanted)


def test_adapters_and_modules_that_are_trained_whole_take_part():
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "audio_mlp.up_proj"],
                        modules_to_save=["audio_lm_head", "model.embed_audio_tokens"])  # fmt: skip
    model, meta = tiny_model(), build_on_meta(tiny_model().config)
    model.config.name_or_path = meta.config.name_or_path = ""
    wrapped, on_meta = (add_adapters(m, config) for m in (model, meta))
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(p.shape, generator=generator) / 8 for name, p in wrapped.named_parameters()}
    for module_name, module in wrapped.named_modules():
        for last in dict(module.named_parameters(recurse=False)):
            setattr(module, last, torch.nn.Parameter(values[f"{module_name}.{last}"]))
    asked = []

    def read(name):
        asked.append(name)
        return values[name]

    batch = probe_batch(model.config)
    got = streamed_logits(on_meta, read, batch)
    assert all(torch.equal(*pair) for pair in zip(got, loaded_logits(wrapped.get_base_model(), batch), strict=True))
    assert sorted(asked) == sorted(name for name in values if ".original_module." not in name)
    assert on_meta.training, "the mode is given back"
    values = values | {name: value * 2 for name, value in values.items() if "lora_B" in name}
    assert not torch.equal(streamed_logits(on_meta, read, batch)[0], got[0])


@pytest.mark.parametrize("name", BATCHES)
def test_they_are_the_golden_ones(name, golden_model):
    files, data = WeightFiles(golden_model), np.load(GOLDEN / "logits" / f"{name}.npz")
    model, spoken = build_on_meta(files.config), iter(torch.from_numpy(data["audio_logits"]))
    for row in range(len(BATCHES[name])):
        real = data["attention_mask"][row].astype(bool)
        out = torch.from_numpy(data["audio_out_mask"][row][real].astype(bool))
        is_audio = torch.from_numpy(data["audio_in_mask"][row][real].astype(bool)) | out
        ids = torch.from_numpy(data["input_ids"][row][real]).long().masked_fill(is_audio, files.config.audio_token_id)
        batch = ProbeBatch(ids, torch.from_numpy(data["stream_ids"][row][real]).long()[is_audio])
        text, audio = streamed_logits(model, files.read, batch)
        wanted = torch.from_numpy(data["text_logits"][row][real])[~is_audio]
        torch.testing.assert_close(text, wanted, rtol=0, atol=2e-5)
        for got in audio[out[is_audio]]:
            torch.testing.assert_close(got, next(spoken), rtol=0, atol=2e-5)


def test_a_part_at_a_time_is_in_memory():
    """When a part's weights are asked for, those of the part before it have gone; at the end all have."""
    model = tiny_model()
    weights, meta = model.state_dict(), build_on_meta(model.config)
    present = []

    def read(name):
        present.append({key.split(".weight")[0] for key, p in meta.named_parameters() if not p.is_meta})
        present[-1] = {".".join(key.split(".")[:3]) for key in present[-1]}
        return weights[name]

    streamed_logits(meta, read, probe_batch(model.config))
    assert max(map(len, present)) == 1
    assert all(parameter.is_meta for parameter in meta.parameters())
    with pytest.raises(KeyError):
        streamed_logits(meta, {n: w for n, w in weights.items() if "norm" not in n}.__getitem__,
                        probe_batch(model.config))  # fmt: skip
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in meta.modules())


def test_the_probe_has_a_text_and_a_whole_delayed_clip():
    config = tiny_model().config
    batch = probe_batch(config)
    assert torch.equal(batch.input_ids, probe_batch(config).input_ids)
    assert int((batch.input_ids == AUDIO).sum()) == len(batch.audio_ids) == 21
    assert batch.audio_ids[0].eq(config.audio_stream_bos_id).all()
    assert batch.audio_ids[-1].eq(config.audio_stream_eos_id).all()
    assert batch.audio_ids[CODEBOOKS].lt(config.audio_stream_bos_id).all(), "every codebook speaks in the middle"
    assert len(batch.audio_ids[1:-CODEBOOKS, 0].unique()) > 5
