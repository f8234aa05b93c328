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

NAMES = [path.stem for path in sorted((GOLDEN / "boson").glob("*.json"))]


@pytest.fixture(scope="module")
def model(golden_model):
    files = WeightFiles(golden_model)
    model = build_on_meta(files.config)
    weights = InitialWeights(files, seed=0)
    weights.check(model)
    fill(model, weights, torch.device("cpu"), torch.float32)
    rebuild_buffers(model, torch.device("cpu"))
    return install(model, "sdpa", recompute_layers=False)


def sums(model, samples):
    batch = pack(samples, model.config.audio_token_id)
    return model(batch, torch.ones(1), torch.ones(8))[1].detach()


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_each_sample(name, model, golden_samples):
    wanted = json.loads((GOLDEN / "boson" / f"{name}.json").read_text())["losses"]
    expected = [wanted["text_nll_sum"], *wanted["audio_nll_sum_per_codebook"]]
    torch.testing.assert_close(sums(model, [golden_samples[name]]), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_packing_all_samples_gives_the_sum_of_their_losses(model, golden_samples):
    single = sum(sums(model, [golden_samples[name]]) for name in NAMES)
    packed = sums(model, [golden_samples[name] for name in NAMES])
    torch.testing.assert_close(packed, single, rtol=1e-6, atol=1e-4)


def test_native_forward_of_the_same_modules_gives_the_golden_logits(model, tmp_path):
    """Converted weights, saved and loaded by unmodified transformers, give the original's logits."""
    model.config.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"))
    native, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tmp_path, use_text_head=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    data = np.load(GOLDEN / "logits" / "b0_single.npz")
    is_audio = data["audio_in_mask"] | data["audio_out_mask"]
    ids = np.where(is_audio, model.config.audio_token_id, data["input_ids"])
    with torch.no_grad():
        out = native(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(data["attention_mask"]),
            audio_input_ids=torch.from_numpy(data["stream_ids"][is_audio])[None],
            audio_input_ids_mask=torch.ones(1, int(is_audio.sum()), dtype=torch.bool),
        )
    wanted = torch.from_numpy(data["audio_logits"])
    got = out.logits[torch.from_numpy(data["audio_out_mask"].astype(bool))].view(wanted.shape)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
