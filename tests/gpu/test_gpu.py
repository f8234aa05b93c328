"""What only a GPU can show: bf16 and its attention kernels against fp32, and steps in which the host never waits.

Heads are of the real size, 128 wide, three queries to a key, since kernels choose their code by it.
"""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from engine.config import Settings
from engine.data.batches import Step
from engine.data.labels import Sample
from engine.data.packing import pack
from engine.higgs_engine import HiggsEngine, Targets
from engine.model import fused
from engine.model.attention import IMPLEMENTATIONS, SampleBounds
from engine.model.packed import install
from engine.model.weights import WeightFiles
from engine.observe.metrics import Meter
from engine.observe.skipped import SkippedSteps
from engine.runtime.distributed import World, init_process_group, shutdown
from engine.step_size import StepSize
from tests.tiny import AUDIO, CODEBOOKS, random_sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KERNELS = [
    pytest.param("flash", marks=pytest.mark.skipif(not importlib.util.find_spec("flash_attn"), reason="no flash-attn")),
    "varlen",
    "flex",
    "sdpa",
]

LOSS_TOLERANCE = 3e-3
"""Relative, of a bf16 loss: a mean over hundreds of targets, each of logits that are rounded by 2^-9."""

GRADIENT_TOLERANCE = 5e-2
"""Norm of the error by norm of the gradient: some 50 roundings by 2^-9 on the way there and back add up to 2 %."""

KERNEL_TOLERANCE = 1e-2
"""Likewise of one attention: inputs, probabilities and outputs are each rounded once, by 2^-9."""

MIXES = {"mixed": [(20, 130), (70, 300), (1, 0), (33, 64)], "all text": [(90, 0), (40, 0)], "all audio": [(0, 200)]}


def small_model(device: str, dtype: torch.dtype) -> HiggsAudioV2ForConditionalGeneration:
    """The same weights whatever the device and dtype; rotary frequencies stay fp32, as in training."""
    torch.manual_seed(0)
    config = HiggsAudioV2Config(
        vocab_size=512, hidden_size=384, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=128, codebook_size=34, audio_stream_bos_id=32, audio_stream_eos_id=33,
        audio_token_id=AUDIO, audio_delay_token_id=111, audio_bos_token_id=112, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # layers whose outputs are as large as their inputs, so that an error in one of them shows
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def samples_of(mix: str) -> list[Sample]:
    rng = np.random.default_rng(5)
    return [random_sample(rng, *sizes) for sizes in MIXES[mix]]


def targets_of(samples: list[Sample]) -> Targets:
    return Targets(sum(s.text_targets for s in samples), tuple(int(n) for n in sum(s.audio_targets for s in samples)))


def loss_and_gradients(
    device: str, dtype: torch.dtype, attention: str, mix: str, checkpointing: str = "none",
    compile: bool = False, liger: bool = False,
):  # fmt: skip
    samples = samples_of(mix)
    targets = targets_of(samples)
    text_weight = torch.tensor([1 / max(targets.text, 1)], device=device)
    codebook_weights = 1 / torch.tensor(targets.codebooks, device=device).clamp(min=1) / CODEBOOKS
    model = install(small_model(device, dtype), attention, checkpointing, compile)
    if liger:
        fused.install(model)
    loss, _ = model(pack(samples, AUDIO).to(device), text_weight, codebook_weights)
    loss.backward()
    return loss.item(), {name: None if p.grad is None else p.grad.float().cpu() for name, p in model.named_parameters()}


def compare(got: tuple, wanted: tuple) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=LOSS_TOLERANCE)
    for name, reference in wanted[1].items():
        gradient = got[1][name]
        assert gradient is not None and gradient.isfinite().all(), name
        assert torch.linalg.vector_norm(gradient - reference) <= GRADIENT_TOLERANCE * reference.norm(), name


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_follows_fp32(kernel, mix):
    """Loss and every gradient, also with no row of a modality: its FFN has gradients of zero, never None or NaN."""
    compare(
        loss_and_gradients("cuda", torch.bfloat16, kernel, mix), loss_and_gradients("cpu", torch.float32, "sdpa", mix)
    )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("how", ["compile", "liger"])
def test_other_kernels_follow_fp32(how, mode, mix):
    """Compiled layers and Liger's kernels; what selective checkpointing keeps must not be written over."""
    if how == "liger":
        pytest.importorskip("liger_kernel", reason="no Liger")
    compare(
        loss_and_gradients("cuda", torch.bfloat16, "varlen", mix, mode, **{how: True}),
        loss_and_gradients("cpu", torch.float32, "sdpa", mix),
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradients(mode):
    kept, recomputed = (loss_and_gradients("cuda", torch.bfloat16, "sdpa", "mixed", name) for name in ("none", mode))
    compare(recomputed, kept)


def attention_and_gradients(device: str, dtype: torch.dtype, kernel: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    lengths = (1, 130, 700, 64, 5)
    bounds = SampleBounds(lengths, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32).to(device), max(lengths))
    inputs = [torch.randn(sum(lengths), heads, 128).to(device, dtype).requires_grad_() for heads in (6, 2, 2)]
    out = IMPLEMENTATIONS[kernel](*inputs, bounds, 128**-0.5)
    out.backward(torch.randn(out.shape).to(device, dtype))
    return [tensor.detach().float().cpu() for tensor in (out, *(t.grad for t in inputs))]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_fp32_attention(kernel):
    wanted = attention_and_gradients("cpu", torch.float32, "sdpa")
    got = attention_and_gradients("cuda", torch.bfloat16, kernel)
    for name, g, w in zip(("output", "dq", "dk", "dv"), got, wanted, strict=True):
        assert torch.linalg.vector_norm(g - w) <= KERNEL_TOLERANCE * w.norm(), name


def test_fp32_attention_makes_no_square_matrix():
    """A sample of 8192 tokens would have 1.5 GiB of scores; its queries, and what is like them, have 24 MiB each."""
    tokens = 8192
    bounds = SampleBounds((tokens,), torch.tensor([0, tokens], dtype=torch.int32, device="cuda"), tokens)
    inputs = [torch.randn(tokens, heads, 128, device="cuda", requires_grad=True) for heads in (6, 2, 2)]
    torch.cuda.reset_peak_memory_stats()
    IMPLEMENTATIONS["sdpa"](*inputs, bounds, 128**-0.5).sum().backward()
    assert torch.cuda.max_memory_allocated() < 2**29


def train(folder, world: World, steps: int, bf16: bool, sync_debug_mode=lambda mode: None) -> tuple[float, float]:
    """Text loss of the first and of the last of a few steps, the last ones under "error" of the debug mode."""
    small_model("cpu", torch.float32).save_pretrained(folder)
    mixes = [samples_of(mix) for mix in MIXES]
    settings = Settings(model_path=folder, backend="fsdp", bf16=bf16, text_loss_weight=1.0, skip_spikes_sigma=6.0,
                        micro_batches_per_step=len(mixes)).with_resolved(1, has_gpu=True)  # fmt: skip
    targets = targets_of([s for samples in mixes for s in samples])
    engine = HiggsEngine(settings, world, WeightFiles(folder), rounds=len(mixes))
    batches = [pack(samples, AUDIO).to(world.device) for samples in mixes]
    results = [engine.train_step(batches, targets, 1e-3)]  # the first use of kernels and of FSDP may wait
    size = StepSize(targets, tokens=1)
    meter = Meter(settings, world, engine.config, False, StepSize(Targets(0, (0,) * CODEBOOKS)), steps)
    skipped = SkippedSteps(10, None)
    sync_debug_mode("error")
    try:
        for number in range(steps):
            results.append(engine.train_step(batches, targets, 1e-3))
            meter.add(results[-1], size)
            skipped.add(Step(number, 0, ()), 1e-3, results[-1])
    finally:
        sync_debug_mode("default")
    assert skipped.read() == [] and meter.read(steps)["skipped_since"] == 0
    return tuple(float(r.sums[0]) / targets.text for r in (results[0], results[-1]))


def test_the_host_never_waits_for_the_gpu(tmp_path):
    """Three optimizer steps of three micro-batches, one without text and one without audio, through FSDP in bf16.

    They are judged by the guard, and their losses added up.
    transformers' forward stops some 18 times a layer to ask for the number of audio positions.
    """
    world = init_process_group()
    try:
        first, last = train(tmp_path, world, 3, True, torch.cuda.set_sync_debug_mode)
    finally:
        shutdown(world)
    assert last < first
