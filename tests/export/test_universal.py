"""From our checkpoints to plain DeepSpeed, and from DeepSpeed's to a model folder; no code of theirs is ever run."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from engine.backends.tensors import Reader
from engine.model.weights import WeightFiles
from tests.checkpoint.small_checkpoints import small_checkpoint, small_model
from tests.commands import command, done
from tests.processes import ROOT, run
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model/: the base; run/checkpoint-5: other weights, trained from it; universal/: that checkpoint converted."""
    folder = tmp_path_factory.mktemp("universal")
    model = small_model(folder / "model")
    weights = {name: p.detach().clone() for name, p in tiny_model(seed=7).named_parameters()}
    checkpoint = small_checkpoint(folder / "run", model, 5, weights)
    said = done("convert-checkpoint", checkpoint, to="universal", out=folder / "universal")
    assert "global_step5" in said and "load_universal" in said
    return folder


@pytest.fixture(scope="module")
def deepspeed(made):
    """zeroN.pt: what a DeepSpeed program on two processes holds after loading; zeroN/: what it then saves."""
    folder = made / "deepspeed"
    folder.mkdir()
    paths = [str(made / "model" / "model.safetensors"), str(made / "universal"), str(folder)]
    run([str(ROOT / "tests" / "export" / "universal_worker.py"), *paths], world_size=2)
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_holds_what_the_checkpoint_held(made, deepspeed, stage):
    held = torch.load(deepspeed / f"zero{stage}.pt", weights_only=True)
    stored = Reader(made / "run" / "checkpoint-5")
    keys = stored.metadata.state_dict_metadata.keys() - {"step", "guard"}
    assert len(keys) == 3 * 33
    for key in keys:
        assert torch.equal(held[key].view(-1), stored.tensor(key)), key
    assert len(held["steps"]) >= 1 and held["steps"].eq(5).all()
    rates = torch.tensor([[1e-3, 0.5], [2e-3, 0.0]])
    assert torch.equal(held["rates"], rates), "learning rate and weight decay of each group stay the program's"
    assert held["client"]["tokens_seen"] == 1234 and held["client"]["plan"] == {"seed": 1}


@pytest.mark.parametrize("source", ["zero2", "zero3", "universal"])
def test_the_weights_of_a_deepspeed_checkpoint_as_a_model(made, deepspeed, tmp_path, source):
    folder = made / source if source == "universal" else deepspeed / source
    said = done("convert-checkpoint", folder, to="model", base_model_path=made / "model", out=tmp_path / "model")
    assert "33 weights of" in said
    files, wanted = WeightFiles(tmp_path / "model"), Reader(made / "run" / "checkpoint-5")
    for name in files.shapes:
        assert torch.equal(files.read(name).view(-1), wanted.tensor(f"model.{name}")), name


def foreign(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A universal checkpoint with the names of some other program."""
    for name, value in weights.items():
        file = folder / "global_step1" / "zero" / name / "fp32.pt"
        file.parent.mkdir(parents=True)
        torch.save(value, file)  # bare, as ds_to_universal writes it at ZeRO 3
    (folder / "latest_universal").write_text("global_step1")
    return folder


def converted(source: Path, base: Path, out: Path):
    return command("convert-checkpoint", source, to="model", base_model_path=base, out=out)


def test_wrapped_names_and_weights_that_were_frozen(made, tmp_path):
    source = foreign(tmp_path / "ds", {"module.audio_lm_head.weight": torch.full((272, 48), 0.5)})
    said = converted(source, made / "model", tmp_path / "model")
    assert said.code == 0 and "1 weights of" in said.out and "32 of" in said.out
    files = WeightFiles(tmp_path / "model")
    assert files.read("audio_lm_head.weight").eq(0.5).all()
    base = WeightFiles(made / "model").read("text_lm_head.weight")
    assert torch.equal(files.read("text_lm_head.weight"), base), "what was frozen is the base model's"


def test_names_of_the_original_format(golden_model, tmp_path):
    name, native = "audio_decoder_proj.audio_lm_head.weight", "audio_lm_head.weight"
    base = WeightFiles(golden_model)
    source = foreign(tmp_path / "ds", {name: torch.full(base.shapes[native], 0.25)})
    assert converted(source, golden_model, tmp_path / "model").code == 0
    assert WeightFiles(tmp_path / "model").read(native).eq(0.25).all()


def test_weights_of_another_model_are_all_named(made, tmp_path):
    weights = {"invented.weight": torch.ones(2), "model.norm.weight": torch.ones(7)}
    said = converted(foreign(tmp_path / "ds", weights), made / "model", tmp_path / "model")
    assert said.code == 2 and "invented.weight is no weight of" in said.errors
    assert "model.norm.weight has shape (7,), (48,) in" in said.errors
    assert not (tmp_path / "model").exists()
    lora = {"base_model.model.audio_lm_head.lora_A.default.weight": torch.ones(2, 48)}
    said = converted(foreign(tmp_path / "lora", lora), made / "model", tmp_path / "model")
    assert said.code == 2 and "merge its adapters with PEFT first" in said.errors


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_code_of_a_universal_checkpoint_is_run(made, tmp_path):
    source = foreign(tmp_path / "ds", {"model.norm.weight": torch.ones(48)})
    torch.save({"param": torch.ones(48), "more": Code(tmp_path / "ran")}, next(source.rglob("fp32.pt")))
    said = converted(source, made / "model", tmp_path / "model")
    assert said.code == 2 and "fp32.pt: holds more than tensors" in said.errors and "(posix.system)" in said.errors
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_no_code_of_shards_is_run(made, deepspeed, tmp_path, name):
    source = Path(shutil.copytree(deepspeed / "zero2", tmp_path / "ds"))
    file = source / "global_step5" / name
    torch.save(torch.load(file, weights_only=False) | {"more": Code(tmp_path / "ran")}, file)
    said = converted(source, made / "model", tmp_path / "model")
    assert said.code == 2 and "holds more than tensors" in said.errors
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_no_smaller_model(made, deepspeed, tmp_path):
    source = Path(shutil.copytree(deepspeed / "zero2", tmp_path / "ds"))
    (source / "global_step5" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    said = converted(source, made / "model", tmp_path / "model")
    assert said.code == 2 and "Expected 2 of '*_optim_states.pt'" in said.errors


def test_what_is_not_trained_has_no_moments(made, tmp_path):
    """A run that trains a part of the model: its frozen weights are bf16 and go out as fp32."""
    from engine.backends.tensors import Fragment
    from tests.checkpoint import small_checkpoints

    weights = {"audio_lm_head.weight": torch.ones(4, 4), "text_lm_head.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    state = small_checkpoints.state_of(weights, 3)
    state = {key: value for key, value in state.items() if not key.startswith("exp") or "audio" in key}
    assert isinstance(state["step"], Fragment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_checkpoints, "state_of", lambda *_: state)
        checkpoint = small_checkpoint(tmp_path / "run", made / "model", 3, weights)
    done("convert-checkpoint", checkpoint, to="universal", out=tmp_path / "universal")
    zero = tmp_path / "universal" / "global_step3" / "zero"
    files = {str(p.relative_to(zero)) for p in zero.rglob("*.pt")}
    assert files == {"optimizer_state.pt", "text_lm_head.weight/fp32.pt"} | {
        f"audio_lm_head.weight/{name}.pt" for name in ("fp32", "exp_avg", "exp_avg_sq", "step")
    }
    frozen = torch.load(zero / "text_lm_head.weight" / "fp32.pt", weights_only=True)["param"]
    assert frozen.dtype == torch.float32 and frozen.shape == (4, 4) and frozen.eq(1).all()


def test_what_cannot_be_converted_is_said(made, tmp_path):
    checkpoint = made / "run" / "checkpoint-5"
    said = converted(checkpoint, made / "model", tmp_path / "model")
    assert said.code == 2 and "of this engine, not of DeepSpeed → higgs-engine consolidate" in said.errors
    said = converted(tmp_path, made / "model", tmp_path / "model")
    assert said.code == 2 and "no DeepSpeed checkpoint of ZeRO there" in said.errors
    said = command("convert-checkpoint", made / "universal", to="model", out=tmp_path / "model")
    assert said.code == 2 and "--to model needs --base_model_path" in said.errors
    said = command("convert-checkpoint", checkpoint, to="universal", out=made / "universal")
    assert said.code == 2 and "exists and is not empty" in said.errors


def test_a_checkpoint_that_names_a_folder_elsewhere_is_refused(made, tmp_path):
    """Parameter names and tags become paths, and the files that hold them may be anybody's."""
    weights = {"../../../outside": torch.ones(2)}
    checkpoint = small_checkpoint(tmp_path / "run", made / "model", 3, weights)
    said = command("convert-checkpoint", checkpoint, to="universal", out=tmp_path / "out" / "universal")
    assert said.code == 2 and "names are no names of folders" in said.errors and not (tmp_path / "outside").exists()
    source = foreign(tmp_path / "ds", {"model.norm.weight": torch.ones(48)})
    (source / "latest_universal").write_text("../ds/global_step1")
    assert "no DeepSpeed checkpoint" in converted(source, made / "model", tmp_path / "model").errors


def test_help_says_that_our_own_backends_need_none_of_it():
    said = command("convert-checkpoint", "--help")
    assert said.code == 0 and "Between our own backends nothing has to be converted" in said.out
