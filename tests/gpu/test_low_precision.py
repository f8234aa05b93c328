"""What only a GPU can show: float8 kernels against their emulation, compiled updates of compact moments, no waiting."""

import pytest
import torch
from torch import nn

from engine.backends.moments import CompactAdamW
from engine.model import float8
from engine.model.packed import install
from tests.gpu.test_gpu import small_model

GPU = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def has_float8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= float8.LEAST_CAPABILITY


@pytest.mark.skipif(not has_float8(), reason="needs a GPU that multiplies float8")
@pytest.mark.parametrize("rows", [0, 1, 37, 512])
def test_kernels_multiply_what_the_emulation_does(rows):
    pytest.importorskip("torchao", reason="float8 needs torchao")
    found = []
    for emulate in (False, True):
        model = install(small_model("cuda", torch.bfloat16), "sdpa")
        float8.install(model, emulate)
        linear = model.model.layers[0].mlp.up_proj
        torch.manual_seed(1)
        x = torch.randn(rows, 384, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        out = linear(x)
        out.backward(torch.randn(out.shape, device=GPU, dtype=torch.bfloat16))
        found.append((out.detach(), x.grad, linear.weight.grad))
    for got, wanted in zip(*found, strict=True):
        # sums of the same factors, added up in another order and rounded to bf16
        assert (got - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_compiled_updates_are_those_of_a_cpu(dtype):
    """The draws differ from device to device, so weights agree as two draws do; the host never waits."""
    torch.manual_seed(0)
    start, gradients = torch.randn(3000), [torch.randn(3000) for _ in range(5)]
    ends = []
    for device in ("cpu", "cuda"):
        weight = nn.Parameter(start.to(device, copy=True))
        optimizer = CompactAdamW([{"params": [weight]}], dtype, 1e-2, (0.9, 0.95), 1e-8)
        for step, gradient in enumerate(gradients):
            weight.grad = gradient.to(device)
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" and step else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        ends.append(weight.detach().cpu())
    assert (ends[0] - ends[1]).norm() < (0.01 if dtype == "bf16" else 0.1) * (ends[0] - start).norm()
