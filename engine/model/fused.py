"""`use_liger_kernel`: norms, rotary positions and SwiGLU by Liger's kernels, each one pass over memory instead of many.

Liger knows models by name, and not this one, so `install` says what is what: four norms a layer and both FFNs. The
loss has its own way (loss.py): Liger's cannot take a batch without targets and asks the GPU for their number.

Liger's rotary kernel writes into its inputs. They are the ones that have just been put into sequence order, never the
outputs of the projections, which selective checkpointing keeps for a second look.
"""

import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2MLP, HiggsAudioV2RMSNorm

from engine.config import Settings


def problems(settings: Settings, device: torch.device) -> Iterator[str]:
    """Why Liger's kernels cannot run here."""
    if not settings.use_liger_kernel:
        return
    if device.type != "cuda":
        yield "use_liger_kernel: needs a GPU → leave it out"
    if importlib.util.find_spec("liger_kernel") is None:
        yield "use_liger_kernel: needs Liger → pip install 'higgs-engine[kernels]', or leave it out"


def install(model: nn.Module) -> None:
    """Replaces norms, activations and rotary positions of a model with the packed forward, in place."""
    for module in model.modules():
        if isinstance(module, HiggsAudioV2RMSNorm):
            module.__class__ = FusedRMSNorm
        elif isinstance(module, HiggsAudioV2MLP):
            module.__class__ = FusedMLP
    for layer in model.model.layers:
        layer.self_attn.rotate = rotate


class FusedRMSNorm(HiggsAudioV2RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # as Llama's: scaled in fp32, weighted in the input's dtype; gradients are not written over what came in
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class FusedMLP(HiggsAudioV2MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [T, heads, d] turned by their positions' angles [T, d]; both are written over."""
    from liger_kernel.ops.rope import LigerRopeFunction

    qs, ks = (t.unsqueeze(0).transpose(1, 2) for t in (q, k))
    turned = LigerRopeFunction.apply(qs, ks, cos.unsqueeze(0), sin.unsqueeze(0))
    return tuple(t.transpose(1, 2).squeeze(0) for t in turned)
