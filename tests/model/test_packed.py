"""The packed forward against transformers' own forward on the same weights and samples: loss and all gradients."""

import numpy as np
import pytest
import torch

from engine.data.packing import empty_sample, pack
from engine.data.prompts import IGNORED
from engine.errors import ConfigError
from engine.model.attention import IMPLEMENTATIONS, SampleBounds, choose, for_each_query
from engine.model.loss import CHUNK_ROWS, linear_cross_entropy
from engine.model.packed import install
from engine.model.recompute import MODES
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model


def native_loss(model, samples):
    """Sum over samples of transformers' forward, one sample at a time, as sums over targets; mean over codebooks."""
    text_sum, audio_sums = 0.0, torch.zeros(CODEBOOKS)
    n_text = sum(s.text_targets for s in samples)
    n_audio = torch.tensor(sum(s.audio_targets for s in samples))
    for s in samples:
        out = model.model(
            input_ids=torch.from_numpy(s.input_ids).long()[None],
            audio_input_ids=torch.from_numpy(s.audio_ids).long()[None],
            audio_input_ids_mask=torch.ones(1, len(s.audio_ids), dtype=torch.bool),
        ).last_hidden_state[0]
        text_logits, audio_logits = model.text_lm_head(out), model.audio_lm_head(out).view(len(s), CODEBOOKS, -1)
        targets = torch.full((len(s), CODEBOOKS), IGNORED)
        targets[torch.from_numpy(s.input_ids) == AUDIO] = torch.from_numpy(s.audio_labels).long()
        labels = torch.from_numpy(s.labels).long()
        text_sum = text_sum + torch.nn.functional.cross_entropy(text_logits[:-1], labels[1:], reduction="sum")
        per = torch.nn.functional.cross_entropy(
            audio_logits[:-1].transpose(1, 2), targets[1:], reduction="none", ignore_index=IGNORED
        )
        audio_sums = audio_sums + per.sum(0)
    return text_sum / max(n_text, 1) + (audio_sums / n_audio.clamp(min=1)).mean()


def packed_loss(model, samples):
    n_text = sum(s.text_targets for s in samples)
    n_audio = torch.tensor(sum(s.audio_targets for s in samples)).clamp(min=1)
    text_weight, audio_weight = torch.tensor([1.0 / max(n_text, 1)]), 1.0 / n_audio / CODEBOOKS
    return model(pack(samples, AUDIO), text_weight, audio_weight)[0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


MIXES = {
    "mixed": [(20, 30), (7, 12), (15, 40)],
    "with text only and audio only and one token": [(20, 30), (11, 0), (0, 17), (1, 0), (9, 22)],
    "all text": [(9, 0), (14, 0)],
    "all audio": [(0, 12), (0, 20)],
}


@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("mix", MIXES)
def test_loss_and_gradients_equal_the_native_forward(mix, checkpointing):
    rng = np.random.default_rng(3)
    samples = [random_sample(rng, *sizes) for sizes in MIXES[mix]]
    model = tiny_model()
    wanted_loss = native_loss(model, samples)
    wanted = gradients(model, wanted_loss)
    loss = packed_loss(install(model, "sdpa", checkpointing), samples)
    got = gradients(model, loss)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    for name, gradient in got.items():
        assert gradient is not None, f"{name} has no gradient: processes would wait for each other"
        expected = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
        scale = expected.abs().max().clamp(min=1e-12)
        assert (gradient - expected).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("label_text, label_audio", [(False, True), (True, False), (False, False)])
def test_missing_labels_give_zeros_never_nan_or_none(label_text, label_audio):
    rng = np.random.default_rng(0)
    model = install(tiny_model(), "sdpa")
    got = gradients(model, packed_loss(model, [random_sample(rng, 12, 20, label_text, label_audio)]))
    for name, gradient in got.items():
        assert gradient is not None and gradient.isfinite().all(), name
    assert bool(got["text_lm_head.weight"].any()) == label_text
    assert bool(got["audio_lm_head.weight"].any()) == label_audio


def test_the_empty_micro_batch_adds_nothing():
    model = install(tiny_model(), "sdpa")
    loss, sums = model(pack([empty_sample(CODEBOOKS)], AUDIO), torch.ones(1), torch.ones(CODEBOOKS))
    got = gradients(model, loss)
    assert loss == 0 and not sums.any()
    assert all(g is not None and not g.any() for g in got.values())


def test_samples_do_not_see_each_other():
    rng = np.random.default_rng(1)
    samples = [random_sample(rng, 10, 15) for _ in range(3)]
    model = install(tiny_model(), "sdpa").eval()
    ones = torch.ones(1), torch.ones(CODEBOOKS)
    alone = sum(model(pack([s], AUDIO), *ones)[1] for s in samples)
    together = model(pack(samples, AUDIO), *ones)[1]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_native_calls_and_generate_are_untouched():
    rng = np.random.default_rng(2)
    sample = random_sample(rng, 10, 15)
    inputs = {
        "input_ids": torch.from_numpy(sample.input_ids).long()[None],
        "audio_input_ids": torch.from_numpy(sample.audio_ids).long()[None],
        "audio_input_ids_mask": torch.ones(1, 15, dtype=torch.bool),
    }
    model = tiny_model().eval()
    with torch.no_grad():
        wanted, wanted_codes = model(**inputs).logits, model.generate(**inputs, do_sample=False, max_new_tokens=12)
        model = install(model, "sdpa", "full")
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12), wanted_codes)


@pytest.mark.parametrize("rows", [CHUNK_ROWS + 37, 7, 6, 0])
def test_heads_work_in_chunks(rows):
    """Also with a chunk alone; fewer rows than the six columns leave the weight's gradient to the backward."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 6, requires_grad=True)
    weight = torch.randn(2 * 5, 6, requires_grad=True)
    targets = torch.randint(-1, 5, (rows, 2))
    group_weights = torch.tensor([0.3, 2.0])
    total, tallies = linear_cross_entropy(hidden, weight, targets, group_weights)
    (3 * total).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = (hidden @ weight.t()).view(rows, 2, 5)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-1)
    torch.testing.assert_close(tallies[:, 0], losses.sum(0), rtol=1e-5, atol=1e-4)
    (3 * (losses.sum(0) * group_weights).sum()).backward()
    torch.testing.assert_close(got, (hidden.grad, weight.grad), rtol=1e-4, atol=1e-5)


def test_flex_attention_gives_the_numbers_of_sdpa():
    """The GPU kernels are compared in tests/gpu; flex has a forward on the CPU too."""
    torch.manual_seed(0)
    lengths = (5, 1, 130, 12, 400, 92, 3)  # one sample fills whole blocks of 128
    bounds = SampleBounds(lengths, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), max(lengths))
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        got, wanted = (IMPLEMENTATIONS[name](q, k, v, bounds, 0.25) for name in ("flex", "sdpa"))
        repeated = IMPLEMENTATIONS["sdpa"](q, for_each_query(k, q), for_each_query(v, q), bounds, 0.25)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(repeated, wanted, rtol=1e-5, atol=1e-5)  # as on a GPU


@pytest.mark.parametrize("capability, dtype, chosen", [
    ((7, 5), torch.bfloat16, "sdpa"), ((8, 0), torch.float32, "sdpa"), ((8, 0), torch.bfloat16, "varlen"),
])  # fmt: skip
def test_a_kernel_that_the_gpu_has(capability, dtype, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose("auto", torch.device("cuda"), dtype) == chosen
    if chosen == "sdpa":
        with pytest.raises(ConfigError, match="varlen needs (a GPU of Ampere's kind|bf16).* → set attention: auto"):
            choose("varlen", torch.device("cuda"), dtype)
