"""What is trained is what was asked for, and asking for nothing that exists is an error."""

import pytest
import torch

from engine.config import Settings
from engine.errors import ConfigError
from engine.model.initial import build_on_meta, rebuild_buffers
from engine.model.trainable import choose_trainable, decayed, describe
from tests.tiny import tiny_model


def chosen(**settings):
    model = build_on_meta(tiny_model().config)
    return choose_trainable(model, Settings(model_path="base", **settings))


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_mode_trains_everything():
    model = chosen()
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert len(trained(model)) == 33


def test_freeze_llm_leaves_audio_embeddings_and_heads():
    assert trained(chosen(freeze_llm=True)) == {
        "model.embed_audio_tokens.embed_audio_tokens.weight", "audio_lm_head.weight", "text_lm_head.weight",
    }  # fmt: skip


@pytest.mark.parametrize("pattern", ["audio_mlp", "*audio_mlp*"])
def test_train_modules_by_name_or_glob(pattern):
    names = trained(chosen(train_modules=[pattern]))
    assert names == {f"model.layers.{i}.audio_mlp.{p}_proj.weight" for i in (0, 1) for p in ("gate", "up", "down")}


def test_asking_to_freeze_a_projection_that_is_not_there_is_answered():
    settings = Settings(freeze_audio_encoder_proj=True)
    assert any("no such module" in line for line in describe(chosen(freeze_audio_encoder_proj=True), settings))
    assert not any("no such module" in line for line in describe(chosen(), Settings()))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_modules": ["audio_mlp", "no_such"]}, "'no_such' matches no parameter"),
        ({"train_modules": ["embed_tokens"], "freeze_llm": True}, "nothing is left to train"),
        ({"use_lora": True, "lora_target_modules": ["q_proj", "w_proj"]}, "'w_proj' matches no linear layer"),
        ({"use_lora": True, "lora_target_modules": ["audio_lm_head"]}, "put it into lora_modules_to_save"),
        ({"use_lora": True, "lora_modules_to_save": ["lm_head"]}, "'lm_head' matches no module"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        chosen(**settings)


def test_an_embedding_saved_whole_is_one_copy_that_runs_and_is_trained():
    """Of two modules with the same name, one in the other, PEFT would copy both and train the copy that never runs."""
    model = chosen(use_lora=True, lora_modules_to_save=["embed_audio_tokens"])
    whole = {name for name in trained(model) if ".lora_" not in name}
    assert whole == {"base_model.model.model.embed_audio_tokens.embed_audio_tokens.modules_to_save.default.weight"}
    assert all("original_module" in n for n in dict(model.named_parameters()) if "embed_audio" in n and n not in whole)
    rebuild_buffers(model.get_base_model(), torch.device("cpu"))
    assert not model.get_base_model().model.embed_audio_tokens.audio_tokens_offsets.is_meta


def test_lora_adapts_attention_and_both_ffns_by_default():
    names = {name.removeprefix("base_model.model.model.") for name in trained(chosen(use_lora=True))}
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    modules += [f"{ffn}.{p}_proj" for ffn in ("mlp", "audio_mlp") for p in ("gate", "up", "down")]
    assert names == {f"layers.{i}.{m}.lora_{ab}.default.weight" for i in (0, 1) for m in modules for ab in "AB"}


def test_lora_on_one_ffn_only():
    names = trained(chosen(use_lora=True, lora_target_modules=["audio_mlp.up_proj"]))
    assert len(names) == 4 and all("audio_mlp.up_proj.lora_" in name for name in names)


def test_lora_counts_are_printed():
    settings = Settings(use_lora=True, lora_rank=4, lora_target_modules=["q_proj"])
    model = chosen(use_lora=True, lora_rank=4, lora_target_modules=["q_proj"])
    lines = describe(model, settings)
    assert lines[0].startswith(f"LoRA: {2 * (48 * 4 + 4 * 48):,} of ")
    assert any("self_attn.q_proj.lora_A" in line and "384" in line for line in lines)


def test_norms_do_not_decay():
    names = decayed(chosen())
    assert not any("norm" in name for name in names)
    assert "model.layers.0.audio_mlp.up_proj.weight" in names and "model.embed_tokens.weight" in names
