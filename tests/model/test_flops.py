"""Parameter counts against the model itself; FLOPs against the table worked out by hand for the real model."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HiggsAudioV2Config

from engine.data.packing import pack
from engine.model.flops import Parameters, active_adapters, peak_flops, step_flops
from engine.model.initial import build_on_meta
from engine.model.packed import install
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model

REAL = HiggsAudioV2Config(codebook_size=1026)


def test_parameters_of_the_real_model():
    parameters = Parameters.of(REAL)
    assert parameters == Parameters(
        active=2_818_572_288, text_head=394_002_432, audio_head=25_214_976, total=5_771_283_456
    )
    assert parameters.total == sum(p.numel() for p in build_on_meta(REAL).parameters())


@pytest.mark.parametrize("length, gflop", [(512, 17.33), (1024, 17.59), (2048, 18.12), (4096, 19.18), (8192, 21.29)])
def test_cost_of_an_audio_position(length, gflop):
    assert step_flops(REAL, [length], 0, length) / length / 1e9 == pytest.approx(gflop, abs=0.005)


def test_a_text_target_costs_its_head():
    assert step_flops(REAL, [100], 1, 0) - step_flops(REAL, [100], 0, 0) == 6 * 3072 * 128_256


def test_lora_by_hand():
    """Rank 16 on all linear layers: per layer 16 x (in + out) of seven matrices."""
    adapters = 28 * 16 * (2 * 6144 + 2 * 4096 + 3 * 11264)
    assert active_adapters(REAL, 16) == adapters
    wanted = 4 * 2_818_572_288 * 1024 + 6 * adapters * 1024 + 516_096 * 1024**2 + 4 * 25_214_976 * 900
    assert step_flops(REAL, [1024], 0, 900, adapters) == wanted
    assert active_adapters(REAL, 16, ["q_proj"]) == 28 * 16 * 6144


@pytest.mark.parametrize("adapters", [None, 1_000_000])
def test_recomputation_is_one_more_forward_of_the_layers_and_of_no_head(adapters):
    """A forward costs two per parameter and a third of the attention of forward and backward."""
    plain, again = (step_flops(REAL, [1024, 7], 5, 900, adapters, recomputed) for recomputed in (False, True))
    run = 2_818_572_288 + (adapters or 0)
    assert again - plain == 2 * run * 1031 + 172_032 * (1024**2 + 7**2)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward of the body"])
def test_the_model_multiplies_as_much_as_the_formula_says(train):
    """By torch's own counter, which does not see the CPU's attention. Without gradients heads compute none."""
    rng = np.random.default_rng(0)
    batch = pack([random_sample(rng, 20, 30), random_sample(rng, 7, 12)], AUDIO)
    model = install(tiny_model(), "sdpa")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        if train:
            model._hidden_states(batch).sum().backward()
        else:
            model(batch, torch.ones(1), torch.ones(CODEBOOKS))
    targets = (0, 0) if train else (len(batch.text_targets), len(batch.audio_targets))
    formula = step_flops(model.config, batch.sample_lengths, *targets) - 6 * 2 * 48 * (50**2 + 19**2)
    assert counter.get_total_flops() == (formula if train else formula / 3)


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    for other in ("Some other GPU", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"):
        assert peak_flops(other) is None
