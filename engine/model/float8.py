"""`float8`: the matrix products of attention and FFNs in 8 bits, through torchao's training layers.

Each factor of a product, in forward and backward, is scaled by one number (the largest of the tensor becomes the
largest of the format) and rounded: weights and activations to e4m3, gradients to e5m2. Sums, what the backward keeps,
what is gathered, reduced and stored: all is as in bf16, names of parameters and checkpoints too.

Left as they are: both heads, whose losses are the most delicate and whose products the loss does itself; embeddings;
layers that are not trained, whose weight gradient torchao would compute all the same (so there is no float8 with LoRA);
a Whisper encoder.
"""

import importlib.util
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from engine.config import Settings
from engine.model.packed import PackedHiggsAudio

LEAST_CAPABILITY = (8, 9)
"""Ada's and Hopper's: the first GPUs that multiply float8."""


def install(core: PackedHiggsAudio, emulate: bool = False) -> None:
    """Turns the trained linear layers of the decoder into float8 ones, in place. Before sharding.

    Args:
        emulate: the same rounding by fp32 products, slow and anywhere; to look at what float8 does to a model.

    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    # kernels want inner sizes in multiples of 16; a weight's gradient has the number of tokens there, any number
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    layers = core.model.layers
    convert_to_float8_training(layers, config=config, module_filter_fn=lambda linear, _: linear.weight.requires_grad)
    for linear in [module for module in layers.modules() if isinstance(module, Float8Linear)]:
        linear.__class__ = _rows_or_none()


def problems(settings: Settings, device: torch.device) -> Iterator[str]:
    """Why this machine cannot."""
    if not settings.float8:
        return
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    needs = {
        "a GPU that multiplies float8 (H100, H200, L40S or newer)": gpu,
        "torchao (pip install 'higgs-engine[lowbit]')": importlib.util.find_spec("torchao") is not None,
    }
    yield from (f"float8: needs {what} → set float8 to false" for what, there in needs.items() if not there)


@cache
def _rows_or_none() -> type[nn.Linear]:
    """torchao's layer that also takes no rows, which have no largest value: a micro-batch without text, or audio."""
    from torchao.float8.float8_linear import Float8Linear

    class Float8Layer(Float8Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.shape[0] else nn.functional.linear(x, self.weight, self.bias)

    return Float8Layer
