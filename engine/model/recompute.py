"""Activation checkpointing: what of a layer is kept for its backward, and what is computed a second time.

| mode      | a layer keeps                                          | computed again                             |
|-----------|--------------------------------------------------------|--------------------------------------------|
| none      | all that autograd saves                                | nothing                                    |
| selective | its input, outputs of matrix products and of attention | norms, rotary positions, activations, order |
| full      | its input                                              | the layer: a third more compute a step     |

The second computation runs the same operations on the same numbers (dropout draws the same mask), so losses and
gradients are those of `none`, bit for bit.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")
"""From the fastest to the one that takes the least memory."""

CHEAP = 8
"""A product whose inner size is less than an eighth of its columns, as of LoRA's B, is repeated rather than kept."""


def call(mode: str, layer: Callable[..., torch.Tensor], *inputs) -> torch.Tensor:
    """`layer(*inputs)`, with what `mode` says kept for the backward.

    Sharding hooks belong outside: a layer that is called through here repeats its own operations only.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return layer(*inputs)
    if mode == "full":
        return checkpoint(layer, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_what_is_dear(_context, operation, *arguments, **_named) -> CheckpointPolicy:
    """Kernels of attention are told by name: each package registers its own."""
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        left, right = arguments[-2:]
        keep = CHEAP * left.shape[1] >= right.shape[1]
    else:
        name = operation.name()
        keep = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
