"""Adapters that leave a run: plain PEFT loads them onto plain transformers and computes what the run computed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from engine.checkpoint.lifecycle import MODEL_FILES
from engine.config import Settings, parse
from engine.data.packing import pack
from engine.errors import CheckpointError, ConfigError, ModelError
from engine.export.adapters import write_adapter
from engine.export.merge import merge
from engine.export.model_folder import copy_side_files
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.adapter_files import AdapterFiles
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.export.small_adapters import load, logits, save_adapter
from tests.tiny import AUDIO, random_sample, tiny_model

WHOLE = ["audio_lm_head", "text_lm_head", "embed_tokens", "embed_audio_tokens"]
VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "saved whole": {"lora_modules_to_save": WHOLE, "lora_target_modules": ["q_proj", "audio_mlp.up_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def engine(model: Path, **settings) -> HiggsEngine:
    fields = {"backend": "none", "use_lora": True, "lora_rank": 4, "lora_dropout": 0.0, "model_path": str(model)}
    resolved = Settings(**fields | settings).with_resolved(1, has_gpu=False)
    return HiggsEngine(resolved, World(0, 0, 1, torch.device("cpu")), WeightFiles(model), rounds=1)


def train(training: HiggsEngine, steps: int = 2) -> list[float]:
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, 9, 20), random_sample(rng, 12, 7)]
    targets = Targets(sum(s.text_targets for s in samples), (int(sum(s.audio_targets.sum() for s in samples)),) * 8)
    return [training.train_step([pack(samples, AUDIO)], targets, 1e-2).sums.sum().item() for _ in range(steps)]


def described(training: HiggsEngine, checkpoint: Path) -> SimpleNamespace:
    """What a checkpoint holds beside its tensors, written; and these, as StoredWeights has them."""
    (checkpoint / MODEL_FILES).mkdir(parents=True)
    copy_side_files(WeightFiles(training.settings.model_path), checkpoint / MODEL_FILES)
    training.backend.model.peft_config["default"].save_pretrained(checkpoint)
    trained = {n: p.detach().clone() for n, p in training.backend.model.named_parameters() if p.requires_grad}
    return SimpleNamespace(shapes={n: tuple(t.shape) for n, t in trained.items()}, read=trained.__getitem__, **trained)


def written(training: HiggsEngine, folder: Path):
    weights = described(training, folder)
    return write_adapter(weights, folder / "lora_adapters", folder / "adapter_config.json", training.settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_computes_what_the_run_did(variant, base, tmp_path, recwarn):
    training = engine(base, **VARIANTS[variant])
    train(training)
    summary = written(training, tmp_path / "checkpoint-2")
    folder = tmp_path / "checkpoint-2" / "lora_adapters"
    file = folder / "adapter_model.safetensors"
    assert summary.tensors == len(load_file(file)) and 0 < file.stat().st_size - summary.bytes < 20_000
    model = PeftModel.from_pretrained(load(base), folder).eval()
    assert not [str(w.message) for w in recwarn if "key" in str(w.message)], "PEFT missed something"
    torch.testing.assert_close(logits(model), logits(training.backend.model.eval()), rtol=1e-5, atol=1e-6)
    assert (logits(model) - logits(load(base))).abs().max() > 1e-3
    merge(None, folder, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(model), rtol=1e-4, atol=2e-6)


def test_what_is_saved_is_what_is_trained(base, tmp_path):
    """All four tables of embeddings and heads have moved, each by its own copy."""
    training = engine(base, **VARIANTS["saved whole"])
    train(training)
    written(training, tmp_path)
    stored, before = load_file(tmp_path / "lora_adapters" / "adapter_model.safetensors"), load(base).state_dict()
    tables = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items() if "lora_" not in name}
    assert tables.keys() == {
        "audio_lm_head.weight", "text_lm_head.weight", "model.embed_tokens.weight",
        "model.embed_audio_tokens.embed_audio_tokens.weight",
    }  # fmt: skip
    assert all(not torch.equal(tensor, before[name]) for name, tensor in tables.items())


def test_an_adapter_that_is_not_whole_is_not_written(base, tmp_path):
    training = engine(base, lora_target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="all B matrices are zero"):
        written(training, tmp_path / "untrained")
    train(training)
    good = described(training, tmp_path / "checkpoint")
    q = [name for name in good.shapes if "layers.1" in name]
    broken = dict.fromkeys(q[:1], torch.tensor(float("nan")))
    for shapes, read, mistakes in [
        (
            {n: s for n, s in good.shapes.items() if n != q[0]},
            good.read,
            ["layers.1.self_attn.q_proj.lora_A.weight is"],
        ),
        (good.shapes | {q[0]: (2, 48), q[1]: (48, 2)}, good.read, ["lora_A.weight has shape (2, 48)", "(48, 2), it"]),
        (good.shapes | {"base_model.model.x.lora_A.default.weight": (1,)}, good.read, ["x.lora_A.weight has no place"]),
        (
            good.shapes,
            lambda n: good.read(n) * broken.get(n, 1),
            ["layers.1.self_attn.q_proj.lora_A.weight is not fin"],
        ),
    ]:
        out = tmp_path / "out"
        with pytest.raises(CheckpointError) as caught:
            write_adapter(SimpleNamespace(shapes=shapes, read=read), out, tmp_path / "checkpoint/adapter_config.json",
                          training.settings)  # fmt: skip
        assert all(mistake in str(caught.value) for mistake in mistakes), caught.value
        assert not (out / "adapter_model.safetensors").exists()


# ---- going on from an adapter


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_goes_on_from_an_adapter(variant, base, tmp_path):
    """Its first step sees the loss that the run it comes from would have seen next; row slices are slices of it."""
    first = engine(base, **VARIANTS[variant])
    train(first)
    written(first, tmp_path / "checkpoint-2")
    second = engine(base, **VARIANTS[variant], lora_adapter_path=str(tmp_path / "checkpoint-2"), seed=7)
    assert any("going on from" in line for line in second.summary)
    ours, theirs = dict(second.backend.model.named_parameters()), first.backend.model.named_parameters()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs)
    assert train(second, 1) == pytest.approx(train(first, 1), rel=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_every_process_reads_its_rows(adapter, base, tmp_path):
    from engine.model.initial import InitialWeights

    training = engine(base, use_dora=True, lora_modules_to_save=WHOLE)
    train(training)
    written(training, tmp_path)
    source = AdapterFiles(tmp_path / "lora_adapters") if adapter else None
    weights = InitialWeights(WeightFiles(base), 0, adapter=source)
    for name, parameter in training.backend.model.named_parameters():
        whole = weights.read(name, parameter.shape)
        assert whole.shape == parameter.shape
        assert torch.equal(weights.read(name, parameter.shape, 1, 3), whole[1:3]), name
        if "magnitude" in name and not adapter:
            rows = load(base).get_submodule(name.split(".lora_")[0].removeprefix("base_model.model.")).weight
            torch.testing.assert_close(whole, rows.detach().norm(dim=1))


def test_dora_starts_as_the_base(base):
    torch.testing.assert_close(logits(engine(base, use_dora=True).backend.model), logits(load(base)))


def test_an_adapter_of_another_shape_is_refused_in_one_message(base, tmp_path):
    config = {
        "r": 8,
        "lora_alpha": 16,
        "use_dora": True,
        "modules_to_save": ["audio_lm_head"],
        "target_modules": ["q_proj"],
    }
    folder = save_adapter(tmp_path / "adapter", load(base), **config)
    with pytest.raises(ConfigError) as caught:
        engine(base, lora_adapter_path=str(folder))
    assert [line.partition("→ ")[2] for line in sorted(caught.value.problems)] == [
        "--lora_alpha 16", "--lora_modules_to_save audio_lm_head", "--lora_rank 8", "--lora_target_modules q_proj",
        "--use_dora true",
    ]  # fmt: skip
    settings = {"lora_rank": 8, "lora_alpha": 16.0, "use_dora": True, "lora_target_modules": ["q_proj"]}
    engine(base, **settings, lora_modules_to_save=["audio_lm_head"], lora_adapter_path=str(folder))
    folder = save_adapter(tmp_path / "pattern", load(base), target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    with pytest.raises(ConfigError, match="its rank_pattern is .*no setting"):
        engine(base, lora_alpha=8.0, lora_target_modules=["q_proj"], lora_adapter_path=str(folder))


def test_it_is_refused_before_anything_is_loaded(base, tmp_path):
    folder = save_adapter(tmp_path / "adapter", load(base), r=2, lora_alpha=32)
    flags = ["--model_path", str(base), "--audio_tokenizer_path", str(base), "--train_data_file", str(base)]
    for path, mistake in ((folder, "lora_rank: is 16, that of lora_adapter_path 2 → --lora_rank 2"),
                          (base, f"lora_adapter_path: {base} holds no adapter → give a folder with")):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            parse([*flags, "--use_lora", "--lora_adapter_path", str(path)])
        assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(mistake)
    parse([*flags, "--use_lora", "--lora_adapter_path", str(folder), "--lora_rank", "2"])
    with pytest.raises(ConfigError) as caught:
        parse([*flags, "--use_dora", "--use_rslora", "--lora_adapter_path", str(folder)])
    assert [line.partition(":")[0] for line in caught.value.problems] == ["use_rslora", "use_dora", "lora_adapter_path"]


def test_a_damaged_adapter_is_refused(base, tmp_path):
    folder = save_adapter(tmp_path / "adapter", load(base), target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    lost = next(name for name in stored if "layers.1" in name)
    save_file({name: tensor for name, tensor in stored.items() if name != lost}, file)
    with pytest.raises(ModelError, match="layers.1.self_attn.q_proj.lora_A.weight is missing"):
        engine(base, lora_alpha=8.0, lora_target_modules=["q_proj"], lora_adapter_path=str(folder))


def test_a_new_adapter_on_a_merged_model(base, tmp_path):
    """Its base is the merged folder; merged again, both adapters are in."""
    first = engine(base)
    train(first)
    written(first, tmp_path / "first")
    merge(base, tmp_path / "first", tmp_path / "merged")
    second = engine(tmp_path / "merged")
    torch.testing.assert_close(logits(second.backend.model), logits(first.backend.model), rtol=1e-4, atol=2e-6)
    train(second)
    written(second, tmp_path / "second")
    assert AdapterFiles(tmp_path / "second/lora_adapters").config.base_model_name_or_path == str(tmp_path / "merged")
    merge(None, tmp_path / "second", tmp_path / "again")
    both = logits(load(tmp_path / "again"))
    torch.testing.assert_close(both, logits(second.backend.model), rtol=1e-4, atol=2e-6)
    assert (both - logits(load(tmp_path / "merged"))).abs().max() > 1e-3
