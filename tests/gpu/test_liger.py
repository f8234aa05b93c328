"""Liger's fused norm and SwiGLU on what a packed row may hold: also no row of a modality.

A kernel that fails on zero rows could not be used for either FFN. The model with them is in test_gpu.py.
"""

import pytest
import torch

liger = pytest.importorskip("liger_kernel.transformers")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HIDDEN = 512


def with_gradients(function, rows: int, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a function of [rows, HIDDEN] bf16 input."""
    torch.manual_seed(0)
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = function(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *parameters])]


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_rms_norm(rows):
    from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2RMSNorm

    plain = HiggsAudioV2RMSNorm(HIDDEN, eps=1e-5).to("cuda", torch.bfloat16)
    fused = liger.LigerRMSNorm(HIDDEN, eps=1e-5).to("cuda", torch.bfloat16)
    wanted, got = with_gradients(plain, rows, plain.weight), with_gradients(fused, rows, fused.weight)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_swiglu(rows):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def plain(x):
        return torch.nn.functional.silu(x) * x

    wanted, got = with_gradients(plain, rows), with_gradients(lambda x: LigerSiLUMulFunction.apply(x, x), rows)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
