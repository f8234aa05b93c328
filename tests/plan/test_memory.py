"""The plan: what is kept counted as autograd keeps it, what fits chosen, what does not said with the nearest change."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import HiggsAudioV2Config

from engine.config import SCHEMA, Settings
from engine.config_checks import value_problems
from engine.data.packing import pack
from engine.errors import ConfigError
from engine.model.initial import build_on_meta, fill, rebuild_buffers
from engine.model.packed import install
from engine.model.recompute import MODES
from engine.model.trainable import choose_trainable
from engine.plan import memory
from engine.plan.activations import Row, count, longest_row
from engine.plan.memory import GIB, Planner, for_training
from engine.runtime.distributed import World
from tests.commands import command
from tests.tiny import AUDIO, random_sample

CPU = torch.device("cpu")
LAYERS = 5


def config_of(**changes) -> HiggsAudioV2Config:
    shape = dict(
        vocab_size=120, hidden_size=64, intermediate_size=176, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, codebook_size=34, audio_stream_bos_id=32, audio_stream_eos_id=33,
        audio_token_id=AUDIO, audio_delay_token_id=111, audio_bos_token_id=112, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return HiggsAudioV2Config(**shape | changes)


def settings_of(**changes) -> Settings:
    return Settings(model_path="model", **{"backend": "fsdp", "bf16": False, "lora_rank": 4} | changes)


class Random:
    def read(self, name, shape):
        return torch.randn(shape) * 0.02


def really_saved(config, settings, samples) -> int:
    """Bytes of all storages that autograd saves for the backward of the layers, without checkpointing."""
    core = build_on_meta(config)
    model = choose_trainable(core, settings)
    install(core, "sdpa", "none")
    fill(model, Random(), CPU, torch.bfloat16 if settings.bf16 else torch.float32)
    rebuild_buffers(core, CPU)
    batch = pack(samples, AUDIO)
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    ours |= {t.untyped_storage().data_ptr() for t in vars(batch).values() if isinstance(t, torch.Tensor)}
    found = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = core._hidden_states(batch)
    del hidden
    return sum(found.values())


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"use_lora": True}, {"use_lora": True, "bf16": True}], ids=str)
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 96, "intermediate_size": 128}], ids=str)
def test_what_is_kept_is_what_autograd_saves(shape, changes):
    """Real numbers through torch's own hooks, five layers; the count ran two and three layers without numbers."""
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, 20, 180), random_sample(rng, 30, 250), random_sample(rng, 5, 100)]
    tokens, audio = 585, 530
    config, settings = config_of(**shape), settings_of(**changes)
    planned = count(config, settings, "none", Row(tokens, audio, 30, 400)).kept
    saved = really_saved(config, settings, samples)
    assert planned == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_keeps_what_its_table_says(bf16):
    """Of each layer `full` keeps the input; `selective` also the seven products and what attention gave."""
    size, h, f, heads, tokens = (2 if bf16 else 4), 64, 176, 4, 1000
    row = Row(tokens, 900, 20, 500)
    kept = {
        layers: {
            mode: count(config_of(num_hidden_layers=layers), settings_of(bf16=bf16), mode, row).kept for mode in MODES
        }
        for layers in (1, 2)
    }
    of_a_layer = {mode: (kept[2][mode] - kept[1][mode]) / tokens for mode in MODES}
    products = (h + 2 * 32) + h + 2 * f + h  # q, k, v; o; gate, up; down
    assert of_a_layer["full"] == pytest.approx(size * h, rel=0.02)
    assert of_a_layer["selective"] == pytest.approx(size * (h + products + h) + 4 * heads, rel=0.02)
    assert of_a_layer["none"] > 1.6 * of_a_layer["selective"]


def test_layers_that_differ_are_all_counted():
    config, row = config_of(num_hidden_layers=6), Row(500, 450, 10, 300)
    top = count(config, settings_of(train_modules=["model.layers.5.*"]), "none", row)
    everything = count(config, settings_of(), "none", row)
    assert top.kept < everything.kept / 3, "layers under the first trained one keep nothing"


def test_auto_takes_the_fastest_mode_that_fits():
    config, row = config_of(num_hidden_layers=2), Row(4000, 3600, 40, 2000)
    settings = settings_of(gradient_checkpointing="auto").with_resolved(1, has_gpu=False)
    planner = Planner(config, on_gpu=False)
    peaks = [planner.plan(settings, 1, row, mode).peak for mode in MODES]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    for mode, peak in zip(MODES, peaks, strict=True):
        assert planner.choose(settings, 1, row, peak / 0.89).mode == mode
    assert planner.choose(settings, 1, row, 1000).mode == "full"
    chosen = dataclasses.replace(settings, gradient_checkpointing="selective")
    assert planner.choose(chosen, 1, row, 1000).mode == "selective", "what the user asked for is not changed"


@pytest.mark.parametrize("backend, gone", [
    ({"backend": "deepspeed", "ds_config": "zero1"}, {"optimizer"}),
    ({"backend": "deepspeed", "ds_config": "zero2"}, {"optimizer", "gradients"}),
    ({"backend": "deepspeed", "ds_config": "zero3"}, {"optimizer", "gradients", "weights"}),
    ({"backend": "fsdp"}, {"optimizer", "gradients", "weights"}),
    ({"backend": "fsdp", "fsdp_replicas": 4}, set()),
])  # fmt: skip
def test_what_is_split_over_processes(backend, gone):
    planner, row = Planner(config_of(num_hidden_layers=2), on_gpu=True), Row(64, 60, 1, 30)
    alone, four = (
        planner.plan(settings_of(**changes, bf16=True).with_resolved(n, has_gpu=True), n, row, "none").parts
        for n, changes in ((1, backend | {"fsdp_replicas": 1}), (4, backend))
    )
    parts = ("weights", "gradients", "optimizer")
    assert {part for part in parts if four[part] == alone[part] / 4} == gone
    assert {part for part in parts if four[part] == alone[part]} == set(parts) - gone
    assert four["activations"] == alone["activations"]


def test_gradients_that_last_do_not_come_as_activations_go():
    """ZeRO 1 in bf16 has them in fp32 from the start; what the backward makes is bf16."""
    planner, row = Planner(config_of(num_hidden_layers=2), on_gpu=True), Row(4000, 3600, 40, 2000)
    zero1 = {"backend": "deepspeed", "ds_config": "zero1", "bf16": True}
    every = [settings_of(**zero1, micro_batches_per_step=n).with_resolved(1, has_gpu=True) for n in (1, 2)]
    one, two = (planner.plan(settings, 1, row, "none") for settings in every)
    n, held = planner.sizes(every[0]).trained, one.activations.peak
    assert held > 2 * n, "else the step is the peak"
    fixed = (2 + 12) * n + 2 * GIB
    assert one.peak == pytest.approx(fixed + 4 * n + held) and two.peak == pytest.approx(fixed + 6 * n + held)


def test_a_run_that_cannot_fit_is_told_so_with_a_change_that_fits(monkeypatch):
    config, world = config_of(num_hidden_layers=2), World(0, 0, 1, torch.device("cuda"))
    settings = settings_of(gradient_checkpointing="none", bf16=True).with_resolved(1, has_gpu=True)
    row = Row(4000, 3600, 40, 2000)
    planner = Planner(config, on_gpu=True)
    none, selective = (planner.plan(settings, 1, row, mode).peak for mode in ("none", "selective"))
    monkeypatch.setattr(memory, "ON_GPU", 0)
    none, selective = none - 2 * GIB, selective - 2 * GIB
    monkeypatch.setattr(memory, "_memory", lambda world: 0.89 * none)
    assert selective < 0.9 * 0.89 * none
    with pytest.raises(ConfigError, match=r"GiB are needed on each GPU.* → --gradient_checkpointing auto"):
        for_training(config, settings, world, row)
    monkeypatch.setattr(memory, "_memory", lambda world: 0.95 * none)
    assert for_training(config, settings, world, row)[0] == "none", "a plan may err by a tenth: it is let run"


@pytest.mark.parametrize("mode", MODES)
def test_processes_that_share_a_row_keep_a_piece_each(mode):
    config, row = config_of(num_hidden_layers=2, num_key_value_heads=4), Row(8000, 7200, 80, 4000)
    whole, quarter = (count(config, settings_of(sequence_parallel_size=n), mode, row) for n in (1, 4))
    assert quarter.kept == pytest.approx(whole.kept / 4, rel=0.02)


@pytest.mark.parametrize(
    "sample, wanted",
    [
        (2000, "--max_tokens_per_micro_batch 2048"),
        (4096, "--sequence_parallel_size 2 (each row shared by 2 processes)"),
    ],
)
def test_rows_of_one_long_sample_are_shared_not_shortened(sample, wanted, monkeypatch):
    monkeypatch.setattr(memory, "ON_GPU", 0)
    row, backend = Row(4096, 3700, 40, 2000, sample), {"backend": "fsdp", "gradient_checkpointing": "full"}
    settings = settings_of(**backend, bf16=True).with_resolved(2, has_gpu=True)
    planner = Planner(config_of(num_hidden_layers=2), on_gpu=True)
    assert planner.plan(settings, 2, row, "full").rounds == 1
    shared = dataclasses.replace(settings, sequence_parallel_size=2, micro_batches_per_step=3)
    assert planner.plan(shared, 2, row, "full").rounds == 3, "both processes work on each row"
    peak = planner.plan(settings, 2, row, "full").peak
    assert planner.nearest(settings, 2, row, 0.95 * peak / 0.9) == wanted


def test_longest_row():
    lengths = np.array([10, 50, 30, 40])
    assert longest_row(lengths, Settings(max_tokens_per_micro_batch=80)) == 80
    assert longest_row(lengths, Settings(max_tokens_per_micro_batch=500)) == 130
    assert longest_row(lengths, Settings(per_device_train_batch_size=2)) == 90


def test_a_cpu_with_little_memory_keeps_less(monkeypatch):
    config, world, row = config_of(num_hidden_layers=2), World(0, 0, 1, CPU), Row(4000, 3600, 40, 2000)
    settings = settings_of(gradient_checkpointing="auto").with_resolved(1, has_gpu=False)
    for memory_, mode in ((1e12, "none"), (1e6, "full")):
        monkeypatch.setattr(memory, "free_host_memory", lambda memory_=memory_: memory_)
        assert for_training(config, settings, world, row)[0] == mode
    chosen = dataclasses.replace(settings, gradient_checkpointing="selective")
    assert for_training(config, chosen, world, row) == ("selective", None)


def test_the_command_reads_config_json_only(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LEAST_TOKENS", 10**6)  # fewer changes to try
    config_of(num_hidden_layers=2).save_pretrained(tmp_path)
    said = command("plan", "--gpus", 2, "--gpu_memory", 24, model_path=tmp_path, backend="fsdp")
    assert said.code == 0, said.errors
    for words in ("at the peak", "selective", "fits", "zero3", "a step: 16,384 tokens", "prepared stores"):
        assert words in said.out
    said = command("plan", "--gpu_memory", 2.01, model_path=tmp_path, backend="fsdp", use_lora=True)
    assert said.code == 2 and "does not fit" in said.out and "nearest change that fits" in said.out


def test_a_group_of_processes_cuts_matrices_and_what_runs_through_them():
    """Norms, embeddings and heads stay whole; ZeRO splits the rest over the groups, not over all processes."""
    config, row = config_of(), Row(4000, 3600, 40, 2000)
    planner = Planner(config, on_gpu=True)
    plans = {}
    for parts in (1, 2):
        settings = settings_of(backend="deepspeed", ds_config="zero1", bf16=True, tensor_parallel_size=parts)
        plans[parts] = planner.plan(settings.with_resolved(4, has_gpu=True), 4, row, "none")
    cut = LAYERS * ((2 * 64 + 2 * 32) * 64 + 2 * 3 * 64 * 176)
    whole = plans[1].states.weights / 2 - cut
    assert plans[2].states.weights == pytest.approx(2 * (whole + cut / 2))
    assert plans[2].states.optimizer == pytest.approx(12 * (whole + cut / 2) / 2)
    inside = 4000 * 2 * LAYERS * (64 + 2 * 32 + 64 + 3 * 176)  # q, k, v, attention's output; gate, up, their product
    saved = plans[1].activations.kept - plans[2].activations.kept
    assert inside / 2 <= saved < inside
    with pytest.raises(ConfigError, match="tensor_parallel_size: 4 does not divide the model's 2 key-value heads"):
        settings = settings_of(backend="deepspeed", ds_config="zero1", tensor_parallel_size=4)
        planner.plan(settings.with_resolved(4, has_gpu=True), 4, row, "none")


def test_of_cut_matrices_the_nearest_change_is_one_that_can_be_set():
    """Stage 3 and adapters want whole matrices: neither is proposed beside tensor parallelism."""
    settings = settings_of(backend="deepspeed", ds_config="zero1", tensor_parallel_size=2)
    settings = settings.with_resolved(4, has_gpu=True)
    changes = list(memory._changes(settings, 4, Row(20000, 18000, 200, 9000), heads=2))
    assert "--ds_config zero3 --tensor_parallel_size 1" in [words for words, *_ in changes]
    for words, changed, *_ in changes:
        assert list(value_problems(changed, SCHEMA)) == [], words
        assert changed.tensor_parallel_size == 1 or "zero3" not in changed.ds_config, words
