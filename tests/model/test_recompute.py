"""What is computed twice has the same numbers, and what is dear is not computed twice."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Settings
from engine.data.packing import pack
from engine.model.packed import install
from engine.model.recompute import MODES
from engine.model.trainable import choose_trainable
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model


class Calls(TorchDispatchMode):
    """How often each kind of operation runs."""

    def __init__(self):
        super().__init__()
        self.products = self.attention = self.activations = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        name = operation.name()
        self.products += name == "aten::mm"
        self.attention += name.startswith("aten::_scaled_dot_product") and "backward" not in name
        self.activations += name == "aten::silu"
        return operation(*arguments, **(named or {}))


def run(mode: str, lora: bool, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], Calls]:
    """Loss and all gradients, and the operations of forward and backward; LoRA with dropout."""
    core = tiny_model()
    settings = Settings(model_path="model", use_lora=lora, lora_rank=4, lora_dropout=0.3)
    model = choose_trainable(core, settings)
    install(core, "sdpa", mode)
    torch.manual_seed(1)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # an adapter, which the engine fills later
                setattr(module, name, nn.Parameter(torch.randn(parameter.shape) / 10))
    model.to(dtype)
    rng = np.random.default_rng(3)
    batch = pack([random_sample(rng, 20, 30), random_sample(rng, 7, 12)], AUDIO)
    torch.manual_seed(2)
    with Calls() as calls:
        loss, _ = model(batch, torch.ones(1), torch.ones(CODEBOOKS))
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found | {"loss": loss.detach()}, calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_mode_gives_the_same_bits(lora, dtype):
    wanted, once = run("none", lora, dtype)
    layers = 2
    for mode in MODES[1:]:
        got, calls = run(mode, lora, dtype)
        assert got.keys() == wanted.keys()
        different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
        assert different == []
        assert calls.activations == 2 * once.activations, "the layer is computed again"
        again = calls.attention - once.attention
        assert again == (0 if mode == "selective" else 2 * layers), f"{mode}: attention of two samples a layer"
        if mode == "selective" and not lora:
            assert calls.products == once.products, "no product is computed twice"


def test_products_with_a_small_inner_size_are_repeated():
    """B of LoRA, rank 4: its output is as large as the layer's, and costs next to nothing."""
    (_, once), (_, calls), (_, full) = (run(mode, True, torch.float32) for mode in MODES)
    # of 20 adapters in two layers, all but the last product of each branch are needed again
    assert 0 < calls.products - once.products <= 20
    assert full.products - once.products > 2 * (calls.products - once.products)
