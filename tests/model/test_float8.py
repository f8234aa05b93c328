"""float8 products, emulated: which layers have them, what they round, no rows at all, and who cannot have them."""

import numpy as np
import pytest
import torch

from engine.config import Settings
from engine.data.packing import pack
from engine.errors import ConfigError
from engine.model import float8
from engine.model.packed import install
from engine.model.trainable import choose_trainable
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model

CPU = torch.device("cpu")
MIXES = {"mixed": [(20, 30), (7, 12)], "all text": [(9, 0), (14, 0)], "all audio": [(0, 12), (0, 21)]}


@pytest.fixture(autouse=True)
def torchao():
    pytest.importorskip("torchao", reason="float8 needs torchao")


def model_in_float8(checkpointing="none", **settings):
    core = tiny_model()
    model = choose_trainable(core, Settings(model_path="model", **settings))
    install(core, "sdpa", checkpointing)
    float8.install(core, emulate=True)
    return model


def loss_and_gradients(model, mix="mixed"):
    rng = np.random.default_rng(3)
    batch = pack([random_sample(rng, *sizes) for sizes in MIXES[mix]], AUDIO)
    loss, _ = model(batch, torch.ones(1), torch.ones(CODEBOOKS))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in eight bits, its largest value that of the format."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


def test_a_layer_computes_the_rounded_product_and_its_gradients():
    linear = model_in_float8().model.layers[0].audio_mlp.up_proj
    torch.manual_seed(0)
    x, sensitivity = torch.randn(13, 48, requires_grad=True), torch.randn(13, 64)
    out = linear(x)
    out.backward(sensitivity)
    x8, w8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(linear.weight.detach(), torch.float8_e4m3fn)
    g8 = rounded(sensitivity, torch.float8_e5m2)
    for got, wanted in ((out, x8 @ w8.t()), (x.grad, g8 @ w8), (linear.weight.grad, g8.t() @ x8)):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out.detach(), x @ linear.weight.t(), rtol=1e-3), "nothing was rounded"


@pytest.mark.parametrize("mix", MIXES)
def test_the_model_follows_the_exact_one(mix):
    """Also where a modality has no rows: its gradients are zeros, neither NaN nor None."""
    exact = loss_and_gradients(install(tiny_model(), "sdpa"), mix)
    got = loss_and_gradients(model_in_float8(), mix)
    assert list(got) == list(exact), "names of parameters are those of checkpoints"
    torch.testing.assert_close(got["loss"], exact["loss"], rtol=0.01, atol=0)
    for name, wanted in exact.items():
        error = (got[name] - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert error < 0.15 if wanted.any() else not got[name].any(), name


def test_activation_checkpointing_changes_no_bit():
    wanted = loss_and_gradients(model_in_float8())
    for mode in ("selective", "full"):
        got = loss_and_gradients(model_in_float8(mode))
        assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == [], mode


def test_heads_and_what_is_not_trained_stay_as_they_are():
    from torchao.float8.float8_linear import Float8Linear

    def in_float8(**settings):
        return {n for n, m in model_in_float8(**settings).named_modules() if isinstance(m, Float8Linear)}

    everything = in_float8()
    assert len(everything) == 2 * 10, "q, k, v, o and the three products of both FFNs, in two layers"
    assert all(name.startswith("model.layers.") for name in everything)
    some = in_float8(train_modules=["*.audio_mlp.*"])
    assert some == {name for name in everything if ".audio_mlp." in name}


def test_a_machine_without_float8_is_told_so():
    (problem,) = float8.problems(Settings(float8=True), CPU)
    assert problem.startswith("float8: needs a GPU ") and problem.endswith(" → set float8 to false")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"backend": "deepspeed"}, "float8: backend deepspeed .* → set backend to fsdp"),
        ({"backend": "none"}, "float8: backend none .* → set backend to fsdp"),
        ({"bf16": False}, "float8: starts from bf16 → set bf16 to true"),
        ({"use_lora": True}, "float8: .* no gain with LoRA → set float8 to false"),
    ],
)
def test_settings_that_float8_cannot_keep(changes, words):
    settings = Settings(**{"model_path": "model", "backend": "fsdp", "float8": True} | changes)
    with pytest.raises(ConfigError, match=words):
        settings.check(excused=("model_path", "audio_tokenizer_path", "train_data_file"))
