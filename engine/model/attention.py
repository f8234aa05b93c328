"""Causal attention within each sample of a packed row, by whichever kernel the machine has.

| name   | kernel                                             | where            |
|--------|----------------------------------------------------|------------------|
| flash  | flash-attn's variable-length kernel                | GPU, `[flash]`   |
| varlen | torch.nn.attention.varlen (the same kernels)       | GPU              |
| flex   | flex_attention with a block mask, compiled         | GPU              |
| sdpa   | scaled_dot_product_attention, one call per sample  | CPU and GPU      |

The kernels of flash and varlen are made for bf16, and for GPUs of Ampere's kind or newer.

All take and give [T, heads, head_dim] in sequence order and never build a T x T mask. SDPA per sample costs what
its samples cost (the sum of their squared lengths) and needs no kernel that the CPU lacks.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from engine.errors import ConfigError

BLOCK = 128
"""Positions of a block of flex_attention."""

FLASH_CAPABILITY = (8, 0)
"""Ampere's: the first GPUs that flash attention's kernels are made for."""


@dataclass(frozen=True)
class SampleBounds:
    """Where the samples of a packed row begin and end.

    Attributes:
        lengths: tokens of each sample (host).
        ends: int32 [samples + 1] cumulated lengths on the device.
        longest: the longest sample (host).
    """

    lengths: tuple[int, ...]
    ends: torch.Tensor
    longest: int

    @cached_property
    def block_mask(self):
        """Block mask of flex_attention, made once for all layers.

        From the bounds: `create_block_mask` would ask of each pair of positions, 1 GiB of answers for 32k of them.
        """
        from torch.nn.attention.flex_attention import BlockMask

        tokens, device = sum(self.lengths), self.ends.device
        sample = torch.bucketize(torch.arange(tokens, device=device, dtype=torch.int32), self.ends, right=True)

        def same_sample_and_before(_batch, _head, query, key):
            return (sample[query] == sample[key]) & (query >= key)

        partly, wholly = (_listed(blocks, device) for blocks in _blocks_seen(self.lengths))
        options = {"BLOCK_SIZE": BLOCK, "mask_mod": same_sample_and_before, "seq_lengths": (tokens, tokens)}
        return BlockMask.from_kv_blocks(*partly, *wholly, **options)


def _blocks_seen(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of keys each block of queries sees in part, and which as a whole; bool [blocks, blocks], on host."""
    sizes = torch.tensor(lengths)
    begins = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)  # of the sample of each position
    number = torch.arange(-(-len(begins) // BLOCK))
    last_query = ((number + 1) * BLOCK - 1).clamp(max=len(begins) - 1)
    seen = (number >= begins[::BLOCK, None] // BLOCK) & (number <= number[:, None])
    whole = (number * BLOCK >= begins[last_query, None]) & (number < number[:, None])
    whole[len(begins) // BLOCK :] = False  # queries that end within a block see none as a whole
    return seen & ~whole, whole


def _listed(blocks: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row has, and which, those first; as BlockMask takes them."""
    which = blocks.int().argsort(dim=1, descending=True, stable=True)
    return tuple(t.to(device, torch.int32, non_blocking=True)[None, None] for t in (blocks.sum(1), which))


PackedAttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SampleBounds, float], torch.Tensor]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SampleBounds, scale: float) -> torch.Tensor:
    if q.is_cuda:  # given fewer keys than queries, GPUs have no kernel for fp32 but the one with a T x T matrix
        k, v = (for_each_query(t, q) for t in (k, v))
    outputs = []
    for parts in zip(*(t.split(bounds.lengths) for t in (q, k, v)), strict=True):
        qs, ks, vs = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        out = F.scaled_dot_product_attention(
            qs, ks, vs, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def for_each_query(t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Keys or values [T, key-value heads, d], repeated for the queries [T, heads, d] that share them."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SampleBounds, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    n, ends = bounds.longest, bounds.ends
    return flash_attn_varlen_func(q, k, v, ends, ends, n, n, softmax_scale=scale, causal=True)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SampleBounds, scale: float) -> torch.Tensor:
    n, ends = bounds.longest, bounds.ends
    return varlen_attn(q, k, v, ends, ends, n, n, scale=scale, **CAUSAL_GQA)


def _causal_gqa_options() -> dict:
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


CAUSAL_GQA = _causal_gqa_options()
"""How this torch's varlen_attn is told: releases differ in what causality and grouped queries are called."""


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SampleBounds, scale: float) -> torch.Tensor:
    qs, ks, vs = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    attend = _flex_attention(q.device.type)
    out = attend(qs, ks, vs, block_mask=bounds.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@cache
def _flex_attention(device: str):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


IMPLEMENTATIONS: dict[str, PackedAttentionFunction] = {"flash": flash, "varlen": varlen, "flex": flex, "sdpa": sdpa}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves the setting `attention` for a device and compute dtype.

    Raises:
        ConfigError: the kernel asked for cannot run here.
    """
    gpu = device.type == "cuda"
    varlen_needs = [
        ("a GPU of Ampere's kind or newer", gpu and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY),
        ("bf16", dtype in (torch.bfloat16, torch.float16)),
    ]
    has_flash = importlib.util.find_spec("flash_attn") is not None
    missing = {
        "flash": [*varlen_needs, ("flash-attn (pip install 'higgs-engine[flash]')", has_flash)],
        "varlen": varlen_needs,
        "flex": [("a GPU (its backward has no CPU kernel)", gpu)],
        "sdpa": [],
    }
    if name == "auto":
        return next(n for n in ("flash", "varlen", "sdpa") if all(ok for _, ok in missing[n]))
    needs = [what for what, ok in missing[name] if not ok]
    if needs:
        raise ConfigError("attention:", [f"attention: {name} needs {what} → set attention: auto" for what in needs])
    return name
