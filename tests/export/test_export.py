"""Models from one format to the other and back: the same bits, the same logits, the same configuration."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from engine.errors import ConfigError, ModelError
from engine.export.export import export
from engine.export.model_folder import drafted
from engine.export.original_format import KEPT_CONFIG
from engine.model.initial import build_on_meta
from engine.model.keys import native_name, original_name
from engine.model.streamed import ProbeBatch, probe_batch, streamed_logits
from engine.model.weights import WeightFiles, convert_config
from engine.model.whisper_source import FOLDER, of_folder, resolve
from tests.checkpoint.anywhere_worker import FIRST
from tests.commands import command, done
from tests.conftest import GOLDEN
from tests.model.whisper_tiny import save_whisper
from tests.processes import run


@pytest.fixture(scope="module")
def chain(golden_model, tmp_path_factory):
    """name -> folder: the golden model as native, from there as boson, from there as native again; what was said."""
    folder = tmp_path_factory.mktemp("chain")
    said = [done("export", golden_model, out=folder / "native", format="native"),
            done("export", folder / "native", out=folder / "boson", format="boson", max_shard_size="1MB"),
            done("export", folder / "boson", out=folder / "again", format="native")]  # fmt: skip
    assert all("verified: 33 tensors, logits of 25 text and 21 audio positions equal" in line for line in said)
    return {name: folder / name for name in ("native", "boson", "again")}


def tensors(folder):
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def test_the_original_comes_back_under_its_own_names_bit_for_bit(chain, golden_model):
    was, is_ = tensors(golden_model), tensors(chain["boson"])
    assert was.keys() == is_.keys()
    assert all(torch.equal(is_[name], was[name]) and is_[name].dtype == was[name].dtype for name in was)
    assert (
        len(list(chain["boson"].glob("model-*.safetensors"))) > 2
        and (chain["boson"] / "model.safetensors.index.json").is_file()
    )


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_the_original_comes_back_with_its_own_configurations(file, chain, golden_model):
    assert json.loads((chain["boson"] / file).read_text()) == json.loads((golden_model / file).read_text())
    assert not (chain["boson"] / KEPT_CONFIG).exists()


@pytest.fixture(scope="module")
def saved(golden_model, tmp_path_factory):
    """name -> folder: the golden model saved by two processes, from there as boson, from there as native."""
    folder = tmp_path_factory.mktemp("saved")
    run(["-m", "tests.checkpoint.anywhere_worker", str(golden_model), str(folder), "fsdp!", "zero3!"], world_size=2)
    for backend in ("fsdp", "zero3"):
        checkpoint, boson = folder / f"{backend}!@2" / f"checkpoint-{FIRST}", folder / f"{backend}-boson"
        done("export", checkpoint, out=boson, format="boson", dtype="float32")
        done("export", boson, out=folder / f"{backend}-native", format="native")
    return {name: folder / name for name in SAVED}


SAVED = ["fsdp-boson", "fsdp-native", "zero3-boson", "zero3-native"]


@pytest.mark.parametrize("name", ["native", "boson", "again", *SAVED])
def test_the_golden_logits_hold_after_every_step(name, chain, saved):
    data = np.load(GOLDEN / "logits" / "b0_single.npz")
    files = WeightFiles((chain | saved)[name])
    out = torch.from_numpy(data["audio_out_mask"][0].astype(bool))
    is_audio = torch.from_numpy(data["audio_in_mask"][0].astype(bool)) | out
    real = torch.from_numpy(data["attention_mask"][0].astype(bool))
    ids = torch.from_numpy(data["input_ids"][0]).long().masked_fill(is_audio, files.config.audio_token_id)
    codes = torch.from_numpy(data["stream_ids"][0]).long()
    batch = ProbeBatch(ids[real], codes[is_audio & real])
    text, audio = streamed_logits(build_on_meta(files.config), files.read, batch)
    wanted = torch.from_numpy(data["text_logits"][0])[real & ~is_audio]
    torch.testing.assert_close(text, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(audio[out[is_audio]], torch.from_numpy(data["audio_logits"]), rtol=0, atol=2e-5)


def test_transformers_loads_what_came_back(chain):
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        chain["again"], use_text_head=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.codebook_size == 1026
    assert tensors(chain["again"]).keys() == tensors(chain["native"]).keys() == set(model.state_dict())


def test_a_native_base_gets_the_released_configuration(demo, tmp_path):
    """What the original's code reads, in words that older transformers knows; the other way gives the same model."""
    export(demo.model_path, tmp_path / "boson", "boson", say=lambda line: None)
    config = json.loads((tmp_path / "boson" / "config.json").read_text())
    released = json.loads((GOLDEN / "tiny_boson" / "config.json").read_text())
    assert config.keys() == released.keys(), "a field that the original's code reads, or that it does not know"
    text = config["text_config"]
    assert text["rope_scaling"] == released["text_config"]["rope_scaling"] and text["max_position_embeddings"] == 131072
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "boson")
    for name, token in (("audio_in_token_idx", "<|AUDIO|>"), ("audio_out_token_idx", "<|AUDIO_OUT|>"),
                        ("audio_eos_token_id", "<|audio_eos|>"), ("audio_out_bos_token_id", "<|audio_out_bos|>"),
                        ("pad_token_id", "<|end_of_text|>")):  # fmt: skip
        assert config[name] == tokenizer.convert_tokens_to_ids(token), name
    said = json.loads((tmp_path / "boson" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    export(tmp_path / "boson", tmp_path / "native", "native", say=lambda line: None)
    was, is_ = (HiggsAudioV2Config.from_pretrained(folder) for folder in (demo.model_path, tmp_path / "native"))
    meant_alike = ("rope_parameters", "max_position_embeddings")
    differing = {key for key, value in was.to_dict().items() if is_.to_dict()[key] != value}
    assert differing <= set(meant_alike)
    for side_file in ("chat_template.jinja", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "native" / side_file).read_bytes() == (demo.model_path / side_file).read_bytes()


def test_other_rotary_frequencies_are_carried_over(demo, tmp_path):
    base = shutil.copytree(demo.model_path, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(config))
    export(base, tmp_path / "boson", "boson", say=lambda line: None)
    text = json.loads((tmp_path / "boson" / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"], text["max_position_embeddings"]) == (10000.0, None, 2048)


def test_dtype(golden_model, tmp_path):
    """As stored unless asked; the configuration says which."""
    for asked, dtype in ((None, "float32"), ("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        export(golden_model, tmp_path / str(asked), "boson", asked, say=lambda line: None)
        assert {t.dtype for t in tensors(tmp_path / str(asked)).values()} == {getattr(torch, dtype)}
        assert json.loads((tmp_path / str(asked) / "config.json").read_text())["torch_dtype"] == dtype
    export(tmp_path / "bfloat16", tmp_path / "kept", "native", say=lambda line: None)
    assert {t.dtype for t in tensors(tmp_path / "kept").values()} == {torch.bfloat16}


def conditioned(base, folder, n_mels=128):
    """A native folder with a Whisper conditioning, made by a boson folder's way back."""
    source = of_folder(save_whisper(folder / "whisper", n_mels=n_mels), 128)
    model = shutil.copytree(base, folder / "model")
    source.describe(model / FOLDER)
    from safetensors.torch import save_file

    kept = {name.removeprefix("whisper."): source.read(name) for name in source.shapes}
    kept |= {"projection.weight": torch.randn(128, 32), "projection.bias": torch.randn(128)}
    save_file(kept, model / FOLDER / "model.safetensors")
    return model


def test_a_whisper_conditioning_becomes_the_audio_tower_and_comes_back(demo, tmp_path):
    base = conditioned(demo.model_path, tmp_path)
    export(base, tmp_path / "boson", "boson", say=lambda line: None)
    config, held = json.loads((tmp_path / "boson" / "config.json").read_text()), tensors(tmp_path / "boson")
    assert config["encode_whisper_embed"] is True and config["skip_audio_tower"] is False
    assert (config["audio_encoder_config"]["d_model"], config["audio_encoder_config"]["num_mel_bins"]) == (32, 128)
    kept = load_file(base / FOLDER / "model.safetensors")
    assert torch.equal(held["audio_tower.conv1.weight"], kept["encoder.conv1.weight"])
    assert torch.equal(held["audio_encoder_proj.linear.bias"], kept["projection.bias"])
    assert not (tmp_path / "boson" / FOLDER).exists()
    source, _ = resolve("auto", WeightFiles(tmp_path / "boson"))
    assert source.has_projection
    export(tmp_path / "boson", tmp_path / "native", "native", say=lambda line: None)
    back = load_file(tmp_path / "native" / FOLDER / "model.safetensors")
    assert back.keys() == kept.keys() and all(torch.equal(back[name], kept[name]) for name in kept)
    assert not any("whisper" in name or "audio_tower" in name for name in tensors(tmp_path / "native"))


def test_a_conditioning_that_the_originals_code_cannot_run_is_refused(demo, tmp_path):
    base = conditioned(demo.model_path, tmp_path, n_mels=80)
    said = command("export", base, out=tmp_path / "boson", format="boson")
    assert said.code == 2 and "num_mel_bins is 80, the original's code computes with 128" in said.errors
    assert "--format native" in said.errors
    assert not list(tmp_path.glob("*boson*")) and not list(tmp_path.glob(".*boson*"))


@pytest.mark.parametrize("out", [".", "../here"])
def test_the_current_folder_is_refused(out, demo, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="is the current folder, which cannot be replaced → give the name"):
        export(demo.model_path, Path(out), "native")


def test_a_folder_may_be_named_by_a_way_around(tmp_path):
    with drafted(tmp_path / "not there" / ".." / "out") as draft:
        (draft / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_what_is_no_whole_model_is_refused(demo, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter is no model by itself → `higgs-engine merge`"):
        export(adapter, tmp_path / "out", "boson")
    with pytest.raises(ModelError, match="no config.json"):
        export(tmp_path, tmp_path / "out", "boson")
    with pytest.raises(ConfigError, match="not empty"):
        export(demo.model_path, adapter, "boson")
    with pytest.raises(ConfigError, match="max_shard_size: '5 apples' is no size → write it as 5GB"):
        export(demo.model_path, tmp_path / "out", "boson", max_shard_size="5 apples")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_every_name_has_its_original(golden_model):
    for name in load_file(golden_model / "model.safetensors"):
        assert original_name(native_name(name)) == name
    config = convert_config(json.loads((golden_model / "config.json").read_text()), golden_model)
    names = [name for name, _ in build_on_meta(config).named_parameters()]
    assert [native_name(original_name(name)) for name in names] == names
    assert len({original_name(name) for name in names}) == len(names)


@given(st.sampled_from(["whisper.encoder.", "whisper.projection.", "model.layers.3.", "audio_lm_head.", "model.norm."]),
       st.from_regex(r"[a-z0-9_.]{1,20}", fullmatch=True))  # fmt: skip
def test_names_go_there_and_back(part, rest):
    assert native_name(original_name(part + rest)) == part + rest


def test_the_probe_reaches_every_weight(demo):
    """Were one tensor another, the compared logits would be other ones: only so do equal logits mean anything.

    Rows of the embeddings that the probe does not use are compared by their bits alone.
    """
    files = WeightFiles(demo.model_path)
    model, batch = build_on_meta(files.config), probe_batch(files.config)
    right = streamed_logits(model, files.read, batch)
    for changed in ("model.layers.2.audio_mlp.up_proj.weight", "model.layers.0.input_layernorm.weight",
                    "model.layers.3.audio_input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight",
                    "text_lm_head.weight", "audio_lm_head.weight", "model.embed_audio_tokens.embed_audio_tokens.weight",
                    "model.embed_tokens.weight", "model.norm.weight"):  # fmt: skip

        def read(name, changed=changed):
            return files.read(name) * (1.5 if name == changed else 1)

        wrong = streamed_logits(model, read, batch)
        assert not all(torch.equal(*pair) for pair in zip(right, wrong, strict=True)), changed
