"""The encoder against transformers' own, and its positions in the packed forward: values, gradients, packing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

from engine.config import Settings
from engine.data.labels import StreamIds, merge
from engine.data.mels import CHUNK_FRAMES, TAIL, convolved, embeddings, pooled
from engine.data.packing import empty_sample, pack
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.model.packed import install
from engine.model.trainable import choose_trainable
from engine.model.whisper import WhisperConditioning
from tests.model.whisper_tiny import HEARD, N_MELS, heard_sample, random_mels, tiny_whisper
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model

WIDTH = 48


def conditioning() -> WhisperConditioning:
    whisper = tiny_whisper()
    torch.manual_seed(3)
    module = WhisperConditioning(whisper.config, WIDTH)
    module.encoder.load_state_dict(whisper.model.encoder.state_dict())
    return module


def conditioned(**settings):
    model = tiny_model()
    choose_trainable(model, Settings(model_path="base", **settings), conditioning())
    return install(model, "sdpa", "full")


def run(model, samples):
    """Loss of one packed row and the gradients of what is trained."""
    model.zero_grad()
    loss, _ = model(pack(samples, AUDIO), torch.ones(1) / 40, torch.ones(CODEBOOKS) / 90)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- the encoder


def test_the_encoder_is_whispers():
    mels = torch.randn(2, CHUNK_FRAMES, N_MELS)
    module = conditioning()
    with torch.no_grad():
        ours = module.encoder.layer_norm(module.encode(mels, torch.full((2,), CHUNK_FRAMES)))
        wanted = tiny_whisper().model.encoder(mels.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def qwen_tower() -> Qwen2AudioEncoder:
    """The same tower in transformers: Whisper's encoder, pooled before its last norm."""
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=N_MELS, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48
    )
    tower = Qwen2AudioEncoder._from_config(config, attn_implementation="eager").eval()
    tower.load_state_dict(tiny_whisper().model.encoder.state_dict())
    return tower


@pytest.mark.parametrize("lengths", [(3000,), (2999, 64), (2998, 3, 40), (17, 1000)])
def test_positions_equal_those_of_the_full_thirty_seconds(lengths):
    """The rows kept of each clip, cropped to the longest, against all 3000 frames through another implementation."""
    rng = np.random.default_rng(sum(lengths))
    full = rng.normal(0, 0.7, (len(lengths), CHUNK_FRAMES, N_MELS)).astype(np.float32)
    longest = min(max(lengths) + TAIL, CHUNK_FRAMES)
    kept = np.zeros((len(lengths), longest, N_MELS), np.float32)
    for i, length in enumerate(lengths):
        full[i, length + TAIL :] = -0.5  # silence
        kept[i, : length + TAIL] = full[i, : min(length + TAIL, longest)]
    frames = torch.tensor(lengths)
    index = torch.cat([i * pooled(longest) + torch.arange(pooled(n)) for i, n in enumerate(lengths)])
    module = conditioning()
    mask = torch.where(torch.arange(1500) < convolved(frames)[:, None], 0.0, -torch.inf)[:, None, None]
    with torch.no_grad():
        ours = module(torch.from_numpy(kept), frames, index)
        tower = qwen_tower()(torch.from_numpy(full).transpose(1, 2), mask.expand(-1, 1, 1500, -1)).last_hidden_state
        wanted = module.projection(torch.cat([tower[i, : pooled(n)] for i, n in enumerate(lengths)]))
    assert len(ours) == sum(embeddings(n + TAIL) for n in lengths)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_no_recording_is_no_position_but_still_a_gradient():
    module = conditioning()
    module.choose_trainable(encoder=True, projection=True)
    heard = module(torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert heard.shape == (0, WIDTH)
    heard.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad is (name != "encoder.embed_positions.weight")
        assert not parameter.requires_grad or not parameter.grad.any(), name


# ---------------------------------------------------------------- in the packed forward


def test_whisper_positions_are_text_positions_with_the_encoders_embeddings():
    """The same row without an encoder, its Whisper positions spelt with tokens whose embeddings are the features."""
    rng = np.random.default_rng(0)
    sample = heard_sample(rng, 9, 14, frames=70)
    model = conditioned()
    places = np.flatnonzero(sample.input_ids == HEARD)
    assert len(places) == 17 == embeddings(72)
    with torch.no_grad():
        mels = torch.from_numpy(sample.mels[0])[None]
        features = model.whisper(mels, torch.tensor([70]), torch.arange(17))
        loss, sums = model(pack([sample], AUDIO), torch.ones(1), torch.ones(CODEBOOKS))
        plain = tiny_model()
        spelt = np.setdiff1d(np.arange(3, 100), sample.input_ids)[: len(places)]
        plain.model.embed_tokens.weight[spelt] = features
        ids = sample.input_ids.copy()
        ids[places] = spelt
        written = replace(sample, input_ids=ids, mels=(), mel_starts=())
        install(plain, "sdpa")
        wanted, wanted_sums = plain(pack([written], AUDIO), torch.ones(1), torch.ones(CODEBOOKS))
    torch.testing.assert_close(sums, wanted_sums)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_packed_together_as_one_by_one(frozen):
    rng = np.random.default_rng(1)
    samples = [heard_sample(rng, 7, 12, 50), random_sample(rng, 6, 9), heard_sample(rng, 4, 20, 131)]
    samples.append(heard_sample(rng, 3, 5, frames=2))  # too short for a position
    model = conditioned(freeze_audio_tower=frozen)
    loss, gradients = run(model, samples)
    single = [run(model, [sample]) for sample in samples]
    torch.testing.assert_close(loss, sum(one for one, _ in single), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        wanted = sum(one[name] for _, one in single)
        assert (gradient - wanted).abs().max() <= 1e-5 * max(wanted.abs().max(), 1e-9), name


def test_gradients_reach_the_projection_and_the_encoder_only_if_asked():
    rng = np.random.default_rng(2)
    samples = [heard_sample(rng, 7, 12, 50)]
    for flags, wanted in [
        ({}, {"projection"}),
        ({"freeze_audio_tower": False}, {"projection", "encoder"}),
        ({"freeze_audio_encoder_proj": True}, set()),
        ({"train_modules": ["audio_lm_head"]}, {"projection"}),
    ]:
        _, gradients = run(conditioned(**flags), samples)
        reached = {name.split(".")[1] for name in gradients if name.startswith("whisper.") and gradients[name].any()}
        assert reached == wanted, flags
        assert not any("embed_positions" in name for name in gradients)


def test_lora_adapts_nothing_of_the_encoder_and_trains_the_projection_whole():
    model = tiny_model()
    wrapped = choose_trainable(model, Settings(model_path="base", use_lora=True), conditioning())
    inside = [name for name, p in wrapped.named_parameters() if ".whisper." in name and p.requires_grad]
    assert inside == [f"base_model.model.whisper.projection.{part}" for part in ("weight", "bias")]
    assert not any(".whisper." in name and "lora" in name for name, _ in wrapped.named_parameters())


def test_rows_without_recordings_run_the_encoder_for_nothing():
    rng = np.random.default_rng(4)
    samples = [random_sample(rng, 9, 0), empty_sample(CODEBOOKS)]
    loss, gradients = run(conditioned(), samples)
    plain = install(tiny_model(), "sdpa")
    wanted, _ = plain(pack(samples, AUDIO), torch.ones(1) / 40, torch.ones(CODEBOOKS) / 90)
    assert torch.equal(loss, wanted.detach())
    assert not gradients["whisper.projection.weight"].any()


def test_a_model_without_encoder_refuses_whisper_positions():
    rng = np.random.default_rng(5)
    model = install(tiny_model(), "sdpa")
    with pytest.raises(ValueError, match="no encoder"):
        model(pack([heard_sample(rng, 5, 6, 40)], AUDIO), torch.ones(1), torch.ones(CODEBOOKS))


def test_a_clip_of_more_than_thirty_seconds_is_heard_in_chunks():
    """Features of each chunk alone, in order, before the clip's codes."""
    rng = np.random.default_rng(6)
    mels = random_mels(rng, CHUNK_FRAMES + 90)
    ids = np.array([5, HEARD, 6], np.int32)
    prompt = Prompt(ids, np.full(3, IGNORED, np.int32), audios=(None,), trained=(False,))
    codes = rng.integers(0, 32, (CODEBOOKS, 3), np.int16)
    sample = merge(prompt, [codes], SpecialTokens(HEARD, AUDIO), StreamIds(CODEBOOKS, 32, 33), mels=[mels])
    assert (sample.input_ids == HEARD).sum() == 750 + 22 and sample.mel_starts == (1,)
    batch = pack([sample], AUDIO)
    module = conditioning()
    with torch.no_grad():
        heard = module(batch.mels, batch.mel_frames, batch.whisper_index)
        first = module(torch.from_numpy(mels[None, :CHUNK_FRAMES]), torch.tensor([CHUNK_FRAMES]), torch.arange(750))
        rest = module(torch.from_numpy(mels[None, CHUNK_FRAMES:]), torch.tensor([90]), torch.arange(22))
    torch.testing.assert_close(heard, torch.cat([first, rest]), rtol=1e-5, atol=1e-5)
    assert batch.text_ids[batch.whisper_rows].tolist() == [HEARD] * 772
