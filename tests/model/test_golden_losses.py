"""The original-format model, converted on the fly, in our packed forward: losses and logits of the original code."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.data.packing import pack
from engine.model.initial import InitialWeights, build_on_meta, fill, rebuild_buffers
from engine.model.packed import install
from engine.model.weights import WeightFiles
from tests.conftest import GOLDEN

BATCHES = json.loads((GOLDEN / "batches.json").read_text())
NAMES = [path.stem for path in sorted((GOLDEN / "boson").glob("*.json"))]


@pytest.fixture(scope="module")
def model(golden_model):
    files = WeightFiles(golden_model)
    model = build_on_meta(files.config)
    weights = InitialWeights(files, seed=0)
    weights.check(model)
    fill(model, weights, torch.device("cpu"), torch.float32)
    rebuild_buffers(model, torch.device("cpu"))
    return install(model, "sdpa")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Converted weights, saved, and loaded by unmodified transformers."""
    folder = tmp_path_factory.mktemp("exported")
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))
    native, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return native.eval()


def sums(model, samples):
    batch = pack(samples, model.config.audio_token_id)
    return model(batch, torch.ones(1), torch.ones(8))[1][:, 0].detach()


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_each_sample(name, model, golden_samples):
    wanted = json.loads((GOLDEN / "boson" / f"{name}.json").read_text())["losses"]
    expected = [wanted["text_nll_sum"], *wanted["audio_nll_sum_per_codebook"]]
    torch.testing.assert_close(sums(model, [golden_samples[name]]), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_packing_all_samples_gives_the_sum_of_their_losses(model, golden_samples):
    single = sum(sums(model, [golden_samples[name]]) for name in NAMES)
    packed = sums(model, [golden_samples[name] for name in NAMES])
    torch.testing.assert_close(packed, single, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_our_logits_equal_the_golden_ones(batch, model, golden_samples):
    data = np.load(GOLDEN / "logits" / f"{batch}.npz")
    audio_logits = iter(torch.from_numpy(data["audio_logits"]))
    for row, name in enumerate(BATCHES[batch]):
        packed = pack([golden_samples[name]], model.config.audio_token_id)
        with torch.no_grad():
            hidden = model.model.norm(model._hidden_states(packed))[packed.to_sequence]
            text, audio = model.text_lm_head(hidden), model.audio_lm_head(hidden).view(len(hidden), 8, -1)
        real = data["attention_mask"][row].astype(bool)
        assert_close(text, data["text_logits"][row][real])
        for position in np.flatnonzero(data["audio_out_mask"][row][real]):
            assert_close(audio[position], next(audio_logits))


@pytest.mark.parametrize("batch", BATCHES)
def test_exported_weights_in_plain_transformers_give_the_golden_logits(batch, exported):
    data = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "logits" / f"{batch}.npz").items()
            if name != "losses"}  # fmt: skip
    real = data["attention_mask"].bool()
    is_audio = (data["audio_in_mask"].bool() | data["audio_out_mask"].bool()) & real
    frames = int(is_audio.sum(1).max())
    codes = torch.zeros(len(real), frames, 8, dtype=torch.long)
    filled = torch.arange(frames) < is_audio.sum(1, keepdim=True)
    codes[filled] = data["stream_ids"][is_audio].long()
    with torch.no_grad():
        out = exported.model(
            input_ids=data["input_ids"].masked_fill(is_audio, exported.config.audio_token_id),
            attention_mask=data["attention_mask"],
            audio_input_ids=codes if frames else None,
            audio_input_ids_mask=filled if frames else None,
        ).last_hidden_state
        assert_close(exported.text_lm_head(out)[real], data["text_logits"][real])
        audio = exported.audio_lm_head(out[data["audio_out_mask"].bool() & real])
    assert_close(audio.view(data["audio_logits"].shape), data["audio_logits"])


def assert_close(got, wanted):
    torch.testing.assert_close(got, torch.as_tensor(wanted), rtol=0, atol=2e-5)
